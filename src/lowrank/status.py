"""What state a model's adapters are in, layer by layer and as a whole; PEFT's names and fields."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lowrank.bases.kinds import count_parameters
from lowrank.layer import LoraLayer
from lowrank.wrappers import Wrapper, wrappers

Irregular = Literal["irregular"]
IRREGULAR: Irregular = "irregular"


@dataclass
class TunerLayerStatus:
    """One layer. "irregular": some of the adapter's parameters are trainable and some are not."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """A whole model. "irregular": its layers do not agree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every layer with adapters, in the model's order; `model` may be a PeftModel or any other."""
    inside = model.base_model if _is_peft_model(model) else model
    return [_layer_status(name, module) for name, module in wrappers(inside)]  # type: ignore[arg-type]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of the model's adapters as a whole; `model` may be a PeftModel or any other."""
    layers = get_layer_status(model)
    wrapped = _is_peft_model(model)
    base = model.get_base_model() if wrapped else model  # type: ignore[operator]
    configs: Any = model.peft_config if wrapped else {}
    available = sorted({name for layer in layers for name in layer.available_adapters})
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any(
        set(layer.available_adapters) & set(merged) != set(layer.merged_adapters)
        for layer in layers
    )
    trainable, everything = count_parameters(model)
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(model.base_model).__name__ if wrapped else "None",
        peft_types={name: config.peft_type.value for name, config in configs.items()},
        trainable_params=trainable,
        total_params=everything,
        num_adapter_layers=len(layers),
        enabled=_common((layer.enabled for layer in layers), none=True),
        active_adapters=_common((layer.active_adapters for layer in layers), none=[]),
        merged_adapters=IRREGULAR if partly else merged,
        requires_grad={
            name: _common(
                (layer.requires_grad[name] for layer in layers if name in layer.requires_grad),
                none=False,
            )
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, [])})
            for name in available
        },
        quantization_backend=_common((layer.quantization_backend for layer in layers), none=None),
    )


def _layer_status(name: str, module: Wrapper) -> TunerLayerStatus:
    available = sorted(module.adapters)
    module_type = type(module).__name__
    if isinstance(module, LoraLayer):
        module_type = f"lora.{type(module.base_layer).__name__}"
    parameters = {a: list(module.adapter_parameters(a).values()) for a in available}
    return TunerLayerStatus(
        name=name,
        module_type=module_type,
        enabled=not module.disable_adapters,
        active_adapters=module.active_adapters,
        merged_adapters=list(getattr(module, "merged_adapters", [])),
        requires_grad={
            a: _common((p.requires_grad for p in found), none=False)
            for a, found in parameters.items()
        },
        available_adapters=available,
        devices={a: sorted({p.device.type for p in found}) for a, found in parameters.items()},
    )


def _common(values: Iterable[Any], none: Any) -> Any:
    """What all values are, "irregular" if they differ, `none` if there are none."""
    found = list(values)
    if not found:
        return none
    return found[0] if all(value == found[0] for value in found) else IRREGULAR


def _is_peft_model(model: nn.Module) -> bool:
    """By its parts: PeftModel itself stands on a higher floor."""
    return hasattr(model, "peft_config") and hasattr(type(model), "get_base_model")
