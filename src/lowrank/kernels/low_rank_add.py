"""y + scaling·h·Bᵀ, the last step of LoRA's forward on a linear layer."""

import torch
from torch import Tensor


def low_rank_add_reference(y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y (*, out) + scaling · h (*, r) · B (out, r)ᵀ, in plain steps."""
    return y + scaling * (h @ B.T)


def low_rank_add(y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The same in one matrix product that accumulates onto y: one pass over (*, out), and one rounding.

    All of y's dtype. Returns a new tensor. benchmarks/step.py measures what it saves.
    """
    out = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.T, alpha=scaling)
    return out.view(y.shape)
