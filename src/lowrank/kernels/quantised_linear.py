"""x·Wᵀ + b where W is quantised: the base product of QLoRA."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank.kernels.quantisation import Packed, dequantise
from lowrank.quantisation import Quantisation


def quantised_linear_reference(
    x: Tensor, packed: Packed, quantisation: Quantisation, out: int, bias: Tensor | None
) -> Tensor:
    """x (*, in) · Wᵀ + bias (out,), in plain steps, which keep W for backward."""
    W = dequantise(packed, quantisation, (out, x.shape[-1]), x.dtype)
    return F.linear(x, W, bias)


def quantised_linear(
    x: Tensor, packed: Packed, quantisation: Quantisation, out: int, bias: Tensor | None
) -> Tensor:
    """The same, keeping only what is packed: backward dequantises W again. All of x's dtype.

    x itself is not kept, as W gets no gradient.
    """
    if not torch.is_grad_enabled():
        return quantised_linear_reference(x, packed, quantisation, out, bias)
    return _QuantisedLinear.apply(x, bias, quantisation, out, *packed)


class _QuantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        quantisation: Quantisation,
        out: int,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        packed = Packed(codes, absmax, nested_absmax, offset)
        ctx.save_for_backward(*packed)
        ctx.quantisation, ctx.shape = quantisation, (out, x.shape[-1])
        return quantised_linear_reference(x, packed, quantisation, out, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            packed = Packed(*ctx.saved_tensors)
            grad_x = grad @ dequantise(packed, ctx.quantisation, ctx.shape, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_bias, *[None] * 6
