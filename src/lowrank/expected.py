"""What a merge has to give, worked out again in float64 from the files alone.

This is the measure that `merge` and `verify` hold a merged model against, so it shares no code with
the layers, the injection or the merge: two equal mistakes would cancel. It knows PEFT's file format
(key names, shapes), the formulas, and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank.errors import AdapterMismatchError

PREFIX = "base_model.model."
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
LORA_KEY = re.compile(
    r"(.+?)((?:\.base_layer)*)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(weight|bias))?"
)


class Change(NamedTuple):
    """What the adapter makes of one tensor of the base."""

    name: str  # in the model's state dict
    before: Tensor  # float64; what the adapter starts from at this tensor
    after: Tensor  # float64; what a merged model has to hold, before rounding to its dtype
    saved: bool  # True: the file holds the tensor itself (modules_to_save, trained biases)


class Fields(Protocol):
    """The fields of an adapter's config that decide what a merge gives."""

    lora_alpha: Any
    use_rslora: Any
    alpha_pattern: Any
    modules_to_save: Any
    init_lora_weights: Any
    target_parameters: Any
    ensure_weight_tying: Any
    trainable_token_indices: Any


def changes(
    weights: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    config: Fields,
    held_transposed: frozenset[str] = frozenset(),
    start: Mapping[str, Tensor] | None = None,
) -> Iterator[Change]:
    """Every tensor of the base that the adapter changes, one at a time, as float64.

    weights: the base's state dict, tied names each listed. tensors: the adapter's file, PEFT's keys.
    held_transposed: the names in `weights` held as (in, out), which is what `transposed_weights` finds.
    LoRA: W + scaling·B·A (Hu et al. 2021, §4.1). DoRA: m ⊙ V / ‖V‖ by row, V = W + scaling·B·A
    (Liu et al. 2024, eq. 5). Tensors that the file holds whole replace the base's.
    Where the initialisation took scaling·B₀·A₀ out of W, that is subtracted: from `start` (the file beside
    the adapter's, same keys), or computed from W for PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024).
    Raises AdapterMismatchError, with every such key, if a key belongs to nothing in `weights`.
    """
    if getattr(config, "layer_replication", None):
        raise AdapterMismatchError(
            "The adapter stacks copies of the base's layers (layer_replication), so its paths are not the base's. Merge it "
            "in Python: PeftModel.from_pretrained(...).merge_and_unload()."
        )
    lora, saved, strangers = _sort(weights, tensors, config)
    starts = _sort(weights, start or {}, config)[0]
    rows = {name: saved.pop(name) for name in list(saved) if name.endswith(TOKEN_ROWS)}
    saved |= _tied_copies(saved, weights, config)
    lora.pop("", None)
    if strangers:
        raise AdapterMismatchError(
            f"{len(strangers)} of the adapter's {len(tensors)} tensors belong to nothing in the base:\n  "
            + "\n  ".join(sorted(strangers)[:20])
            + "\nWas the adapter trained on this base, and for this task?"
        )
    yield from _token_rows(rows, weights, saved, config)
    heads = _tied_heads(lora, weights, config)
    for name, (path, parts) in lora.items():
        _, begin = starts.get(name, (path, None))
        along = -2 if name in heads else -1
        yield from _adapted(
            name, path, parts, weights, saved, config, held_transposed, begin, along
        )
    for name, value in saved.items():
        before = weights[name].double()
        after = value.double()
        yield Change(name, before if before.shape == after.shape else 0 * after, after, saved=True)


def _sort(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], config: Fields):
    """The file's tensors as {name: (path, {part: tensor})} (LoRA), {name: tensor} (saved), [key] (neither).

    A LoRA's name is that of the weight; its path is what alpha_pattern is matched against.
    """
    lora: dict[str, tuple[str, dict[str, Tensor]]] = {}
    saved: dict[str, Tensor] = {}
    strangers: list[str] = []
    for key, value in tensors.items():
        if ".original_module." in key or ".modules_to_save." in key:
            continue  # with bias="all" PEFT writes these beside the same tensor under its proper key
        match = LORA_KEY.fullmatch(key.removeprefix(PREFIX))
        if match:
            path, within, part, what = match.groups()
            path = path.replace(".base_layer.", ".")
            depth = within.count(".base_layer")
            name = _bare_weight(path, depth, weights, config)
            own, name = (name, name) if name else (path, _weight_name(path, weights))
            known = name is not None
            part = "lora_bias" if what == "bias" else part.replace("embedding_", "")
            parts = lora.setdefault(name or "", (own, {}))[1]
            if "lora_embedding" in key:
                parts["embedding"] = value
            parts[part] = value
        else:
            name = key.removeprefix(PREFIX).replace(".token_adapter.base_layer.", ".")
            name = name.replace(".base_layer.", ".")
            known = name.replace(TOKEN_ROWS, ".weight") in weights
            saved[name] = value
        if not known:
            strangers.append(key)
    return lora, saved, strangers


def _tied_copies(
    saved: Mapping[str, Tensor], weights: Mapping[str, Tensor], config: Fields
) -> dict[str, Tensor]:
    """What a saved tensor means for those it is tied to: a module of modules_to_save stands alone, but
    a trained bias and the embedding of a resized vocabulary are the base's own, tied as before."""
    own = tuple(f".{name}." for name in config.modules_to_save or ())
    found = {}
    for name, value in saved.items():
        if any(part in f".{name}" for part in own):
            continue
        for other, weight in weights.items():
            if other not in saved and weight.data_ptr() == weights[name].data_ptr() != 0:
                found[other] = value
    return found


def _tied_heads(
    lora: Mapping[str, tuple[str, dict[str, Tensor]]], weights: Mapping[str, Tensor], config: Fields
) -> set[str]:
    """The weights whose adapter is that of an embedding, transposed: a magnitude is one for each column."""
    if not config.ensure_weight_tying:
        return set()
    embeddings = {weights[n].data_ptr() for n, (_, parts) in lora.items() if "embedding" in parts}
    return {
        name
        for name, (_, parts) in lora.items()
        if "embedding" not in parts and weights[name].data_ptr() in embeddings
    }


def _token_rows(
    rows: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    saved: dict[str, Tensor],
    config: Fields,
) -> Iterator[Change]:
    """Rows of a weight that the file replaces, in it and, where it is the input embedding's, in its twins.

    The input embedding is taken to be the first of those that share one tensor.
    """
    given = config.trainable_token_indices
    twins: dict[int, list[str]] = {}
    for name, weight in weights.items():
        twins.setdefault(weight.data_ptr() or id(weight), []).append(name)
    for key, value in rows.items():
        path = key.removesuffix(TOKEN_ROWS)
        name = f"{path}.weight"
        indices = given
        if isinstance(given, Mapping):
            indices = next(found for ending, found in given.items() if path.endswith(ending))
        tied = next(names for names in twins.values() if name in names)
        own = {key.replace(TOKEN_ROWS, ".weight") for key in rows} - {name}
        for other in tied if tied[0] == name else [name]:
            if other not in own:
                before = saved.pop(other, weights[other]).double()
                after = before.clone()
                after[indices] = value.double()
                yield Change(other, before, after, saved=False)


def _weight_name(path: str, weights: Mapping[str, Tensor]) -> str | None:
    names = (f"{path}.weight", f"{path}.in_proj_weight")  # the second: MultiheadAttention
    return next((name for name in names if name in weights), None)


def _bare_weight(
    path: str, depth: int, weights: Mapping[str, Tensor], config: Fields
) -> str | None:
    """The weight named in target_parameters that the tensors at `path` adapt, in `depth` base_layers.

    Of those of one module, the last is outermost, in the order of `weights`.
    """
    if not config.target_parameters:
        return None
    wanted = tuple(f".{name}" for name in config.target_parameters)
    own = [name for name in weights if name.rpartition(".")[0] == path]
    bare = [name for name in own if f".{name}".endswith(wanted)]
    return bare[-1 - depth] if depth < len(bare) else None


def _adapted(
    name: str,
    path: str,
    parts: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    saved: dict[str, Tensor],
    config: Fields,
    held_transposed: frozenset[str],
    start: Mapping[str, Tensor] | None,
    along: int,
) -> Iterator[Change]:
    """along: the dimension of W that DoRA's norm runs over."""
    A, B = parts["lora_A"].double(), parts["lora_B"].double()
    # an embedding saved beside its LoRA (a resized vocabulary) is the base that the LoRA stands on
    held = saved.pop(name, weights[name]).double()
    transposed = "embedding" in parts or name in held_transposed
    bare = path == name
    experts = len(held) if bare and held.ndim == 3 else 1
    scaling = _scaling(path, A.shape[0] // experts, config)
    W = held.mT if transposed else held if bare else held.flatten(1)  # (*expert, out, in)
    if bare and held.ndim == 3 and A.shape[0] % experts == 0 and B[0].numel() == A.shape[0]:
        # PEFT's order: an expert's r rows of A stand together, its r columns of B stand `experts` apart
        r = A.shape[0] // experts
        each = [B[:, e::experts] @ A[e * r : e * r + r] for e in range(experts)]
        delta = scaling * torch.stack(each)
    else:
        delta = scaling * (B.flatten(1) @ A.flatten(1))  # (out, in)
    if delta.shape != W.shape:
        raise AdapterMismatchError(
            f"{path}: the adapter makes a change of shape {tuple(delta.shape)} "
            f"(lora_B {tuple(B.shape)} times lora_A {tuple(A.shape)}), the base's weight is "
            f"{tuple(W.shape)} as (out, in). This adapter was trained on another base."
        )
    delta = delta - _taken_out(path, W, A.shape[0], scaling, config, start)
    merged = W + delta
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None:
        norm = merged.norm(dim=along, keepdim=True)
        merged = magnitude.double().reshape(norm.shape) * merged / norm
    merged = merged.mT if transposed else merged.reshape(held.shape)
    yield Change(name, held, merged, saved=False)

    if "lora_bias" in parts:
        bias = name.removesuffix("weight") + "bias"
        if bias not in weights:
            raise AdapterMismatchError(
                f"{path} has a trained lora_B bias, but the base's layer has no bias to merge it into."
            )
        before = saved.pop(bias, weights[bias]).double()
        yield Change(bias, before, before + scaling * parts["lora_bias"].double(), saved=False)


def _taken_out(
    path: str,
    W: Tensor,
    r: int,
    scaling: float,
    config: Fields,
    start: Mapping[str, Tensor] | None,
) -> Tensor | float:
    """scaling·B₀·A₀, what the initialisation took out of W (out, in); 0 for most."""
    if start is not None:
        B_0, A_0 = start["lora_B"].double(), start["lora_A"].double()
        return scaling * (B_0.flatten(1) @ A_0.flatten(1))
    init = config.init_lora_weights
    if init == "pissa":  # the best approximation of rank r, whatever the scaling
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return (U[:, :r] * S[:r]) @ Vh[:r]
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        return scaling * Q[:, :r] @ R[:r]
    if init == "loftq":
        raise AdapterMismatchError(
            f"{path}: an adapter started with LoftQ stands on a quantised base, which this base is not. Save that "
            "base, and the adapter with init_lora_weights=True for it; or load it here and merge_and_unload()."
        )
    if isinstance(init, str) and (init.startswith("pissa") or init in ("corda", "lora_ga")):
        raise AdapterMismatchError(
            f"{path}: what init_lora_weights={init!r} took out of the base is not known: the adapter's folder "
            "has no lora_start.safetensors."
        )
    return 0.0


def _scaling(path: str, r: int, config: Fields) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) (Kalajdzievski 2023), as alpha_pattern has it here."""
    alpha = config.lora_alpha
    for pattern, value in (config.alpha_pattern or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r


def transposed_weights(model: torch.nn.Module) -> frozenset[str]:
    """The names of weights held as (in, out): transformers' Conv1D (GPT-2), and experts that say so (GPT-OSS)."""
    return frozenset(
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (type(module).__name__ == "Conv1D" and name == "weight")
        or (getattr(module, "is_transposed", False) is True and parameter.ndim == 3)
    )


class Loss(NamedTuple):
    """How one tensor `M` of a merged model stands to the `Change` it should hold."""

    error: float  # what is wrong beyond rounding in the worst row, as a share of ‖ΔW‖ there; 0 is right
    row: int  # which row that is: the index in M's first dimension
    overall_error: float  # the same over the whole tensor
    moved: float  # ‖M − W‖ / ‖ΔW‖: 0 if M is still the base's
    present: float  # how much of the adapter's change is there: 1 all, 0 none, 2 twice
    rounding: (
        float  # what the right rounding to M's dtype costs, as a share of the adapter's change
    )
    change_norm: float  # ‖ΔW‖, Frobenius
    rounding_norm: float  # ‖round(W+ΔW) − (W+ΔW)‖, Frobenius


def loss(M: Tensor, change: Change, either_neighbour: bool = False) -> Loss:
    """Compare `M`, any float dtype and of the change's shape, with the change in float64.

    An element is right when it is as near to the exact value as M's dtype allows (and 16 units in
    the last place of float32, for a sum taken there); only what is beyond that is an error. `error`
    is that of the worst row, so that a few forgotten rows of a large table count in full.
    either_neighbour: an element is also right as the dtype's next value on the other side of the exact one; then
    `present` has to show that the change is there.
    """
    exact, delta = change.after, change.after - change.before
    rounded = exact.to(M.dtype).double()
    slack = 16 * torch.finfo(torch.float32).eps * exact.abs()
    allowed = (rounded - exact).abs()
    if either_neighbour:
        allowed = torch.maximum(allowed, _other_neighbour(exact, M.dtype))
    excess = (M.double() - exact).abs() - allowed - slack
    excess = torch.where(excess.isnan(), torch.inf, excess.clamp_min(0))
    error, row = _worst_row(excess, delta)
    change_norm = delta.norm().item()
    rounding_norm = (rounded - exact).norm().item()
    moved = M.double() - change.before
    return Loss(
        error=error,
        row=row,
        overall_error=_share(excess.norm().item(), change_norm),
        moved=_share(moved.norm().item(), change_norm),
        present=_share((moved * delta).sum().item(), change_norm**2),
        rounding=_share(rounding_norm, change_norm),
        change_norm=change_norm,
        rounding_norm=rounding_norm,
    )


def _other_neighbour(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """How far the value in `dtype` on the other side of `exact` than its nearest is, by entry."""
    rounded = exact.to(dtype)
    towards = torch.where(rounded.double() > exact, -torch.inf, torch.inf).to(dtype)
    return (torch.nextafter(rounded, towards).double() - exact).abs()


def _worst_row(excess: Tensor, delta: Tensor) -> tuple[float, int]:
    """max over rows of ‖excess‖ / ‖ΔW‖ and where it is; hardly changed rows count as 1/1000 of a typical one."""
    wrong, rows = (t.reshape(t.shape[0] if t.ndim else 1, -1).norm(dim=1) for t in (excess, delta))
    if not wrong.any():
        return 0.0, 0
    typical = rows.square().mean().sqrt()
    worst, row = (wrong / rows.clamp_min(1e-3 * typical)).nan_to_num(0, posinf=math.inf).max(dim=0)
    return worst.item(), int(row)


def _share(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return part / whole
