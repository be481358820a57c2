"""LoRA+: B is learnt at a higher rate than A."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowrank.errors import ConfigError, NotTrainableError
from lowrank.wrappers import lora_layers

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimiser that learns B at `loraplus_lr_ratio` times `lr` (Hayou et al. 2024, §4: η_B = λ·η_A).

    Its four groups, also where one is empty: A and other matrices at lr; A and B of embeddings at
    loraplus_lr_embedding; B and vectors (DoRA's magnitudes) at lr · ratio; biases and norms at lr · ratio
    without weight decay. kwargs go to `optimizer_cls`; an 8-bit one of bitsandbytes keeps its state for
    embeddings in 32 bits. Raises ConfigError for rates that are no positive numbers, NotTrainableError if
    no LoRA factor of the model is trainable.
    """
    rates = {
        "lr": lr,
        "loraplus_lr_ratio": loraplus_lr_ratio,
        "loraplus_lr_embedding": loraplus_lr_embedding,
    }
    wrong = [f"{name}={rate!r}" for name, rate in rates.items() if not 0 < rate < math.inf]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: a learning rate, or a ratio of two, is above 0.")
    groups = _groups(model)
    settings = {
        "A": (lr, loraplus_weight_decay),
        "embedding": (loraplus_lr_embedding, loraplus_weight_decay),
        "B": (lr * loraplus_lr_ratio, loraplus_weight_decay),
        "no decay": (lr * loraplus_lr_ratio, 0.0),
    }
    optimizer = optimizer_cls(
        [
            {"params": groups[name], "lr": rate, "weight_decay": decay}
            for name, (rate, decay) in settings.items()
        ],
        lr=lr,
        **kwargs,
    )
    if type(optimizer).__name__ in _EIGHT_BIT or kwargs.get("optim_bits") == 8:
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by LoRA+'s groups, each in the model's order."""
    factors = {
        id(parameter): key.split(".")[0]
        for _, layer in lora_layers(model)
        for name in layer.r
        for key, parameter in layer.adapter_parameters(name).items()
    }
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "no decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = factors.get(id(parameter), "")
        if factor.startswith("lora_embedding"):
            group = "embedding"
        elif factor == "lora_B" or parameter.ndim == 1:
            plain = name.endswith("bias") or id(parameter) in norms
            group = "no decay" if plain else "B"
        else:
            group = "A"
        groups[group].append(parameter)
    if not any(id(parameter) in factors for group in groups.values() for parameter in group):
        raise NotTrainableError(
            "create_loraplus_optimizer: no LoRA factor in this model is trainable. Make the adapter first "
            "(get_peft_model), or load it with is_trainable=True."
        )
    return groups
