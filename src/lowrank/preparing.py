"""A base made ready for training: its dtypes, and gradients through checkpointed blocks."""

import torch
from torch import nn

from lowrank.wrappers import base_biases, freeze_base, lora_layers


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict | None = None,
) -> nn.Module:
    """Freezes the base, puts its 16-bit parameters into float32, and turns gradient checkpointing on.

    An adapter that is already there stays as trainable as it is, so that this and `get_peft_model` may
    come in either order; its copies of whole modules and its biases get the base's new dtype.
    """
    biases = [
        parameter
        for config in getattr(model, "peft_config", {}).values()
        for parameter in base_biases(model, config.bias).values()
        if parameter.requires_grad
    ]
    freeze_base(model)
    for parameter in biases:
        parameter.requires_grad_(True)
    factors = {
        id(parameter)
        for _, layer in lora_layers(model)
        for name in layer.r
        for parameter in layer.adapter_parameters(name).values()
    }
    for parameter in model.parameters():
        if id(parameter) not in factors and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if use_gradient_checkpointing:
        let_gradients_in(model)
        # transformers 5.23 renamed the method and its argument; the old names warn
        word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(model, f"{word}_checkpointing_enable")
        enable(**{f"{word}_checkpointing_kwargs": gradient_checkpointing_kwargs or {}})
    return model


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether activation (gradient) checkpointing is on in a transformers model."""
    new = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if new is None else new)


def let_gradients_in(model: nn.Module) -> None:
    """With checkpointing and a frozen base, the first block's input must require a gradient to pass any back."""
    enable = getattr(model, "enable_input_require_grads", None)
    if enable is not None:
        enable()
