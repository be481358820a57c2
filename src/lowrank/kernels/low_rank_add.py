"""y + scaling·h·Bᵀ, the last step of LoRA's forward on a linear layer, and W + B·A where the weight is formed."""

from functools import cache

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


def low_rank_weight_reference(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W (*expert, out, in) + B (*expert, out, r) · A (*expert, r, in), in plain steps."""
    return W + B.to(W.dtype) @ A.to(W.dtype)


def low_rank_weight(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The same in one product that accumulates onto W, and one rounding to W's dtype.

    Whatever autocast says, and in W's order in memory: products with a transposed weight are as fast as
    before. A and B may be of another dtype. A matrix is summed in float32 at least. Fused experts, all of
    which one forward forms, are not copied to float32: their A and B are rounded to W's dtype instead.
    """
    if W.mT.is_contiguous() and not W.is_contiguous():
        return low_rank_weight(W.mT, B.mT, A.mT).mT
    dtype = W.dtype if W.ndim == 3 else torch.promote_types(W.dtype, torch.float32)
    product = torch.baddbmm if W.ndim == 3 else torch.addmm
    with torch.autocast(W.device.type, enabled=False):
        return product(W.to(dtype), B.to(dtype), A.to(dtype)).to(W.dtype)


@cache
def adds_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices so fast that `low_rank_add_bfloat16_` pays (AMX)."""
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16")) and torch.backends.mkldnn.is_available()


def bfloat16_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A′ (3r, in) and B′ (out, 3r) in bfloat16 whose product is that of A (r, in) and B (out, r) in float32.

    Each number is taken as the sum of two in bfloat16, and the product of the two small ones is left out: what is
    lost is at most 2⁻¹⁶ of |B|·|A|, and a bfloat16 sum is rounded to 2⁻⁹ of itself.
    """
    A1, A2 = _in_two(A)
    B1, B2 = _in_two(B)
    return torch.cat([A1, A2, A1]), torch.cat([B1, B1, B2], dim=1)


def low_rank_add_bfloat16_(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W (out, in) in bfloat16 itself, with B·A added: in float32, and rounded once.

    A, B: as `bfloat16_factors` gives them. One pass over W instead of three. benchmarks/merge.py measures it.
    """
    return W.addmm_(B, A)


def _in_two(x: Tensor) -> tuple[Tensor, Tensor]:
    first = x.to(torch.bfloat16)
    return first, (x - first).to(torch.bfloat16)
