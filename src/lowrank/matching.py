"""Which modules of a model the names in a configuration mean. Pure; also on the meta device."""

import re
from collections.abc import Iterator

from torch import nn

from lowrank.architectures import BYPASSED, DEFAULT_TARGETS
from lowrank.bases.kinds import is_quantised, is_transposed_linear, kind_of, kind_of_parameter
from lowrank.config import LoraConfig
from lowrank.errors import did_you_mean, nearest, some
from lowrank.layer import LoraLayer
from lowrank.log import logger
from lowrank.path_patterns import broken, fullmatch, is_or_ends
from lowrank.saved_module import ModulesToSaveWrapper
from lowrank.task_types import TASK_HEADS
from lowrank.tied_weights import tied_together
from lowrank.trainable_tokens import TrainableTokensWrapper
from lowrank.wrappers import inner

ALL_LINEAR = "all-linear"


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below `model` with its path, as if no adapter were there."""
    for name, child in model._modules.items():
        if child is None:
            continue
        module = inner(child)
        yield prefix + name, module
        yield from walk(module, f"{prefix}{name}.")


# --- matching -------------------------------------------------------------------------------------


def matched(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: LoraConfig,
    saved: list[str],
    problems: list[str],
) -> list[str]:
    """The paths of the modules and parameters that are targeted; adds what is wrong to `problems`."""
    candidates = _outside(modules, saved)
    names = config.target_modules
    if names is None:
        names = default_targets(model, config, saved)
    bare = list(config.target_parameters or [])
    if not names and not bare:
        problems.append(f"target_modules is empty. {_endings(modules)}")
        return []
    parameters = parameters_of(modules)
    bare_found = _parameters_by_name(modules, parameters, set(candidates), bare, problems)
    if not names:
        found = bare_found = _in_layers(bare_found, bare, config, problems)
    elif names == ALL_LINEAR:
        found = _all_linear(model, modules, candidates, config)
        if not found:
            problems.append(
                f'target_modules="all-linear": {type(model).__name__} has no linear layer. {_endings(modules)}'
            )
    elif isinstance(names, str):
        found = [path for path in candidates if fullmatch(names, path, "target_modules", problems)]
        if not found:
            problems.append(
                f"target_modules={names!r} is a regular expression that no whole path of {type(model).__name__} "
                f'matches. {_endings(modules)}\nPick from those as a list, or use target_modules="all-linear".'
            )
    else:
        found = _by_name(modules, candidates, names, problems)
        found = _in_layers(found + bare_found, [*names, *bare], config, problems)
        bare_found = [path for path in found if path in parameters]
    kept = _without_excluded(modules, [*dict.fromkeys(found + bare_found)], config, problems)
    place = {path: i for i, path in enumerate(modules)}
    return sorted(kept, key=lambda path: place[parameters[path][0] if path in parameters else path])


def parameters_of(modules: dict[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """For the path of every parameter that the modules hold themselves, the module's path and its name there."""
    return {
        f"{path}.{name}": (path, name)
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _parameters_by_name(
    modules: dict[str, nn.Module],
    parameters: dict[str, tuple[str, str]],
    candidates: set[str],
    names: list[str],
    problems: list[str],
) -> list[str]:
    """The paths of the parameters that target_parameters names."""
    for name in names:
        paths = [path for path in parameters if is_or_ends(path, name)]
        if any(parameters[path][0] in candidates for path in paths):
            continue
        if paths:
            problems.append(
                f"target_parameters: {name!r} is in modules_to_save; a parameter is either adapted or saved whole."
            )
            continue
        owner = next((path for path in modules if is_or_ends(path, name)), None)
        if owner is not None:
            own = ", ".join(modules[owner]._parameters) or "none of its own"
            problems.append(
                f"target_parameters: {name!r} is a module; its parameters: {own}. Modules go into target_modules."
            )
            continue
        problems.append(
            f"target_parameters: {name!r} matches no parameter{_near_parameters(modules, parameters, name)}"
        )
    return [
        path
        for path, (module, _) in parameters.items()
        if module in candidates and any(is_or_ends(path, name) for name in names)
    ]


def _near_parameters(
    modules: dict[str, nn.Module], parameters: dict[str, tuple[str, str]], name: str
) -> str:
    """What follows "matches no parameter": the nearest names of as many parts, or all that would do."""
    parts = name.count(".") + 1
    adaptable = {
        path: (module, own)
        for path, (module, own) in parameters.items()
        if kind_of_parameter(modules[module], own) is not None
    }
    close = nearest(name, {".".join(path.split(".")[-parts:]) for path in adaptable})
    if close:
        return f"; nearest: {', '.join(close)}"
    # the weights of modules that can be named themselves would drown the others
    bare = {
        f"{module.rpartition('.')[2]}.{own}"
        for module, own in adaptable.values()
        if own != "weight" or kind_of(modules[module]) is None
    }
    if not bare:
        return "; it has none that only target_parameters could name: use target_modules."
    return f"; those that can be adapted end in: {', '.join(sorted(bare))}."


def _by_name(
    modules: dict[str, nn.Module], candidates: list[str], names: list[str], problems: list[str]
) -> list[str]:
    unmatched = [name for name in names if not any(is_or_ends(path, name) for path in candidates)]
    endings = _adaptable_endings(modules)
    left_out = _left_out(modules, unmatched) if len(unmatched) < len(names) else []
    for name in unmatched:
        if any(is_or_ends(path, name) for path in modules):
            problems.append(
                f"target_modules: {name!r} is in modules_to_save too; a module is either adapted or saved whole."
            )
            continue
        if any(is_or_ends(path, name) for path in parameters_of(modules)):
            problems.append(
                f"target_modules: {name!r} is a parameter, no module; name it in target_parameters."
            )
            continue
        if name in left_out:
            logger.info("No module of this model has its optional layer %r.", name)
            continue
        close = nearest(name.rpartition(".")[2], endings)
        hint = f"nearest: {', '.join(close)}" if close else _endings(modules)
        problems.append(f"target_modules: {name!r} matches no module; {hint}")
    return [path for path in candidates if any(is_or_ends(path, name) for name in names)]


def _left_out(modules: dict[str, nn.Module], names: list[str]) -> list[str]:
    """Those of `names` that are optional layers which every module leaves out: attributes that are None.

    diffusers' attention has `add_k_proj` in some models only, and its training scripts name it for all.
    """
    return [
        name
        for name in names
        if any(getattr(module, name, module) is None for module in modules.values())
    ]


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
    wrong = [pattern for pattern in patterns if broken(pattern)]
    if wrong:
        problems.append(
            f"layers_pattern={wrong[0]!r} is not a regular expression: {broken(wrong[0])}."
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
    parameters = parameters_of(modules)
    every = [*modules, *parameters]
    if isinstance(exclude, str):
        excluded = {path for path in every if fullmatch(exclude, path, "exclude_modules", problems)}
        if not excluded:
            problems.append(
                f"exclude_modules={exclude!r} is a regular expression that no whole path matches."
            )
    else:
        excluded = {path for path in every if any(is_or_ends(path, name) for name in exclude)}
        endings = {path.rpartition(".")[2] for path in modules}
        for name in exclude:
            if not any(is_or_ends(path, name) for path in every):
                problems.append(
                    f"exclude_modules: {name!r} matches no module.{did_you_mean(name, endings)}"
                )
    kept = [
        path
        for path in found
        if path not in excluded and parameters.get(path, ("",))[0] not in excluded
    ]
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
        if _is_linear(modules[path]) and id(modules[path]) not in heads and path not in head_names
    ]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed_linear(module) or is_quantised(module)


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    return None if head is None else inner(head)


def default_targets(model: nn.Module, config: LoraConfig, saved: list[str]) -> list[str] | str:
    """The architecture's usual targets, as far as they are there; every linear layer where none are known."""
    modules = dict(walk(model))
    known = DEFAULT_TARGETS.get(_model_type(model), ())
    if isinstance(known, str):
        return known
    there = [name for name in known if any(is_or_ends(path, name) for path in modules)]
    if there or config.target_parameters:  # as PEFT, which then adapts the parameters alone
        return there
    linear = _all_linear(model, modules, _outside(modules, saved), config)
    return sorted(path for path in linear if not listed_under(BYPASSED, model, modules, path))


def _outside(modules: dict[str, nn.Module], saved: list[str]) -> list[str]:
    """The paths that are neither saved whole nor inside a module that is."""
    inside = tuple(f"{path}." for path in saved)
    whole = {id(modules[path]) for path in saved}
    return [
        path for path in modules if id(modules[path]) not in whole and not path.startswith(inside)
    ]


def _model_type(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "model_type", None) or ""


def listed_under(
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


def saved_paths(
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
    tied = tied_together(model, modules, config)
    if any(path in tied for path in found):  # one of them brings the others along
        found = [path for path in modules if path in found or path in tied]
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    for path in outermost:
        # with ensure_weight_tying those that it lends its weight to are saved with it
        reasons = [] if path in tied else why_never_called(model, path, modules[path])
        if type(modules[path]).forward is nn.Module.forward:  # ModuleList, ModuleDict
            reasons.append(f"{type(modules[path]).__name__} only holds others; name those in it.")
        problems += [f"modules_to_save: {path}: {reason}" for reason in reasons]
    adapted = {
        path
        for path in _adapted_paths(model)
        if any(path == s or path.startswith(f"{s}.") for s in outermost)
    }
    if adapted:
        problems.append(
            f"modules_to_save: {some(sorted(adapted))} already has an adapter; a module is either adapted or saved whole."
        )
    return outermost, problems


def inside_saved_modules(model: nn.Module) -> set[int]:
    """The ids of the modules that some adapter's copies replace."""
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    return {id(m) for wrapper in wrappers for m in wrapper.original_module.modules()}


def _adapted_paths(model: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in model.named_children():
        if isinstance(child, LoraLayer | TrainableTokensWrapper):
            yield prefix + name
        module = child if isinstance(child, ModulesToSaveWrapper) else inner(child)
        yield from _adapted_paths(module, f"{prefix}{name}.")


def why_never_called(model: nn.Module, path: str, module: nn.Module) -> list[str]:
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
