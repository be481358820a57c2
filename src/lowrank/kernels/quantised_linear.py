"""x·Wᵀ + b where W is quantised, the base product of QLoRA; and the same with an adapter in it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank.kernels.low_rank_add import low_rank_add_reference
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


def quantised_lora_reference(
    x: Tensor,
    packed: Packed,
    quantisation: Quantisation,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
) -> Tensor:
    """`quantised_linear` + scaling · x (*, in) · A (r, in)ᵀ · B (out, r)ᵀ, in plain steps."""
    y = quantised_linear_reference(x, packed, quantisation, len(B), bias)
    return low_rank_add_reference(y, F.linear(x, A), B, scaling)


def quantised_lora(
    x: Tensor,
    packed: Packed,
    quantisation: Quantisation,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
) -> Tensor:
    """The same with one pass less over y, and one less over the gradient of x: both are added to in place.

    Keeps x, x·Aᵀ and what is packed. All of x's dtype. benchmarks/quantised_step.py measures what it saves.
    """
    return _QuantisedLora.apply(x, bias, A, B, scaling, quantisation, *packed)


class _QuantisedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        quantisation: Quantisation,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        packed = Packed(codes, absmax, nested_absmax, offset)
        rows = x.reshape(-1, x.shape[-1])
        h = rows @ A.T
        ctx.save_for_backward(x, A, B, h, *packed)
        ctx.quantisation, ctx.scaling = quantisation, scaling
        y = quantised_linear_reference(rows, packed, quantisation, len(B), bias)
        return y.addmm_(h, B.T, alpha=scaling).view(*x.shape[:-1], len(B))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h, *held = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        to_h = (rows @ B) * ctx.scaling
        grad_x = grad_bias = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            shape = (len(B), A.shape[1])
            W = dequantise(Packed(*held), ctx.quantisation, shape, grad.dtype)
            grad_x = (rows @ W).addmm_(to_h, A).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_bias = rows.sum(0)
        if ctx.needs_input_grad[2]:
            grad_A = to_h.T @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[3]:
            grad_B = (rows.T @ h) * ctx.scaling
        return grad_x, grad_bias, grad_A, grad_B, *[None] * 6
