"""Whether adapters can be combined: what is asked, their configurations, bases and shapes, all problems at once."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank.adapter_file import Adapter
from lowrank.adapter_layers import AdapterLayer, read_layers
from lowrank.bare_parameters import LORA_KEY, PREFIX, Bare
from lowrank.config import LoraConfig
from lowrank.errors import BaseMismatchError, CombineError, did_you_mean, listed
from lowrank.fingerprint import differences
from lowrank.log import logger
from lowrank.quantised_base import METADATA_KEY, from_json, in_words
from lowrank.start_factors import start_problems
from lowrank.task_arithmetic import METHODS

SIGN_METHODS = ("total", "frequency")
# what the result has of its own, or what does not bear on the tensors' meaning; all else must agree
_FREE_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
    *("target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias", "lora_bias", "fan_in_fan_out", "task_type", "inference_mode"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "runtime_config"),
}


def check_arguments(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    given: Mapping[str, Any],
    sign: str,
) -> None:
    if method not in METHODS:
        raise CombineError(
            f"There is no method {method!r}.{did_you_mean(method, METHODS)} There are: {', '.join(METHODS)}."
        )
    row = METHODS[method]
    problems = []
    if not adapters:
        problems.append("There is no adapter to combine.")
    if len(adapters) != len(weights):
        problems.append(
            f"{len(adapters)} adapters need as many weights; {len(weights)} were given."
        )
    if not all(math.isfinite(weight) for weight in weights):
        problems.append(f"The weights must be finite numbers, not {list(weights)}.")
    taken_by = {
        "svd_rank": [m for m, r in METHODS.items() if r.takes_rank],
        "energy": ["svd"],
        "density": [m for m, r in METHODS.items() if r.takes_density],
    }
    for name, value in given.items():
        if value is not None and method not in taken_by[name]:
            problems.append(
                f"{name}={value!r} means nothing to the method {method!r}; it belongs to {', '.join(taken_by[name])}."
            )
    rank, energy, density = given["svd_rank"], given["energy"], given["density"]
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        problems.append(f"svd_rank={rank!r} must be a whole number of at least 1.")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy={energy!r} must be above 0 and at most 1.")
    if rank is not None and energy is not None:
        problems.append("svd_rank and energy both decide the rank: give one of them.")
    if row.takes_density and density is None:
        problems.append(f"The method {method!r} needs density, the share of entries that is kept.")
    elif density is not None and not 0 < density <= 1:
        problems.append(f"density={density!r} must be above 0 and at most 1.")
    if sign not in SIGN_METHODS:
        problems.append(f"majority_sign_method={sign!r} must be 'total' or 'frequency'.")
    elif sign != "total" and not row.takes_sign:
        problems.append(f"majority_sign_method={sign!r} means nothing to the method {method!r}.")
    if problems:
        raise CombineError(listed(problems))


def check_configs(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    problems = []
    configs = [adapter.config for adapter in adapters]
    for adapter, config, name in zip(adapters, configs, names, strict=True):
        if config.use_dora:
            problems.append(
                f"{name} is DoRA: its magnitudes belong to W + its own ΔW, and W′ is no sum of changes; only "
                "one adapter with weight 1 and its own rank comes back as it is. Merge it into the base instead."
            )
        problems += start_problems(adapter, name)
    for what in ("task_type", "bias"):
        values = {getattr(c, what) for c in configs} - {None, "none"}
        if len(values) > 1:
            problems.append(f"{what} differs: {', '.join(sorted(map(str, values)))}.")
    for f in dataclasses.fields(LoraConfig):
        values_ = [getattr(config, f.name) for config in configs]
        if f.name not in _FREE_FIELDS | {"use_dora"} and any(
            value != values_[0] for value in values_
        ):
            found = ", ".join(f"{n} {v!r}" for n, v in zip(names, values_, strict=True))
            problems.append(f"{f.name} differs: {found}.")
    if problems:
        what = "These adapters cannot be combined"
        if len(adapters) == 1:
            what = "No other adapter can be made of this one"
        raise CombineError(f"{what}. {listed(list(dict.fromkeys(problems)))}")


def common_quantisation(
    adapters: Sequence[Adapter], names: Sequence[str]
) -> list[dict[str, Any]] | None:
    """How the base was quantised under all of them, as their files name it; None where it was not.

    Where they differ, the log says so, and the result names what those have that have any, or nothing if these differ too.
    """
    named = [a.metadata.get(METADATA_KEY) for a in adapters]
    forms = [{path: q.rounding for path, q in from_json(rows).items()} for rows in named]
    known = [form for form in forms if form]
    if any(form != forms[0] for form in forms):
        each = [
            f"{n}: {in_words(from_json(r)) if r else '16 bits'}"
            for n, r in zip(names, named, strict=True)
        ]
        logger.warning(
            "They were trained on one base in several forms (%s). Their changes add up all the same; lowrank merge "
            "measures what they are best merged onto.",
            ", ".join(each),
        )
    agreed = all(form == known[0] for form in known)
    return next((rows for rows in named if rows), None) if agreed else None


def common_base(
    adapters: Sequence[Adapter], names: Sequence[str], check: bool
) -> dict[str, Any] | None:
    """The fingerprint of the base under all of them, or None if none has one."""
    marked = [(a.metadata.get("base"), n) for a, n in zip(adapters, names, strict=True)]
    known = [(base, name) for base, name in marked if base and base.get("weights")]
    unknown = [name for base, name in marked if not base]
    if check and unknown and len(adapters) > 1:
        logger.warning(
            "%s: no fingerprint of the base, so that it could not be checked that all belong to one.",
            ", ".join(unknown),
        )
    common: dict[str, Any] | None = None
    for base, name in known:
        found = differences(common, base) if common and check else []
        if found:
            rest = f"\n  … and {len(found) - 5} more" if len(found) > 5 else ""
            raise BaseMismatchError(
                f"{name} was trained on another base than {known[0][1]}:\n  "
                + "\n  ".join(found[:5])
                + rest
                + "\nAdapters of different bases do not add up; check_base=False (--any-base) combines them all the same."
            )
        weights = {**base["weights"], **(common["weights"] if common else {})}
        common = {**(common or base), "weights": weights}
    return common


def layers_of(
    adapters: Sequence[Adapter], names: Sequence[str], bare: Sequence[Mapping[str, Bare]]
) -> list[dict[str, AdapterLayer]]:
    """The layers of each adapter, by path. Raises CombineError for what does not go together within one."""
    read = [read_layers(adapter, own) for adapter, own in zip(adapters, bare, strict=True)]
    problems = [
        f"{name}: {text}" for name, (_, _, texts) in zip(names, read, strict=True) for text in texts
    ]
    if problems:
        raise CombineError(listed(problems))
    return [layers for layers, _, _ in read]


def check_layers(
    layers: list[dict[str, AdapterLayer]], paths: list[str], names: Sequence[str], method: str
) -> None:
    """Raises CombineError where the layers of one path are not of one shape, or cannot be written as one file."""
    problems = list(_nesting_problems(layers, names))
    for path in paths:
        here = [
            (found[path], name) for found, name in zip(layers, names, strict=True) if path in found
        ]
        (first, first_name), *others = here
        for layer, name in others:
            shapes = [
                (x.experts, x.A.shape[1:], (x.B.shape[0], *x.B.shape[2:])) for x in (first, layer)
            ]
            if shapes[0] != shapes[1] or first.embedding != layer.embedding:
                problems.append(
                    f"{path}: A {tuple(first.A.shape)} and B {tuple(first.B.shape)} in {first_name}, "
                    f"{tuple(layer.A.shape)} and {tuple(layer.B.shape)} in {name}."
                )
        biased = [name for layer, name in here if layer.bias is not None]
        if biased and not METHODS[method].is_sum:
            problems.append(
                f"{path}: {biased[0]} has a bias (lora_bias), which {method!r} does not mean anything for."
            )
    if problems:
        shown = problems[:8] + ([f"… and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CombineError("These adapters cannot be combined. " + listed(shown))


def tied_heads(
    adapters: Sequence[Adapter], layers: list[dict[str, AdapterLayer]]
) -> dict[str, str]:
    """The heads and embeddings whose adapters are an embedding's (ensure_weight_tying), with its path; heads have it transposed."""

    def same(other: str, path: str) -> bool:
        pairs = [(f[other], f[path]) for f in layers if path in f and other in f]
        return bool(pairs) and all(
            torch.equal(o.A, e.A) and torch.equal(o.B, e.B)
            if o.embedding
            else torch.equal(o.A, e.B.T) and torch.equal(o.B, e.A.T)
            for o, e in pairs
        )

    if not all(adapter.config.ensure_weight_tying for adapter in adapters):
        return {}
    every = {path: layer for found in layers for path, layer in found.items()}
    embeddings = [path for path, layer in every.items() if layer.embedding]
    leaders = {
        other: next((path for path in embeddings if path == other or same(other, path)), other)
        for other in every
    }
    return {other: path for other, path in leaders.items() if other != path}


def _nesting_problems(layers: list[dict[str, AdapterLayer]], names: Sequence[str]) -> Iterator[str]:
    """Modules whose parameters (target_parameters) the adapters' files nest in ways that do not say one order."""
    modules: dict[str, dict[str, list[AdapterLayer]]] = {}
    for found, name in zip(layers, names, strict=True):
        for layer in found.values():
            if layer.bare:
                modules.setdefault(layer.bare.module, {}).setdefault(name, []).append(layer)
    for module, by_name in modules.items():
        whole = [
            name
            for found, name in zip(layers, names, strict=True)
            if module in found and not found[module].bare
        ]
        if whole:
            yield f"{module}: adapted whole in {whole[0]}, by its parameters in {next(iter(by_name))}."
        sets = [
            {(row.bare.path, row.bare.among) for row in rows if row.bare}
            for rows in by_name.values()
        ]
        known = all(len(among) == 1 for found in sets for _, among in found)
        if (known and set.union(*sets) not in sets) or (
            not known and sets.count(sets[0]) < len(sets)
        ):
            yield (
                f"{module}: {' and '.join(by_name)} adapt different ones of its parameters (target_parameters), and "
                "files do not say in which order the module has those, which the keys of one for all depend on."
            )


def saved_tensors(
    adapters: Sequence[Adapter], names: Sequence[str], paths: list[str]
) -> dict[str, Tensor]:
    """What the adapters hold whole (modules_to_save, trained biases): taken over where there is one of it."""
    found: dict[str, tuple[Tensor, str]] = {}
    problems = []
    adapted = {f"{PREFIX}{path}{end}" for path in paths for end in ("", ".weight")}
    for adapter, name in zip(adapters, names, strict=True):
        for key, tensor in adapter.tensors.items():
            if LORA_KEY.fullmatch(key) or ".original_module." in key or ".modules_to_save." in key:
                continue
            if key in adapted:
                problems.append(f"{key}: saved whole in {name}, adapted in another.")
            elif key in found and not torch.equal(found[key][0], tensor):
                problems.append(
                    f"{key}: saved whole in {found[key][1]} and in {name}, and not the same."
                )
            else:
                found.setdefault(key, (tensor, name))
    if problems:
        raise CombineError(
            "Modules that are saved whole (modules_to_save, bias) are no changes that add up. "
            + listed(problems[:8])
        )
    return {key: tensor for key, (tensor, _) in found.items()}
