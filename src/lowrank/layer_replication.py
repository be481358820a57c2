"""`layer_replication`: a deeper model out of the layers of a shallower one, which share their weights."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from lowrank.errors import TargetError

Ranges = Sequence[Sequence[int]]


class Original(NamedTuple):
    """What `restore` puts back."""

    layers: nn.ModuleList
    ranges: list[list[int]]
    settings: list[tuple[Any, dict[str, Any]]]  # (a configuration, its values before)


def replicate(model: nn.Module, ranges: Ranges) -> None:
    """Puts the layers `ranges` [[start, end), …] in the place of the model's own, in place.

    Every layer becomes a module of its own, with the weights of the one it was made from: no memory is
    taken. Their layer_idx and the configuration's number of layers (and its lists with an entry for each
    layer) follow, so that each has its own place in the key-value cache. Nothing is done if the model
    is stacked this way already. Raises TargetError if the layers cannot be told, an index is no layer, or
    the model is stacked otherwise.
    """
    wanted = [list(pair) for pair in ranges]
    present = original_of(model)
    if present is not None:
        if present.ranges != wanted:
            raise TargetError(
                f"layer_replication={wanted}, and this model's layers are stacked as {present.ranges} by another adapter. "
                "Adapters of one model share its layers: load this one onto a base of its own."
            )
        return
    path = layers_path(model)
    layers: Any = model.get_submodule(path)
    beyond = [pair for pair in wanted if not 0 <= pair[0] < pair[1] <= len(layers)]
    if beyond:
        raise TargetError(
            f"layer_replication: {beyond} are not within the {len(layers)} layers of {path}; a pair is [start, end), with "
            f"0 <= start < end <= {len(layers)}."
        )
    chosen = [i for start, end in wanted for i in range(start, end)]
    copies = nn.ModuleList(_sharing(layers[i]) for i in chosen)
    for index, layer in enumerate(copies):
        for module in layer.modules():
            for name in ("layer_idx", "layer_id"):
                if type(getattr(module, name, None)) is int:
                    setattr(module, name, index)
    settings = []
    for config in _configs(model, len(layers)):
        changed = _settings(config, len(layers), chosen)
        settings.append((config, {name: config.__dict__[name] for name in changed}))
        config.__dict__.update(changed)
    copies.train(layers.training)
    copies._original = Original(layers, wanted, settings)  # type: ignore[assignment]
    _replace(model, layers, copies)


@contextmanager
def stacked(model: nn.Module, ranges: Ranges | None) -> Iterator[None]:
    """Inside, the model is as `replicate` makes it; afterwards as it was."""
    fresh = bool(ranges) and original_of(model) is None
    if ranges:
        replicate(model, ranges)
    try:
        yield
    finally:
        if fresh:
            restore(model)


def restore(model: nn.Module) -> None:
    """Takes `replicate` back: the original layers, and what the configuration said of them."""
    for stack in list(model.modules()):
        original = stack.__dict__.get("_original")
        if not isinstance(original, Original):
            continue
        reference = next(stack.parameters(), None)
        if reference is not None:  # layers that were left out have not been moved with the others
            original.layers.to(reference.device)
        original.layers.train(stack.training)
        for config, before in original.settings:
            config.__dict__.update(before)
        _replace(model, stack, original.layers)


def keep(model: nn.Module) -> None:
    """Makes the stack the model's own for good: no two layers share a tensor, as files want it."""
    for stack in model.modules():
        if not isinstance(stack.__dict__.get("_original"), Original):
            continue
        seen: set[int] = set()
        for module in stack.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in seen:
                    module._parameters[name] = nn.Parameter(
                        parameter.detach().clone(), requires_grad=parameter.requires_grad
                    )
                seen.add(id(parameter))
        del stack._original


def original_of(model: nn.Module) -> Original | None:
    """How the model's layers were stacked, if they were."""
    found = (module.__dict__.get("_original") for module in model.modules())
    return next((original for original in found if isinstance(original, Original)), None)


def layers_path(model: nn.Module) -> str:
    """The path of the model's one list of layers. Raises TargetError if there are several, or none."""
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    outermost = [p for p in lists if not any(p.startswith(f"{other}.") for other in lists)]
    counted = [p for p in outermost if _configs(model, len(lists[p]))]
    candidates = counted or ([] if hasattr(model, "config") else outermost)
    if len(candidates) != 1:
        what = f"several lists of layers ({', '.join(candidates)})" if candidates else "no list"
        raise TargetError(
            f"layer_replication: {type(model).__name__} has {what} of as many layers as its configuration says; a stack "
            "of copies needs a model with exactly one, as decoders and encoders have."
        )
    return candidates[0]


def _sharing(layer: nn.Module) -> nn.Module:
    """A copy of the layer that has its parameters and buffers, and refers to the same configuration."""
    shared = [*layer.parameters(), *layer.buffers()]
    shared += [
        config for m in layer.modules() if (config := getattr(m, "config", None)) is not None
    ]
    return copy.deepcopy(layer, {id(value): value for value in shared})


def _configs(model: nn.Module, layers: int) -> list[Any]:
    """The configurations within the model that say it has this many layers."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if _count_name(config) and getattr(config, _count_name(config)) == layers:
            found[id(config)] = config
    return list(found.values())


def _count_name(config: Any) -> str:
    """What a configuration calls the number of its layers: `n_layer` in GPT-2's."""
    name = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    return name if name in getattr(config, "__dict__", {}) else ""


def _settings(config: Any, layers: int, chosen: list[int]) -> dict[str, Any]:
    """The configuration's new values: the number of layers, and its lists with an entry for each."""
    found: dict[str, Any] = {_count_name(config): len(chosen)}
    for name, value in config.__dict__.items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == layers:
            found[name] = type(value)(value[i] for i in chosen)
    return found


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, name, new)
