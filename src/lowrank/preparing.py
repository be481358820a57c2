"""A base made ready for training: its dtypes, and gradients through checkpointed blocks."""

import torch
from torch import nn

from lowrank.bases.kinds import quantisation_of
from lowrank.wrappers import base_biases, freeze_base, lora_layers

# PEFT's list, and AWQ
KEPT_IN_16_BITS = {"aqlm", "awq", "eetq", "gptq", "hqq", "torchao"}


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freezes the base, puts its 16-bit parameters into float32, and turns gradient checkpointing on.

    Norms and embeddings are what is left in 16 bits of a quantised base; packed weights and their scales stay as
    they are, and so does everything where the back end's kernels want 16-bit inputs (KEPT_IN_16_BITS), as in PEFT.
    An adapter that is already there stays as trainable as it is, so that this and `get_peft_model` may
    come in either order; its copies of whole modules and its biases get the base's new dtype.
    auto_clear_cache: give back to the device what the 16-bit parameters took.
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
    if not _backends(model) & KEPT_IN_16_BITS:
        for parameter in model.parameters():
            if id(parameter) not in factors and _in_16_bits(parameter):
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if use_gradient_checkpointing:
        let_gradients_in(model)
        # transformers 5.23 renamed the method and its argument; the old names warn
        word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(model, f"{word}_checkpointing_enable")
        enable(**{f"{word}_checkpointing_kwargs": gradient_checkpointing_kwargs or {}})
    return model


def _backends(model: nn.Module) -> set[str]:
    """Who holds the model's quantised weights."""
    named = getattr(model, "quantization_method", None)
    found = {one.backend for one in map(quantisation_of, model.modules()) if one is not None}
    return found | {str(getattr(named, "value", named))}


def _in_16_bits(parameter: nn.Parameter) -> bool:
    """A packed one may say so too (bitsandbytes' quant_storage), and is of its library's class."""
    plain = type(parameter).__module__.split(".")[0] == "torch"
    return plain and parameter.dtype in (torch.float16, torch.bfloat16)


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether activation (gradient) checkpointing is on in a transformers model."""
    new = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if new is None else new)


def let_gradients_in(model: nn.Module) -> None:
    """With checkpointing and a frozen base, the first block's input must require a gradient to pass any back."""
    enable = getattr(model, "enable_input_require_grads", None)
    if enable is not None:
        enable()
