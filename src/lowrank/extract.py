"""A LoRA out of two checkpoints: what the tuned one changed, at a low rank, streamed tensor by tensor."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from lowrank.bases.kinds import EMBEDDING, EXPERTS
from lowrank.config import LoraConfig
from lowrank.errors import ExtractError, listed
from lowrank.expert_files import experts_of, fused_from
from lowrank.fingerprint import Sample, of_samples, sample_places
from lowrank.merge_plan import names_in_model
from lowrank.model_files import Stored, stored_tensors
from lowrank.model_folder import embedding_names, load_skeleton, task_of
from lowrank.path_patterns import is_or_ends
from lowrank.targets import Target, plan
from lowrank.task_arithmetic import Combined, low_rank, stacked_experts
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


class _Pair(NamedTuple):
    name: str  # in the model; in the files if `part_of` is known
    base: Entry
    tuned: Entry
    part_of: str = ""  # the model's tensor that is made of this one and others


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    target_parameters: Sequence[str] = (),
    save_rest: bool = False,
    seed: int = 0,
) -> Extracted:
    """The LoRA whose ΔW is, at each layer, the best approximation of tuned − base (Eckart and Young 1936).

    base, tuned: model folders or names on the Hub, with safetensors; no model is built, one pair of tensors is
    read at a time, and subtracted in float32. rank: of every layer. energy: of each layer as many singular
    values as hold this share of ‖ΔW‖². target_modules, target_parameters: as LoraConfig's; of fused experts each is
    approximated by itself, and the rank is that of the one that needs most. A layer that is the same in both gets none.
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
    targets = plan(
        model,
        LoraConfig(
            r=1,
            target_modules=wanted,
            target_parameters=list(target_parameters) or None,
            task_type=task,
        ),
    )

    found: dict[str, Combined] = {}
    samples: dict[str, Sample] = {}
    differ: list[tuple[_Pair, float | None]] = []
    identical = 0
    left = {pair.name: pair for pair in [*pairs, *verbatim]}
    for target in targets:
        name = f"{target.module_path}.{target.kind.weight}"
        parts = [pair for pair in left.values() if name in (pair.name, pair.part_of)]
        if not parts or any(pair.base.shape != pair.tuned.shape for pair in parts):
            continue
        if target.parameter is None and parts[0].part_of:
            continue  # stored in another form than the model's
        for pair in parts:
            del left[pair.name]
        if all(_same(pair.base.read(), pair.tuned.read()) for pair in parts):
            identical += len(parts)
            continue
        found[target.path], samples[target.path] = _approximated(
            model, target, parts, seed, rank, energy
        )
    for pair in left.values():
        W, M = pair.base.read(), pair.tuned.read()
        if _same(W, M):
            identical += 1
        else:
            differ.append((pair, _share(W, M) if W.shape == M.shape else None))
    adapted = [target for target in targets if target.path in found]
    tensors = _as_saved(model, adapted, found)
    report = {
        path: {"r": layer.A.shape[-2], "norm": layer.norm, "error": layer.error}
        for path, layer in found.items()
    }
    saved, fields = _rest(
        [pair for pair, _ in differ] if save_rest else [],
        {target.path for target in adapted if target.parameter is None},
        {target.module_path for target in adapted if target.parameter is not None},
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
    ranks = {path: layer.A.shape[-2] for path, layer in found.items()}
    config = _config(ranks, adapted, model, base, task, fields)
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
        names, part_of = names_in_model(model, stored.tensors)
        by_name.append(
            (
                {name: stored.tensors[key] for key, name in names.items()},
                {key: stored.tensors[key] for key in part_of},
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
    raw = [_Pair(key, entry, there_raw[key], part_of[key]) for key, entry in here_raw.items()]
    return pairs, raw


def _approximated(
    model: Any,
    target: Target,
    parts: Sequence[_Pair],
    seed: int,
    rank: int | None,
    energy: float | None,
) -> tuple[Combined, Sample]:
    """The factors of one target's change, an expert's matrix at a time; and the base's shape and sample."""
    base, tuned = _matrices(model, target, parts)
    transposed = target.kind.hold is stores.transposed
    path, found, sample = target.path, [], []
    rows, columns = sample_places(len(base) * target.out, target.in_)
    for e, (read_W, read_M) in enumerate(zip(base, tuned, strict=True)):
        W, M = read_W(), read_M()
        delta = M.float() - W.float()
        delta, W = (x.T if transposed else x.flatten(1) for x in (delta, W))
        if not delta.isfinite().all():
            raise ExtractError(f"{path} is not finite in one of the two.")
        random = _generator(seed, path if len(base) == 1 else f"{path}.{e}")
        found.append(low_rank(delta, random, rank=rank, energy=energy))
        here = rows // target.out == e
        sample.append(W[rows[here] % target.out, columns[here]])
    shape = (target.out, target.in_)
    if target.kind.layout is not EXPERTS:
        return found[0], Sample(shape, sample[0])
    return stacked_experts(found), Sample((len(base), *shape), torch.cat(sample))


def _matrices(
    model: Any, target: Target, parts: Sequence[_Pair]
) -> tuple[list[Callable[[], Tensor]], list[Callable[[], Tensor]]]:
    """What reads each of the target's matrices as the model holds it, out of both checkpoints."""
    found = []
    for which in ("base", "tuned"):
        files: dict[str, Entry] = {pair.name: getattr(pair, which) for pair in parts}
        if target.kind.layout is not EXPERTS:
            found.append([next(iter(files.values())).read])
            continue
        whole = files.get(target.path)
        readers = experts_of(whole) if whole else fused_from(model, target.path, files)
        if isinstance(readers, str):
            raise ExtractError(readers)
        found.append(readers)
    return found[0], found[1]


def _as_saved(
    model: Any, targets: Sequence[Target], found: Mapping[str, Combined]
) -> dict[str, Tensor]:
    """A and B under PEFT's keys and in PEFT's shapes."""
    tensors = {}
    for target in targets:
        module, layout = model.get_submodule(target.module_path), target.kind.layout
        # several parameters of one module are nested, the module's last one outermost
        own = [t.parameter for t in targets if t.module_path == target.module_path]
        order = [name for name in reversed(module._parameters) if name in own]
        depth = order.index(target.parameter) if target.parameter else 0
        A, B, _, _ = found[target.path]
        shape, pair = module.get_parameter(target.kind.weight).shape, (target.out, target.in_)
        end = "" if layout is EMBEDDING else ".weight"
        key, r = f"{PREFIX}{target.module_path}{'.base_layer' * depth}", A.shape[-2]
        for name, factor, as_file in (
            (layout.A, layout.A_saved(A), layout.A_shape),
            (layout.B, layout.B_saved(B), layout.B_shape),
        ):
            tensors[f"{key}.{name}{end}"] = factor.reshape(as_file(shape, pair, r)).contiguous()
    return tensors


def _rest(
    differ: Sequence[_Pair],
    adapted: set[str],
    by_parameters: set[str],
    pairs: Mapping[str, _Pair],
    heads: tuple[str, ...],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is saved whole, by key, and the fields of the configuration that say so.

    adapted, by_parameters: the modules that the adapter adapts as such, and those of target_parameters, of which
    nothing can be saved beside. heads: of the task, which every adapter for it holds, whether they differ or not.
    """
    owners = {name: name.rpartition(".")[0] for name in pairs}
    modules = {path for path in owners.values() if path.rpartition(".")[2] in heads}
    fields: dict[str, Any] = {}
    saved: dict[str, Tensor] = {}
    for pair in differ:
        if pair.name not in pairs or owners[pair.name] in by_parameters:
            continue  # stored in another form than the model's, or beside an adapted parameter
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
    ranks: Mapping[str, int],
    adapted: Sequence[Target],
    model: Any,
    base: str | Path,
    task: str,
    fields: Mapping[str, Any],
) -> LoraConfig:
    """The configuration that describes the layers: scaling 1 at each, whatever its rank."""
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = pattern_of(ranks, r)
    modules = [target.path for target in adapted if target.parameter is None]
    parameters = [target.path for target in adapted if target.parameter is not None]
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_names(modules, [path for path, _ in model.named_modules()]),
        target_parameters=_names(parameters, [path for path, _ in model.named_parameters()], 2)
        or None,
        task_type=task,
        base_model_name_or_path=str(base),
        inference_mode=True,
        **fields,
    )


def _names(paths: Sequence[str], every: Sequence[str], words: int = 1) -> list[str]:
    """The last words of the paths where those select nothing else of `every`, else the paths."""
    endings = sorted({".".join(path.split(".")[-words:]) for path in paths})
    selected = {path for path in every if any(is_or_ends(path, end) for end in endings)}
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
