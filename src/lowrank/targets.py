"""`plan(model, config)`: which layers get an adapter, and of what kind. Pure; also on the meta device."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from lowrank.architectures import BYPASSED, DEFAULT_TARGETS, WEIGHT_TAKEN
from lowrank.bases.kinds import EMBEDDING, Kind, is_transposed_linear, kind_of
from lowrank.config import TASK_HEADS, LoraConfig
from lowrank.errors import TargetError, did_you_mean, listed, nearest
from lowrank.layer import LoraLayer
from lowrank.lora import scaling_for
from lowrank.saved_module import ModulesToSaveWrapper

ALL_LINEAR = "all-linear"
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
    saved, saved_problems = _saved_paths(model, modules, config)
    problems += saved_problems
    wanted = _matched(model, modules, config, saved, problems)
    kept_whole = _inside_saved_modules(model)
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
    problems += [f"{_some(paths)}: {reason}" for reason, paths in refused.items()]
    problems += _pattern_problems(config, wanted)
    if problems:
        raise TargetError(listed(problems))
    return list(targets.values())


def saved_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """The paths of the modules that `config.modules_to_save` names, outermost first.

    Includes the head that a classification or question-answering task trains whole. Raises TargetError for
    names that match nothing.
    """
    paths, problems = _saved_paths(model, dict(walk(model)), config)
    if problems:
        raise TargetError(listed(problems))
    return paths


def resolved(
    model: nn.Module, config: LoraConfig, targets: list[Target], saved: list[str]
) -> LoraConfig:
    """`config` with target_modules and modules_to_save as names that select the same modules anywhere."""
    names = config.target_modules
    if names is None:
        names = _default_targets(model, config, saved)
    elif names == ALL_LINEAR:
        paths = {target.path for target in targets}
        names = sorted({path.rpartition(".")[2] for path in paths})
        others = replace(config, target_modules=names)
        if set(_matched(model, dict(walk(model)), others, saved, [])) != paths:
            names = sorted(paths)
    named = config.modules_to_save or []
    heads = [path for path in saved if path.endswith(TASK_HEADS.get(config.task_type or "", ()))]
    modules_to_save = [*named, *[path for path in heads if not path.endswith(tuple(named))]]
    return replace(config, target_modules=names, modules_to_save=modules_to_save or None)


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below `model` with its path, as if no adapter were there."""
    for name, child in model._modules.items():
        if child is None:
            continue
        module = child.base_layer if isinstance(child, LoraLayer) else child
        if isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        yield prefix + name, module
        yield from walk(module, f"{prefix}{name}.")


# --- matching -------------------------------------------------------------------------------------


def _matched(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: LoraConfig,
    saved: list[str],
    problems: list[str],
) -> list[str]:
    """The paths that are targeted; adds what is wrong to `problems`."""
    candidates = _outside(modules, saved)
    names = config.target_modules
    if names is None:
        names = _default_targets(model, config, saved)
    if not names:
        problems.append(f"target_modules is empty. {_endings(modules)}")
        return []
    if names == ALL_LINEAR:
        found = _all_linear(model, modules, candidates, config)
        if not found:
            problems.append(
                f'target_modules="all-linear": {type(model).__name__} has no linear layer. {_endings(modules)}'
            )
    elif isinstance(names, str):
        found = [path for path in candidates if _fullmatch(names, path, "target_modules", problems)]
        if not found:
            problems.append(
                f"target_modules={names!r} is a regular expression that no whole path of {type(model).__name__} "
                f'matches. {_endings(modules)}\nPick from those as a list, or use target_modules="all-linear".'
            )
    else:
        found = _in_layers(_by_name(modules, candidates, names, problems), names, config, problems)
    return _without_excluded(modules, found, config, problems)


def _by_name(
    modules: dict[str, nn.Module], candidates: list[str], names: list[str], problems: list[str]
) -> list[str]:
    unmatched = [name for name in names if not any(_is_or_ends(path, name) for path in candidates)]
    endings = _adaptable_endings(modules)
    for name in unmatched:
        if any(_is_or_ends(path, name) for path in modules):
            problems.append(
                f"target_modules: {name!r} is in modules_to_save too; a module is either adapted or saved whole."
            )
            continue
        close = nearest(name.rpartition(".")[2], endings)
        hint = f"nearest: {', '.join(close)}" if close else _endings(modules)
        problems.append(f"target_modules: {name!r} matches no module; {hint}")
    return [path for path in candidates if any(_is_or_ends(path, name) for name in names)]


def _in_layers(
    found: list[str], names: list[str], config: LoraConfig, problems: list[str]
) -> list[str]:
    """Those of `found` in the layers that layers_to_transform names; a path given whole is always in."""
    if config.layers_to_transform is None or config.layers_to_transform == []:
        return found
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    broken = [pattern for pattern in patterns if _broken(pattern)]
    if broken:
        problems.append(
            f"layers_pattern={broken[0]!r} is not a regular expression: {_broken(broken[0])}."
        )
        return []
    index = {path: _layer_index(path, patterns) for path in found}
    present = sorted({i for i in index.values() if i is not None})
    if not present and found:
        where = f" after {' or '.join(patterns)}" if patterns else ""
        problems.append(
            f"layers_to_transform={wanted}: the targeted modules have no layer number{where} in their paths."
        )
        return []
    beyond = [i for i in wanted if i not in present]
    if beyond and found:
        problems.append(
            f"layers_to_transform: {beyond} are not layers of this model; it has {present[0]} to {present[-1]}."
        )
    return [path for path in found if path in names or index[path] in wanted]


def _layer_index(path: str, patterns: list[str]) -> int | None:
    for pattern in patterns or [r"[^.]*"]:
        match = re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", path)
        if match:
            return int(match[1])
    match = None if patterns else re.match(r"(\d+)\.", path)
    return int(match[1]) if match else None


def _without_excluded(
    modules: dict[str, nn.Module], found: list[str], config: LoraConfig, problems: list[str]
) -> list[str]:
    exclude = config.exclude_modules
    if not exclude:
        return found
    if isinstance(exclude, str):
        excluded = {
            path for path in modules if _fullmatch(exclude, path, "exclude_modules", problems)
        }
        if not excluded:
            problems.append(
                f"exclude_modules={exclude!r} is a regular expression that no whole path matches."
            )
    else:
        excluded = {path for path in modules if any(_is_or_ends(path, name) for name in exclude)}
        endings = {path.rpartition(".")[2] for path in modules}
        for name in exclude:
            if not any(_is_or_ends(path, name) for path in modules):
                problems.append(
                    f"exclude_modules: {name!r} matches no module.{did_you_mean(name, endings)}"
                )
    kept = [path for path in found if path not in excluded]
    if found and not kept:
        problems.append("exclude_modules leaves nothing of what target_modules matched.")
    return kept


def _all_linear(
    model: nn.Module, modules: dict[str, nn.Module], candidates: list[str], config: LoraConfig
) -> list[str]:
    """The linear layers, without the output head."""
    heads = {id(head) for head in [_output_head(model)] if head is not None}
    head_names = TASK_HEADS.get(config.task_type or "", ())
    return [
        path
        for path in candidates
        if (isinstance(modules[path], nn.Linear) or is_transposed_linear(modules[path]))
        and id(modules[path]) not in heads
        and path not in head_names
    ]


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    if isinstance(head, ModulesToSaveWrapper):
        return head.original_module
    return head.base_layer if isinstance(head, LoraLayer) else head


def _default_targets(model: nn.Module, config: LoraConfig, saved: list[str]) -> list[str] | str:
    """The architecture's usual targets, as far as they are there; every linear layer where none are known."""
    modules = dict(walk(model))
    known = DEFAULT_TARGETS.get(_model_type(model), ())
    if isinstance(known, str):
        return known
    there = [name for name in known if any(_is_or_ends(path, name) for path in modules)]
    if there:
        return there
    linear = _all_linear(model, modules, _outside(modules, saved), config)
    return sorted(path for path in linear if not _listed_under(BYPASSED, model, modules, path))


def _outside(modules: dict[str, nn.Module], saved: list[str]) -> list[str]:
    """The paths that are neither saved whole nor inside a module that is."""
    inside = tuple(f"{path}." for path in saved)
    whole = {id(modules[path]) for path in saved}
    return [
        path for path in modules if id(modules[path]) not in whole and not path.startswith(inside)
    ]


def _model_type(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "model_type", None) or ""


def _listed_under(
    table: dict[str, tuple[str, ...]], model: nn.Module, modules: dict[str, nn.Module], path: str
) -> str:
    """The model_type under which `table` lists the layer, or an empty text.

    It is that of the nearest module around the layer that has one: in a composite model each part has its own.
    """
    around, _, ending = path.rpartition(".")
    while around and not _model_type(modules[around]):
        around = around.rpartition(".")[0]
    model_type = _model_type(modules[around] if around else model)
    return model_type if ending in table.get(model_type, ()) else ""


def _saved_paths(
    model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig
) -> tuple[list[str], list[str]]:
    heads = TASK_HEADS.get(config.task_type or "", ())
    named = [name for name in config.modules_to_save or [] if name not in heads]
    problems = []
    endings = {path.rpartition(".")[2] for path in modules}
    for name in named:
        if not any(path.endswith(name) for path in modules):
            problems.append(
                f"modules_to_save: {name!r} matches no module.{did_you_mean(name.rpartition('.')[2], endings)}"
            )
    # as PEFT, by the last letters and not the last names: "norm" is every path that ends in norm
    found = [path for path in modules if path.endswith((*named, *heads))]
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    for path in outermost:
        reasons = _why_never_called(model, path, modules[path])
        if type(modules[path]).forward is nn.Module.forward:  # ModuleList, ModuleDict
            reasons.append(f"{type(modules[path]).__name__} only holds others; name those in it.")
        problems += [f"modules_to_save: {path}: {reason}" for reason in reasons]
    adapted = {
        path
        for path, module in _lora_paths(model)
        if any(path == s or path.startswith(f"{s}.") for s in outermost)
    }
    if adapted:
        problems.append(
            f"modules_to_save: {_some(sorted(adapted))} already has an adapter; a module is either adapted or saved whole."
        )
    return outermost, problems


def _inside_saved_modules(model: nn.Module) -> set[int]:
    """The ids of the modules that some adapter's copies replace."""
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    return {id(m) for wrapper in wrappers for m in wrapper.original_module.modules()}


def _lora_paths(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, LoraLayer]]:
    for name, child in model.named_children():
        if isinstance(child, LoraLayer):
            yield prefix + name, child
            child = child.base_layer
        yield from _lora_paths(child, f"{prefix}{name}.")


# --- what a layer can carry -----------------------------------------------------------------------


def _target(
    model: nn.Module, modules: dict[str, nn.Module], path: str, config: LoraConfig
) -> tuple[Target | None, list[str]]:
    module = modules[path]
    parent = modules.get(path.rpartition(".")[0], model)
    kind = kind_of(module, config.fan_in_fan_out, parent)
    if kind is None:
        return None, [_why_no_kind(module)]
    taken = _listed_under(WEIGHT_TAKEN, model, modules, path)
    if taken:
        kind = kind._replace(weight_taken=True)
    r = pattern_value(config.rank_pattern, path, config.r)
    lora_alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
    out, in_ = kind.shape(module)
    reasons = [reason for applies, reason in _REFUSALS if applies(kind, module, config, r)]
    bypassed = _listed_under(BYPASSED, model, modules, path)
    if bypassed:
        reasons.append(
            f"{bypassed} passes this layer's weight to a fused kernel and never calls the layer; leave it out."
        )
    if taken and config.lora_dropout > 0:
        reasons.append(
            f"{taken} computes with this layer's weight, where there is no input to drop from: set lora_dropout=0, or leave it out."
        )
    reasons += _why_never_called(model, path, module)
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
]


def _why_never_called(model: nn.Module, path: str, module: nn.Module) -> list[str]:
    """Encoder-decoders tie the embeddings of both halves to one, `shared`, that no forward calls."""
    if path.rpartition(".")[2] != "shared" or not isinstance(module, nn.Embedding):
        return []
    weight = module._parameters["weight"]
    runs = [
        other
        for other, m in walk(model)
        if m is not module and isinstance(m, nn.Embedding) and m._parameters["weight"] is weight
    ]
    text = f"the model never calls it, it only lends its weight to {', '.join(runs)}; name those."
    return [text] if runs else []


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


# --- names ----------------------------------------------------------------------------------------


def _is_or_ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _broken(pattern: str) -> str:
    """Why `pattern` is not a regular expression, or an empty text."""
    try:
        re.compile(f"({pattern})")
    except re.error as error:
        return str(error)
    return ""


def _fullmatch(pattern: str, path: str, what: str, problems: list[str]) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        text = f"{what}={pattern!r} is not a regular expression: {error}. For a module's name, pass a list: [{pattern!r}]."
        if text not in problems:
            problems.append(text)
        return False


def pattern_value(pattern: dict, path: str, default):
    """The value of the first key that is the path, a suffix of it, or a regular expression for one."""
    return next((value for key, value in pattern.items() if _key_matches(key, path)), default)


def _key_matches(key: str, path: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({key})$", path) is not None
    except re.error:  # which _pattern_problems tells
        return False


def _pattern_problems(config: LoraConfig, wanted: list[str]) -> list[str]:
    problems = []
    for what in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, what):
            broken = _broken(key)
            if broken:
                problems.append(f"{what}: {key!r} is not a regular expression: {broken}.")
            elif wanted and not any(_key_matches(key, path) for path in wanted):
                endings = {path.rpartition(".")[2] for path in wanted}
                problems.append(
                    f"{what}: {key!r} matches none of the targeted modules.{did_you_mean(key, endings)}"
                )
    return problems


def _adaptable_endings(modules: dict[str, nn.Module]) -> set[str]:
    return {
        path.rpartition(".")[2] for path, module in modules.items() if kind_of(module) is not None
    }


def _endings(modules: dict[str, nn.Module]) -> str:
    endings = sorted(e for e in _adaptable_endings(modules) if not e.isdigit())
    return (
        f"Its layers that can be adapted end in: {', '.join(endings)}."
        if endings
        else "It has no layer that can be adapted."
    )


def _some(paths: list[str]) -> str:
    rest = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + rest
