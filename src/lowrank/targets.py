"""`plan(model, config)`: which layers get an adapter, and of what kind. Pure; also on the meta device."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from lowrank.architectures import BYPASSED, WEIGHT_TAKEN
from lowrank.bases.kinds import EMBEDDING, Kind, kind_of
from lowrank.config import TASK_HEADS, LoraConfig
from lowrank.errors import TargetError, listed
from lowrank.init import taken_out
from lowrank.lora import scaling_for
from lowrank.matching import (
    ALL_LINEAR,
    default_targets,
    inside_saved_modules,
    listed_under,
    matched,
    pattern_problems,
    pattern_value,
    saved_paths,
    some,
    walk,
    why_never_called,
)

ADAPTER_BYTES = 4  # float32, the default dtype of adapters


@dataclass(frozen=True)
class Target:
    """One layer that gets an adapter."""

    path: str
    kind: Kind
    out: int
    in_: int
    r: int
    lora_alpha: float
    scaling: float
    dropout: float
    method: str  # "lora" | "rslora" | "dora" | "rslora+dora"
    lora_bias: bool
    params: int
    bytes: int  # of its parameters in float32


def plan(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The layers of `model` that `config` adapts, in the model's order.

    Sees through adapters that are already there. Raises TargetError once, with everything that does not
    fit: names that match nothing, layers that cannot carry what is asked, indices beyond the model.
    """
    modules = dict(walk(model))
    problems = config.problems()
    saved, saved_problems = saved_paths(model, modules, config)
    problems += saved_problems
    wanted = matched(model, modules, config, saved, problems)
    kept_whole = inside_saved_modules(model)
    targets: dict[int, Target] = {}
    refused: dict[str, list[str]] = {}
    for path in wanted:
        module = modules[path]
        if id(module) in targets:  # the same module under a second name
            continue
        if id(module) in kept_whole:
            reason = "saved whole by another adapter (modules_to_save); a module is either adapted or saved whole."
            refused.setdefault(reason, []).append(path)
            continue
        target, why_not = _target(model, modules, path, config)
        for reason in why_not:
            refused.setdefault(reason, []).append(path)
        if target:
            targets[id(module)] = target
    problems += [f"{some(paths)}: {reason}" for reason, paths in refused.items()]
    problems += pattern_problems(config, wanted)
    if problems:
        raise TargetError(listed(problems))
    return list(targets.values())


def saved_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """The paths of the modules that `config.modules_to_save` names, outermost first.

    Includes the head that a classification or question-answering task trains whole. Raises TargetError for
    names that match nothing.
    """
    paths, problems = saved_paths(model, dict(walk(model)), config)
    if problems:
        raise TargetError(listed(problems))
    return paths


def resolved(
    model: nn.Module, config: LoraConfig, targets: list[Target], saved: list[str]
) -> LoraConfig:
    """`config` with target_modules and modules_to_save as names that select the same modules anywhere."""
    names = config.target_modules
    if names is None:
        names = default_targets(model, config, saved)
    elif names == ALL_LINEAR:
        paths = {target.path for target in targets}
        names = sorted({path.rpartition(".")[2] for path in paths})
        others = replace(config, target_modules=names)
        if set(matched(model, dict(walk(model)), others, saved, [])) != paths:
            names = sorted(paths)
    named = config.modules_to_save or []
    heads = [path for path in saved if path.endswith(TASK_HEADS.get(config.task_type or "", ()))]
    modules_to_save = [*named, *[path for path in heads if not path.endswith(tuple(named))]]
    return replace(config, target_modules=names, modules_to_save=modules_to_save or None)


# --- what a layer can carry -----------------------------------------------------------------------


def _target(
    model: nn.Module, modules: dict[str, nn.Module], path: str, config: LoraConfig
) -> tuple[Target | None, list[str]]:
    module = modules[path]
    parent = modules.get(path.rpartition(".")[0], model)
    kind = kind_of(module, config.fan_in_fan_out, parent)
    if kind is None:
        return None, [_why_no_kind(module)]
    taken = listed_under(WEIGHT_TAKEN, model, modules, path)
    if taken:
        kind = kind._replace(weight_taken=True)
    r = pattern_value(config.rank_pattern, path, config.r)
    lora_alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
    out, in_ = kind.shape(module)
    reasons = [reason for applies, reason in _REFUSALS if applies(kind, module, config, r)]
    bypassed = listed_under(BYPASSED, model, modules, path)
    if bypassed:
        reasons.append(
            f"{bypassed} passes this layer's weight to a fused kernel and never calls the layer; leave it out."
        )
    if taken and config.lora_dropout > 0:
        reasons.append(
            f"{taken} computes with this layer's weight, where there is no input to drop from: set lora_dropout=0, or leave it out."
        )
    reasons += why_never_called(model, path, module)
    if isinstance(r, int) and r < 1:
        return None, reasons
    params = r * (in_ + out) + (out if config.use_dora else 0) + (out if config.lora_bias else 0)
    method = "+".join(
        name for name, used in [("rslora", config.use_rslora), ("dora", config.use_dora)] if used
    )
    target = Target(
        path=path,
        kind=kind,
        out=out,
        in_=in_,
        r=r,
        lora_alpha=lora_alpha,
        scaling=scaling_for(lora_alpha, r, config.use_rslora),
        dropout=config.lora_dropout,
        method=method or "lora",
        lora_bias=config.lora_bias,
        params=params,
        bytes=params * ADAPTER_BYTES,
    )
    return target, reasons


# What a layer cannot do: (kind, module, config, r) -> bool, and the reason that is shown.
_REFUSALS: list[tuple[Callable[[Kind, nn.Module, LoraConfig, int], bool], str]] = [
    (
        lambda kind, module, config, r: kind.op is None and config.lora_dropout > 0,
        "adapted through its weight, which has no input to drop from: set lora_dropout=0, or leave it out.",
    ),
    (
        lambda kind, module, config, r: kind.layout is EMBEDDING and config.lora_bias,
        "an embedding has no bias: set lora_bias=False, or leave it out.",
    ),
    (
        lambda kind, module, config, r: (
            kind.op is None and config.lora_bias and getattr(module, kind.bias, None) is None
        ),
        "adapted through its weight and has no bias for lora_bias to act on.",
    ),
    (
        lambda kind, module, config, r: (
            config.lora_bias
            and getattr(module, kind.bias, None) is not None
            and getattr(module, kind.bias).shape != kind.shape(module)[:1]
        ),
        "lora_bias has an entry for each row of the weight, and this layer's bias is of another shape: set lora_bias=False, or leave it out.",
    ),
    (
        lambda kind, module, config, r: config.init_lora_weights == "orthogonal" and r % 2 == 1,
        'init_lora_weights="orthogonal" needs an even r.',
    ),
    (
        lambda kind, module, config, r: (
            taken_out(config.init_lora_weights) and r > min(kind.shape(module))
        ),
        "init_lora_weights takes r directions out of the weight, which has fewer: lower r for it (rank_pattern), or leave it out.",
    ),
]


def _why_no_kind(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return "its query, key and value have different widths and separate weights; adapt its out_proj, or leave it out."
    weight = module._parameters.get("weight")
    if weight is None:
        inner = [child for child, _ in module.named_children()]
        what = f"; target a layer inside it ({', '.join(inner[:6])})" if inner else ""
        return f"{name} has no weight of its own{what}."
    if weight.ndim < 2:
        return f"{name} has a vector as its weight; train it whole with modules_to_save."
    return f"{name} holds its weight as {weight.dtype}, which this version cannot adapt."
