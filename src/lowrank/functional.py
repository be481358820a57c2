"""Acting on the adapters of any model that carries some, without a PeftModel around it.

transformers and diffusers inject adapters into their own models and then call these, under PEFT's names.
"""

import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lowrank.bases.kinds import packed_sizes
from lowrank.errors import AdapterNameError, MergeError, TargetError, did_you_mean
from lowrank.layer import LoraLayer
from lowrank.log import logger
from lowrank.saved_module import AuxiliaryTrainingWrapper
from lowrank.unload import unmerge_all
from lowrank.wrappers import Wrapper, adapter_names, lora_layers, mergeable, wrappers


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type[nn.Module] = nn.Module,
) -> None:
    """Makes these adapters, and no others, act and (without `inference_mode`) trainable.

    layer_cls: only in layers of this class. A merge is undone first, with a warning in the log. Raises
    AdapterNameError for an unknown name.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else [*dict.fromkeys(adapter_name)]
    check_known(names, adapter_names(model))
    for path, module in wrappers(model):
        why = module.conflict(names) if isinstance(module, AuxiliaryTrainingWrapper) else ""
        if why:  # before anything is switched
            raise AdapterNameError(f"{path}: {why}")
    if any(layer.merged for _, layer in mergeable(model)):
        logger.warning("set_adapter(%r) undoes the merge that was in place.", adapter_name)
        unmerge_all(model)
    for module in _of_class(model, layer_cls):
        module.set_adapter(names, inference_mode=inference_mode)


def delete_adapter(
    model: nn.Module,
    adapter_name: str,
    prefix: str = "lora_",
    layer_cls: type[nn.Module] = nn.Module,
) -> list[str] | None:
    """Removes the adapter's tensors; its entry in `model.peft_config`, if any, stays.

    If it was the only active one, the first that is left becomes active, and as trainable as it was. Returns the names of the adapters that are active now, or None. Raises MergeError if it is merged, AdapterNameError
    if it quantised the base (LoftQ) and others stand on that.
    """
    del prefix  # "lora_", the only one there is
    for _, layer in mergeable(model):
        if adapter_name in layer.merged_adapters:
            raise MergeError(
                f"Adapter {adapter_name!r} is merged: unmerge_adapter() first, then delete it."
            )
    others = [name for name in adapter_names(model) if name != adapter_name]
    if others and any(layer.quantised_by == adapter_name for _, layer in lora_layers(model)):
        raise AdapterNameError(
            f"Adapter {adapter_name!r} quantised the base (LoftQ), and {others} stand on the quantised weights: "
            "delete those first, or load them onto the original base."
        )
    modules = _of_class(model, layer_cls)
    before = {name for module in modules for name in module.active_adapters}
    trained = any(
        parameter.requires_grad
        for module in modules
        if adapter_name in module.adapters
        for parameter in module.adapter_parameters(adapter_name).values()
    )
    active: dict[str, None] = {}
    for module in modules:
        module.delete_adapter(adapter_name)
        active.update(dict.fromkeys(module.active_adapters))
    if before == {adapter_name} and others:
        set_adapter(model, others[0], inference_mode=not trained, layer_cls=layer_cls)
        return others[:1]
    return list(active) or None


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Makes the parameters of these adapters trainable, or frozen."""
    for _, module in wrappers(model):
        module.set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(
    model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True
) -> None:
    """Puts the adapter's tensors of 16 bits or fewer into float32, in place."""
    for _, layer in lora_layers(model):
        if autocast_adapter_dtype and adapter_name in layer.r:
            for parameter in layer.adapter_parameters(adapter_name).values():
                if parameter.dtype.itemsize < 4:
                    parameter.data = parameter.data.float()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters in `dtype`, trainable ones in float32: for mixed-precision training.

    Weights in few bits stay as they are.
    """
    packed = packed_sizes(model)
    for parameter in model.parameters():
        if id(parameter) in packed:
            continue
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside, every adapter's ΔW is `multiplier` times what it was; merged weights are not touched.

    Between 0 and 1: the straight line from the base to the adapted model (WiSE-FT, Wortsman et al. 2022).
    Raises TypeError if it is no number, TargetError if the model has no adapters.
    """
    if not isinstance(multiplier, int | float):
        raise TypeError(f"multiplier={multiplier!r} must be a number.")
    before = [(layer, dict(layer.scaling)) for _, layer in lora_layers(model)]
    if not before:
        raise TargetError(f"{type(model).__name__} has no adapters to rescale.")
    try:
        for layer, scaling in before:
            layer.scaling = {name: value * multiplier for name, value in scaling.items()}
        yield
    finally:
        for layer, scaling in before:
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Nothing to disable: our layers cast A and B to the input's dtype, and never the input."""
    yield


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, name within the parent) of the module at the path `key`."""
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), model.get_submodule(key), name


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable:
    """FSDP's wrapping policy for a frozen base: each transformer block, and each trainable leaf, by itself.

    The blocks are the classes in FSDP_TRANSFORMER_CLS_TO_WRAP (accelerate sets it), or in the model's
    `_no_split_modules`. Raises TargetError for a class that is nowhere in the model.
    """
    from torch.distributed.fsdp import wrap

    listed = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = listed.split(",") if listed else list(getattr(model, "_no_split_modules", None) or [])
    classes = {type(module).__name__: type(module) for module in model.modules()}
    missing = [name for name in names if name and name not in classes]
    if missing:
        raise TargetError(
            f"FSDP is to wrap {missing}, and the model has no module of that class."
            + did_you_mean(missing[0], classes)
        )
    blocks = functools.partial(
        wrap.transformer_auto_wrap_policy,
        transformer_layer_cls={classes[name] for name in names if name},
    )
    leaves = functools.partial(wrap.lambda_auto_wrap_policy, lambda_fn=_is_trainable_leaf)
    return functools.partial(wrap._or_policy, policies=[leaves, blocks])


def _is_trainable_leaf(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.requires_grad and not any(module.children())


def _of_class(model: nn.Module, layer_cls: type[nn.Module]) -> list[Wrapper]:
    """The wrappers of that class; saved whole modules belong to every class of layer."""
    return [
        module
        for _, module in wrappers(model)
        if isinstance(module, layer_cls) or not isinstance(module, LoraLayer)
    ]


def check_known(names: Sequence[str], known: Collection[str]) -> None:
    """Raises AdapterNameError for the first of `names` that is not in `known`."""
    for name in names:
        if name not in known:
            raise AdapterNameError(
                f"There is no adapter named {name!r}; there are: {', '.join(known) or 'none'}."
                + did_you_mean(name, known)
            )
