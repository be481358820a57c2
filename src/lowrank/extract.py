"""A LoRA out of two checkpoints: what the tuned one changed, at a low rank, streamed tensor by tensor."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank import __version__
from lowrank.adapter_file import Adapter
from lowrank.adapter_layers import pattern_of
from lowrank.bare_parameters import PREFIX
from lowrank.bases import stores
from lowrank.bases.kinds import Kind, kind_of
from lowrank.config import LoraConfig
from lowrank.errors import ExtractError, listed
from lowrank.fingerprint import of_samples, sample_places
from lowrank.merge_plan import names_in_model
from lowrank.model_folder import Stored, embedding_names, load_skeleton, stored_tensors, task_of
from lowrank.targets import plan
from lowrank.task_arithmetic import low_rank
from lowrank.task_types import TASK_HEADS
from lowrank.tensor_files import Entry


@dataclass(frozen=True)
class NotLowRank:
    """A tensor that differs and is in no layer of the adapter."""

    name: str  # in the model's state dict
    shape: tuple[int, ...]  # in the tuned checkpoint
    change: float | None  # ‖ΔW‖ / ‖W‖; None where the shapes differ
    saved: bool  # the adapter holds it whole


@dataclass(frozen=True)
class Extracted:
    """What `extract` made."""

    adapter: Adapter  # `combine.errors(adapter)` says what the rank costs at each layer
    rest: list[NotLowRank]
    identical: int  # how many tensors are the same in both


class _Layer(NamedTuple):
    path: str
    kind: Kind
    shape: tuple[int, ...]  # of the weight as it is held


class _Pair(NamedTuple):
    name: str  # in the model
    base: Entry
    tuned: Entry


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    save_rest: bool = False,
    seed: int = 0,
) -> Extracted:
    """The LoRA whose ΔW is, at each layer, the best approximation of tuned − base (Eckart and Young 1936).

    base, tuned: model folders or names on the Hub, with safetensors; no model is built, one pair of tensors is
    read at a time, and subtracted in float32. rank: of every layer. energy: of each layer as many singular
    values as hold this share of ‖ΔW‖². target_modules: as LoraConfig's. A layer that is the same in both gets none.
    save_rest: hold whole what differs and is no matrix of these layers (norms, biases, embeddings; also ones of
    another size), as modules_to_save; else it is only in the result's `rest`. A classifier is held in any case.
    seed: of the randomised SVD. Raises ExtractError, with everything that does not go together.
    """
    _check_arguments(rank, energy)
    task = task_of(base, None)
    model = load_skeleton(base, task, {})
    stored, other = (_stored(folder) for folder in (base, tuned))
    pairs, verbatim = _pairs(model, stored, other, str(base), str(tuned))
    wanted = target_modules if isinstance(target_modules, str) else list(target_modules)
    targets = plan(model, LoraConfig(r=1, target_modules=wanted, task_type=task))
    layers = {f"{t.path}.{t.kind.weight}": t.path for t in targets if t.parameter is None}

    tensors: dict[str, Tensor] = {}
    report: dict[str, dict[str, Any]] = {}
    samples: dict[str, tuple[tuple[int, int], Tensor]] = {}
    differ: list[tuple[_Pair, float | None]] = []
    identical = 0
    for pair in [*pairs, *verbatim]:
        W, M = pair.base.read(), pair.tuned.read()
        if _same(W, M):
            identical += 1
            continue
        path = layers.get(pair.name)
        if path is None or W.shape != M.shape or pair in verbatim:
            change = _share(W, M) if W.shape == M.shape else None
            differ.append((pair, change))
            continue
        layer = _layer(model, path)
        transposed = layer.kind.hold is stores.transposed
        delta = M.float() - W.float()
        delta = delta.T if transposed else delta.flatten(1)
        if not delta.isfinite().all():
            raise ExtractError(f"{pair.name} is not finite in one of the two.")
        found = low_rank(delta, _generator(seed, path), rank=rank, energy=energy)
        tensors |= _as_saved(layer, found.A, found.B, tuple(W.shape), tuple(delta.shape))
        report[path] = {"r": len(found.A), "norm": found.norm, "error": found.error}
        rows, columns = sample_places(*delta.shape)
        held = W.T if transposed else W.flatten(1)
        samples[path] = ((delta.shape[0], delta.shape[1]), held[rows, columns])
    saved, fields = _rest(
        [pair for pair, _ in differ] if save_rest else [],
        set(report),
        {pair.name: pair for pair in pairs},
        TASK_HEADS.get(task, ()),
    )
    whole = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in saved}
    rest = [
        NotLowRank(pair.name, pair.tuned.shape, change, pair.name in whole)
        for pair, change in differ
    ]
    if not report and not saved:
        raise ExtractError(
            f"{base} and {tuned} are the same in every layer of target_modules={target_modules!r}"
            + (f"; {len(rest)} other tensors differ (save_rest)." if rest else ".")
        )
    how = {"rank": rank, "energy": energy, "base": str(base), "tuned": str(tuned)}
    metadata = {
        "versions": {"lowrank": __version__, "torch": torch.__version__},
        "base": {
            "architecture": type(model).__name__,
            "model_type": model.config.model_type,
            "weights": of_samples(samples),
        },
        "extracted": {**{k: v for k, v in how.items() if v is not None}, "layers": report},
    }
    ranks = {path: row["r"] for path, row in report.items()}
    config = _config(ranks, model, base, task, fields)
    return Extracted(Adapter(config, tensors | saved, metadata), rest, identical)


def _check_arguments(rank: int | None, energy: float | None) -> None:
    problems = []
    if (rank is None) == (energy is None):
        problems.append("extract needs either rank=… or energy=….")
    if rank is not None and rank < 1:
        problems.append(f"rank={rank!r} must be at least 1.")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy={energy!r} must be above 0 and at most 1.")
    if problems:
        raise ExtractError(listed(problems))


def _stored(folder: str | Path) -> Stored:
    found = stored_tensors(folder)
    if found is None and not Path(folder).exists():
        raise ExtractError(
            f"There is no folder {folder} here, and the Hub has no such model with safetensors files, or is out of reach."
        )
    if found is None:
        raise ExtractError(
            f"{folder} has no safetensors files. Load the model with transformers, and save it again."
        )
    return found


def _pairs(
    model: Any, base: Stored, tuned: Stored, base_name: str, tuned_name: str
) -> tuple[list[_Pair], list[_Pair]]:
    """The tensors that both have, by the model's names; and those stored in another form than the model's.

    Raises ExtractError with all that only one of them has, or that has another shape (but for embeddings).
    """
    by_name = []
    for stored in (base, tuned):
        names, converted = names_in_model(model, stored.tensors)
        by_name.append(
            (
                {name: stored.tensors[key] for key, name in names.items()},
                {key: stored.tensors[key] for key in converted},
            )
        )
    (here, here_raw), (there, there_raw) = by_name
    tied = embedding_names(model) if model.config.get_text_config().tie_word_embeddings else None
    if tied:
        for found in (here, there):  # a file may hold the one tensor under both names
            if found.keys() >= {*tied} and _same(*(found[name].read() for name in tied)):
                del found[tied[1]]
        if tied[1] in there and tied[0] in here:  # where they came apart, both start from the one
            here.setdefault(tied[1], here[tied[0]])
    problems = [f"{name} is only in {base_name}." for name in here.keys() - there.keys()]
    problems += [f"{name} is only in {tuned_name}." for name in there.keys() - here.keys()]
    problems += [f"{key} is in one of them only." for key in here_raw.keys() ^ there_raw.keys()]
    embeddings = set(embedding_names(model) or ())
    for name in here.keys() & there.keys():
        W, M = here[name].shape, there[name].shape
        if W != M and not (name in embeddings and W[1:] == M[1:]):
            problems.append(f"{name} is {W} in {base_name}, {M} in {tuned_name}.")
    if problems:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ExtractError(
            "These are no two checkpoints of one model. " + listed(sorted(problems)[:20] + more)
        )
    pairs = [_Pair(name, entry, there[name]) for name, entry in here.items()]
    return pairs, [_Pair(key, entry, there_raw[key]) for key, entry in here_raw.items()]


def _layer(model: Any, path: str) -> _Layer:
    module = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    kind = kind_of(module, parent=parent)
    assert kind is not None
    return _Layer(path, kind, tuple(module.get_parameter(kind.weight).shape))


def _as_saved(
    layer: _Layer, A: Tensor, B: Tensor, held: tuple[int, ...], matrix: tuple[int, ...]
) -> dict[str, Tensor]:
    """A and B under PEFT's keys and in PEFT's shapes."""
    layout, r = layer.kind.layout, len(A)
    shape, pair = torch.Size(held), (matrix[0], matrix[1])
    end = "" if "embedding" in layout.A else ".weight"
    key = f"{PREFIX}{layer.path}"
    return {
        f"{key}.{layout.A}{end}": A.reshape(layout.A_shape(shape, pair, r)).contiguous(),
        f"{key}.{layout.B}{end}": B.reshape(layout.B_shape(shape, pair, r)).contiguous(),
    }


def _rest(
    differ: Sequence[_Pair], adapted: set[str], pairs: Mapping[str, _Pair], heads: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is saved whole, by key, and the fields of the configuration that say so.

    heads: of the task, which every adapter for it holds, whether they differ or not.
    """
    owners = {name: name.rpartition(".")[0] for name in pairs}
    modules = {path for path in owners.values() if path.rpartition(".")[2] in heads}
    fields: dict[str, Any] = {}
    saved: dict[str, Tensor] = {}
    for pair in differ:
        if pair.name not in pairs:
            continue  # stored in another form than the model's
        if pair.base.shape != pair.tuned.shape:
            # a resized vocabulary, which PEFT saves without a name in modules_to_save
            saved[PREFIX + pair.name] = pair.tuned.read()
        elif owners[pair.name] in adapted:
            fields["bias"] = "lora_only"
        else:
            modules.add(owners[pair.name])
    for name, pair in pairs.items():
        if owners[name] in modules:
            saved[PREFIX + name] = pair.tuned.read()
        elif "bias" in fields and name.endswith(".bias") and owners[name] in adapted:
            saved[f"{PREFIX}{owners[name]}.base_layer.bias"] = pair.tuned.read()
    if modules:
        fields["modules_to_save"] = sorted(modules)
    return saved, fields


def _config(
    ranks: Mapping[str, int], model: Any, base: str | Path, task: str, fields: Mapping[str, Any]
) -> LoraConfig:
    """The configuration that describes the layers: scaling 1 at each, whatever its rank."""
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = pattern_of(ranks, r)
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_names(model, ranks),
        task_type=task,
        base_model_name_or_path=str(base),
        inference_mode=True,
        **fields,
    )


def _names(model: Any, paths: Mapping[str, int]) -> list[str]:
    """The last names of the layers where those select no other module, else the paths."""
    endings = sorted({path.rpartition(".")[2] for path in paths})
    selected = {
        path for path, _ in model.named_modules() if path and path.rpartition(".")[2] in endings
    }
    return endings if selected == set(paths) else list(paths)


def _same(W: Tensor, M: Tensor) -> bool:
    return W.shape == M.shape and torch.equal(W, M)


def _share(W: Tensor, M: Tensor) -> float | None:
    if not W.is_floating_point():
        return None
    return ((M.double() - W.double()).norm() / W.double().norm().clamp_min(1e-300)).item()


def _generator(seed: int, path: str) -> torch.Generator:
    """Random numbers that depend on the seed and the place, not on what other layers there are."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
