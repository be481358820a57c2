"""dropout(x)·Aᵀ, the first step of LoRA's forward in training."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout_linear_reference(x: Tensor, A: Tensor, p: float) -> Tensor:
    """dropout(x) (*, in) · A (r, in)ᵀ, in plain steps, which keep dropout(x) and its mask for backward."""
    return F.linear(F.dropout(x, p), A)


def dropout_linear(x: Tensor, A: Tensor, p: float) -> Tensor:
    """The same numbers from the same random state, keeping only the mask, a byte for each entry of x.

    x itself is kept too, but once for all the layers that take it (q, k and v; gate and up), where each
    would keep a dropout(x) of its own. benchmarks/step.py --dropout counts the bytes.
    """
    if torch.compiler.is_compiling():  # the compiler chooses what to keep, and fuses the mask
        return dropout_linear_reference(x, A, p)
    device = x.device.type
    if torch.is_autocast_enabled(device):  # as F.linear would; backward runs outside of autocast
        dtype = torch.get_autocast_dtype(device)
        x, A = x.to(dtype), A.to(dtype)
    return _DropoutLinear.apply(x, A, p)


class _DropoutLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, p: float) -> Tensor:
        dropped, mask = torch.native_dropout(x, p, True)
        ctx.save_for_backward(x, A, mask)
        ctx.scale = 1 / (1 - p)
        return F.linear(dropped, A)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, A, mask = ctx.saved_tensors
        grad = grad * ctx.scale  # on the small (*, r): the mask below then only selects
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        grad_x = grad_A = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.where(mask, grad @ A, zero)
        if ctx.needs_input_grad[1]:
            dropped = torch.where(mask, x, zero).reshape(-1, x.shape[-1])
            grad_A = grad.reshape(-1, grad.shape[-1]).T @ dropped
        return grad_x, grad_A, None
