"""Putting adapters into a model and taking them out again, in place."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lowrank.bases.bitsandbytes_layers import keep_all_unpacked
from lowrank.errors import AdapterNameError
from lowrank.init import Init, taken_out
from lowrank.layer import LoraLayer
from lowrank.log import logger
from lowrank.routing import Routing
from lowrank.saved_module import ModulesToSaveWrapper
from lowrank.targets import Target
from lowrank.token_rows import TokenTarget
from lowrank.trainable_tokens import TrainableTokensWrapper
from lowrank.wrappers import Wrapper, adapter_names, base_biases, freeze_base, inner, wrappers


def inject(
    model: nn.Module,
    targets: list[Target],
    name: str,
    *,
    init: bool | str | Init = True,
    inits: Mapping[str, Init] | None = None,
    saved: Sequence[str] = (),
    tied: Sequence[str] = (),
    tokens: Sequence[TokenTarget] = (),
    bias: str = "none",
    cast_to_float32: bool = True,
    meta: bool = False,
    invocation: Sequence[int] | None = None,
) -> None:
    """Adds the adapter `name` to the targets of `model`, and freezes everything else.

    init: a value of `init_lora_weights`, or a function. inits: for the targets at these paths another function, with what it
    needs bound to it (the statistics of a layer, the factors of a file).
    saved: paths of modules trained and saved whole; tied: those of them whose copies share one weight.
    tokens: embeddings of which some rows are trained. bias: "none", "lora_only" or "all", the biases of the
    base that are trained. cast_to_float32: adapters in float32 on a bfloat16 or float16 base; else in the
    base's dtype. meta: adapter tensors on the meta device, to be loaded. invocation: the tokens from which on
    the adapter acts (activated LoRA); None: it acts everywhere.
    The adapter is not active yet. Raises AdapterNameError for an unusable name.
    """
    check_name(model, name)
    freeze_base(model)
    keep_all_unpacked(model)
    references = _references(model)
    routing = next((module.routing for _, module in wrappers(model)), Routing())
    if invocation is not None:
        routing.invocations[name] = tuple(invocation)
    for path in saved:
        make_saved = partial(ModulesToSaveWrapper, routing=routing)
        place = _find(model, path)
        wrapper: Any = (
            place
            if isinstance(place, ModulesToSaveWrapper)
            else _wrap(references, place, make_saved)
        )
        wrapper.add_adapter(name)
    copies: list[Any] = [_find(model, path).modules_to_save[name] for path in tied]
    for follower in copies[1:]:
        follower.weight = copies[0].weight
    for i, target in enumerate(targets):
        if not callable(init) and taken_out(init) and target.path not in (inits or {}):
            logger.info("%s: %d of %d, %s", init, i + 1, len(targets), target.path)
        place = _find(model, target.module_path)
        make_layer = partial(LoraLayer, kind=target.kind, routing=routing)
        layer: Any = _layer_of(place, target.kind.weight) or _wrap(references, place, make_layer)
        if target.tied_to is not None:
            continue
        layer.add_adapter(
            name,
            r=target.r,
            lora_alpha=target.lora_alpha,
            scaling=target.scaling,
            dropout=target.dropout,
            use_dora="dora" in target.method,
            lora_bias=target.lora_bias,
            init=(inits or {}).get(target.path, init),
            dtype=_dtype(layer.kind.store(layer.get_base_layer()).dtype, cast_to_float32),
            meta=meta,
        )
    for target in targets:
        if target.tied_to is not None:
            _find(model, target.path).tie_adapter(
                name,
                _find(model, target.tied_to),
                lora_alpha=target.lora_alpha,
                scaling=target.scaling,
                dropout=target.dropout,
            )
    for rows in tokens:
        make_rows = partial(TrainableTokensWrapper, kind=rows.kind, routing=routing)
        leader = _rows_at(references, _find(model, rows.path), make_rows)
        leader.add_adapter(
            name, rows.indices, _dtype(leader.unmerged_weight().dtype, cast_to_float32)
        )
        for path, kind in rows.tied.items():
            make = partial(TrainableTokensWrapper, kind=kind, routing=routing, leader=leader)
            _rows_at(references, _find(model, path), make)
    for parameter in base_biases(model, bias).values():
        parameter.requires_grad_(True)


def _dtype(dtype: torch.dtype, cast_to_float32: bool) -> torch.dtype | None:
    """float32 beside a 16-bit weight, if so wished, and always beside an 8-bit one; None: the weight's own."""
    low = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if (cast_to_float32 and low) or dtype.itemsize < 2 else None


def check_name(model: nn.Module, name: str) -> None:
    """Raises AdapterNameError if `name` cannot name a new adapter of `model`."""
    if (
        not name
        or "." in name
        or "/" in name
        or name.startswith("__")
        or hasattr(nn.ModuleDict(), name)
        or hasattr(nn.ParameterDict(), name)
    ):
        raise AdapterNameError(
            f"{name!r} cannot name an adapter: it becomes part of parameter names, so it must not be empty, "
            'contain "." or "/", begin with "__", or be an attribute of torch.nn.ModuleDict or ParameterDict.'
        )
    if name in adapter_names(model):
        raise AdapterNameError(
            f"There already is an adapter named {name!r}: delete_adapter({name!r}) first, or choose another name."
        )


def eject(
    model: nn.Module,
    copies_of: Sequence[str] | None = None,
    keep: Collection[nn.Module] = (),
) -> None:
    """Takes every wrapper out but those in `keep`. Base layers stay as they are now (merged or not).

    copies_of: the adapters whose copies of saved modules stay in the place of the originals; None: those
    that run now.
    """
    references = _references(model)
    for _, module in list(wrappers(model)):
        if module in keep:
            continue
        left: Any = module
        if isinstance(module, LoraLayer):
            while isinstance(left, LoraLayer) and left not in keep:
                left = left.base_layer
        else:
            left = module.without(copies_of)
        for parent, attribute in references[id(module)]:
            setattr(parent, attribute, left)


def _wrap(
    references: dict[int, list[tuple[nn.Module, str]]], place: nn.Module, make: Callable
) -> Wrapper:
    """A new wrapper around `place`, put under every name that `place` has."""
    wrapper = make(place)
    for parent, attribute in references[id(place)]:
        setattr(parent, attribute, wrapper)
    references[id(wrapper)] = references.pop(id(place))
    return wrapper


def _rows_at(
    references: dict[int, list[tuple[nn.Module, str]]], place: nn.Module, make: Callable
) -> Any:
    """The wrapper that trains rows of what is at `place`, a new one if need be."""
    return place if isinstance(place, TrainableTokensWrapper) else _wrap(references, place, make)


def _layer_of(place: nn.Module, weight: str) -> LoraLayer | None:
    """The layer at `place` that adapts this parameter of the module, if there is one."""
    chain = place.chain() if isinstance(place, LoraLayer) else []
    return next((layer for layer in chain if layer.kind.weight == weight), None)


def _find(model: nn.Module, path: str) -> Any:
    """What is at `path`, a path as if no adapter were there."""
    module = model
    for attribute in path.split("."):
        module = inner(module)._modules[attribute]  # type: ignore[assignment]
    return module


def _references(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For the id of each module, every (parent, attribute) that holds it."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, module in parent._modules.items():
            found.setdefault(id(module), []).append((parent, attribute))
    return found
