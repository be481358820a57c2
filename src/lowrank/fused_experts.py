"""Adapters that were made when each expert was a module of its own, on models that hold all of them in one tensor.

transformers 5 fuses `experts.0.w1`, `experts.0.w3`, … into one parameter `experts.gate_up_proj`. What was
stacked from what is read from transformers' own table of weight conversions. Several matrices of one
expert that now stand on top of each other, W = [W₁; W₃], keep their adapters exactly, at the sum of their
ranks: A = [A₁; A₃], and B with B₁ and B₃ on its diagonal.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.bases.kinds import EXPERTS
from lowrank.config import LoraConfig
from lowrank.errors import AdapterMismatchError, TargetError, listed
from lowrank.lora import scaling_for
from lowrank.matching import ALL_LINEAR, parameters_of, walk
from lowrank.path_patterns import is_or_ends, key_matches, pattern_value

PREFIX = "base_model.model."


class Fusion(NamedTuple):
    """One parameter and what it was fused from."""

    parameter: str  # the end of its path, "experts.gate_up_proj"
    # as transformers writes them, ".experts.*.w1.weight", …, in the order in which they stand in it
    sources: tuple[str, ...]

    conversion: Any  # transformers' own object

    @property
    def names(self) -> list[str]:
        """What the modules were called within an expert: w1, w3."""
        return [source.split("*.")[-1].removesuffix(".weight") for source in self.sources]


def fusions(conversions: Sequence[Any] | None) -> list[Fusion]:
    """Those of transformers' weight conversions that stack experts, as they are, into one parameter."""
    found = []
    for conversion in conversions or ():
        operations = [type(op).__name__ for op in getattr(conversion, "operations", ())]
        along = [getattr(op, "dim", None) for op in getattr(conversion, "operations", ())]
        stacked = operations[:1] == ["MergeModulelist"] and along[0] == 0
        joined = operations[1:] == ["Concatenate"] and along[1] == 1
        sources = tuple(conversion.source_patterns)
        modules = all(s.count("*.") == 1 and s.endswith(".weight") for s in sources)
        single = len(sources) == 1 and len(operations) == 1
        if stacked and modules and (joined or single) and len(conversion.target_patterns) == 1:
            found.append(Fusion(conversion.target_patterns[0].lstrip("."), sources, conversion))
    return found


def fused_factors(
    A: Sequence[Sequence[Tensor]], B: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor]:
    """A (r·experts, in) and B (out, r·experts) in PEFT's order, from those of each matrix and expert.

    A[i][e] (rᵢ, in), B[i][e] (outᵢ, rᵢ): of expert e the i-th of the matrices that now stand on top of each
    other. r = Σ rᵢ, out = Σ outᵢ. Scaling is as before if it is the same for all.
    """
    return _fused_A(A), _fused_B(B)


def _fused_A(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(each) for each in zip(*parts, strict=True)])


def _fused_B(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    stacked = torch.stack([torch.block_diag(*each) for each in zip(*parts, strict=True)])
    return EXPERTS.B_saved(stacked).reshape(stacked.shape[1], -1).contiguous()


# --- what the configuration means -----------------------------------------------------------------


def for_fused_experts(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """`config` with the modules of single experts among its target_modules as target_parameters; else as it is.

    Names that other modules have too (a shared expert's up_proj) stay. Raises TargetError where only some of
    the matrices of one parameter are named, or where their ranks or alphas differ in a way that none of its
    own can express.
    """
    names = config.target_modules
    if not names or names == ALL_LINEAR:
        return config
    known = fusions(conversions_of(model))
    if not known:
        return config
    modules = dict(walk(model))
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    own_ranks: dict[str, int] = {}
    own_alphas: dict[str, float] = {}
    targets: dict[str, None] = {}
    consumed: set[str] = set()
    problems: dict[str, None] = {}
    for path, (module, _) in parameters_of(modules).items():
        fusion = next((f for f in known if is_or_ends(path, f.parameter)), None)
        if fusion is None:
            continue
        places = [f"{module}.0.{name}" for name in fusion.names]
        chosen = [place for place in places if _names_it(names, place)]
        if not chosen:
            continue
        if len(chosen) < len(places):
            wanted = [n for n, p in zip(fusion.names, places, strict=True) if p not in chosen]
            problems[
                f"target_modules: {fusion.parameter} holds {' and '.join(fusion.names)} of all experts in one; name "
                f"{' and '.join(wanted)} too, or the paths of the modules that you mean."
            ] = None
            continue
        rank = [pattern_value(ranks, place, config.r) for place in places]
        alpha = [pattern_value(alphas, place, config.lora_alpha) for place in places]
        scaling = {scaling_for(a, r, config.use_rslora) for a, r in zip(alpha, rank, strict=True)}
        if len(scaling) > 1:
            problems[f"{path}: {' and '.join(fusion.names)} have different scalings."] = None
            continue
        targets[fusion.parameter] = None
        consumed.update(name for name in _listed(names) if any(is_or_ends(p, name) for p in places))
        r = sum(rank)
        per_alpha = scaling_for(1.0, r, config.use_rslora)
        own_ranks[path], own_alphas[path] = r, scaling.pop() / per_alpha
    if problems:
        raise TargetError(listed(list(problems)))
    if not targets:
        return config
    everything = [*modules, *parameters_of(modules)]
    gone = {name for name in consumed if not any(is_or_ends(path, name) for path in modules)}
    left = [name for name in _listed(names) if name not in gone]
    return replace(
        config,
        target_modules=names if isinstance(names, str) and _matches_any(names, modules) else left,
        target_parameters=list(dict.fromkeys([*(config.target_parameters or []), *targets])),
        rank_pattern=_pattern(own_ranks, config.r) | _used(ranks, everything),
        alpha_pattern=_pattern(own_alphas, config.lora_alpha) | _used(alphas, everything),
    )


def _listed(names: list[str] | str) -> list[str]:
    return [] if isinstance(names, str) else list(names)


def _names_it(names: list[str] | str, path: str) -> bool:
    if isinstance(names, str):
        try:
            return re.fullmatch(names, path) is not None
        except re.error:  # which plan tells
            return False
    return any(is_or_ends(path, name) for name in names)


def _matches_any(pattern: str, modules: Mapping[str, nn.Module]) -> bool:
    return any(_names_it(pattern, path) for path in modules)


def _used(pattern: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """The entries that still match something."""
    return {k: v for k, v in pattern.items() if any(key_matches(k, path) for path in paths)}


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A pattern for the parameters: by their last two names where all of those have one value, else by path."""
    by_ending: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_ending.setdefault(_ending(path), set()).add(value)
    found = {}
    for path, value in values.items():
        one = len(by_ending[_ending(path)]) == 1
        found[re.escape(_ending(path)) if one else "^" + re.escape(path)] = value
    return {key: value for key, value in found.items() if value != default}


def _ending(path: str) -> str:
    return ".".join(path.split(".")[-2:])


# --- the tensors ----------------------------------------------------------------------------------


def for_fused_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors, by PEFT's keys, with those of single experts put together; else as they are.

    Raises AdapterMismatchError if experts or factors are missing.
    """
    conversions = conversions_of(model)
    known = fusions(conversions)
    renamings = [c for c in conversions if not hasattr(c, "operations")]
    expert = re.compile(r"(.+)\.(\d+)\.([^.]+)\.lora_([AB])\.weight")
    rest: dict[str, Tensor] = {}
    # by module: by name within the expert, by factor, by expert
    found: dict[str, dict[str, dict[str, dict[int, Tensor]]]] = {}
    for key, tensor in tensors.items():
        renamed = key.removeprefix(PREFIX)
        for renaming in renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        match = expert.fullmatch(renamed)
        if match and any(
            match[3] in f.names and is_or_ends(f"{match[1]}.{_last(f)}", f.parameter) for f in known
        ):
            by_factor = found.setdefault(match[1], {}).setdefault(match[3], {})
            by_factor.setdefault(match[4], {})[int(match[2])] = tensor
        else:
            rest[PREFIX + renamed if ".lora_" in key else key] = tensor
    if not found:
        return tensors
    for module, names in found.items():
        here = [f for f in known if set(f.names) & names.keys() and _fits(f, module)]
        for depth, fusion in enumerate(reversed(here)):
            parts = _complete(module, fusion, names)
            A, B = fused_factors(parts["A"], parts["B"])
            place = f"{PREFIX}{module}{'.base_layer' * depth}"
            rest |= {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}
    return rest


def _last(fusion: Fusion) -> str:
    return fusion.parameter.rpartition(".")[2]


def _fits(fusion: Fusion, module: str) -> bool:
    return is_or_ends(f"{module}.{_last(fusion)}", fusion.parameter)


def _complete(
    module: str, fusion: Fusion, names: Mapping[str, Mapping[str, Mapping[int, Tensor]]]
) -> dict[str, list[list[Tensor]]]:
    count = 1 + max(e for factors in names.values() for of in factors.values() for e in of)
    lacking = [
        f"{module}.{e}.{name}.lora_{factor}"
        for name in fusion.names
        for factor in "AB"
        for e in range(count)
        if e not in names.get(name, {}).get(factor, {})
    ]
    if lacking:
        raise AdapterMismatchError(
            f"{module}.{_last(fusion)} holds {' and '.join(fusion.names)} of all experts in one, and the adapter "
            f"lacks {len(lacking)} of their tensors: {', '.join(lacking[:3])}."
        )
    return {
        factor: [[names[name][factor][e] for e in range(count)] for name in fusion.names]
        for factor in "AB"
    }


# --- transformers' seam ---------------------------------------------------------------------------


def conversions_of(model: nn.Module) -> list[Any]:
    """transformers' table of how a checkpoint's weights become this model's; empty for other models."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4, where experts are modules
        return []
    return get_model_conversion_mapping(model)


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """What `model.load_adapter` of transformers does to the keys and tensors of an adapter's file.

    The model's own renamings; "base_model.model." off and the adapter's name in; the factors of single
    experts put together, where peft_config names such (as in the file, before `for_fused_experts`).
    """
    from transformers.core_model_loading import WeightRenaming

    conversions = list(weight_conversions or [])
    mapping: list[Any] = [
        WeightRenaming(PREFIX, ""),
        WeightRenaming(r"(lora_(?:embedding_)?[AB])", rf"\1.{adapter_name}"),
        # its parameter ends in .weight, its key in a file does not
        WeightRenaming(r"(lora_magnitude_vector)$", rf"\1.{adapter_name}.weight"),
        *[c for c in conversions if not hasattr(c, "operations")],
    ]
    known = fusions(conversions)
    for i, fusion in enumerate(known):
        module = fusion.parameter.rpartition(".")[0]
        after = [f for f in known[i + 1 :] if f.parameter.rpartition(".")[0] == module]
        depth = sum(_targeted(f, peft_config) for f in after)
        target = fusion.conversion.target_patterns[0]
        place = target.rpartition(".")[0] + ".base_layer" * depth
        for factor, operation in (("A", _fused_A), ("B", _fused_B)):
            mapping.append(
                fusion.conversion.copy(
                    source_patterns=[
                        f"{source.removesuffix('.weight')}.lora_{factor}.*"
                        for source in fusion.sources
                    ],
                    target_patterns=f"{place}.lora_{factor}.{adapter_name}.weight",
                    operations=[_operation(operation)],
                )
            )
    return mapping


def _targeted(fusion: Fusion, config: Any) -> bool:
    """Whether the configuration of a file names the fusion's modules."""
    names = getattr(config, "target_modules", None)
    if names is None:
        return True
    module = fusion.parameter.rpartition(".")[0]
    # a regular expression is made for whole paths, of which only the end is known here
    return isinstance(names, str) or any(
        _names_it(list(names), f"{module}.0.{name}") for name in fusion.names
    )


def _operation(fuse: Any) -> Any:
    from transformers.core_model_loading import ConversionOps

    class Fuse(ConversionOps):
        def convert(
            self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
        ) -> Any:
            parts = [input_dict[pattern] for pattern in source_patterns]
            with torch.no_grad():
                return {target_patterns[0]: fuse(parts)}

    return Fuse()
