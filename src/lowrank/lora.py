"""The mathematics of one adapter at one weight. Tensors in, tensors out; no module, file or config.

Notation: W (out, in) is the pretrained weight, A (r, in) and B (out, r) the adapter's factors. A
leading `*expert` dimension, where there is one, runs over the experts of a fused layer.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import ShapeError

_TINY = torch.finfo(torch.float32).tiny  # a row of zeros has no direction: DoRA leaves it zero


class Lora(NamedTuple):
    """One adapter at one weight, in matrix form."""

    A: Tensor  # (*expert, r, in)
    B: Tensor  # (*expert, out, r)
    scaling: float | Tensor  # a tensor () where compiled code is to follow its changes
    magnitude: Tensor | None = None  # (*expert, out)  DoRA
    bias: Tensor | None = None  # (out,)  lora_bias
    by_column: bool = False  # the magnitude is (in,), of W's columns: a head tied to an embedding


def scaling_for(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """`lora_alpha / r` (Hu et al. 2021, §4.1), or `lora_alpha / √r` (rsLoRA: Kalajdzievski 2023, eq. 4)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def delta_weight(lora: Lora) -> Tensor:
    """ΔW = scaling·B·A, (*expert, out, in), in the factors' dtype but at least float32."""
    dtype = _accumulation_dtype(lora.A)
    return (lora.B.to(dtype) @ lora.A.to(dtype)) * lora.scaling


def merged_weight(W: Tensor, *loras: Lora) -> Tensor:
    """The weight that, alone, acts as `W` with `loras` on top.

    W: (*expert, out, in), any float dtype. Returns a new tensor of W's shape and dtype.
    LoRA: W + ΔW (Hu et al. 2021, §4.1). DoRA: m ⊙ V / ‖V‖ by row, V = W + ΔW (Liu et al. 2024, eq. 5);
    the norm is a constant for the gradient (ibid., §4.3).
    The sum is taken in float32 (float64 for a float64 W), of one expert at a time; rounding to W's dtype is
    the only loss. Raises ShapeError if one of `loras` was made for another shape.
    """
    if W.ndim > 2 and loras:
        for lora in loras:
            check_shapes(W.shape, lora)
        return torch.stack(
            [merged_weight(W[e], *(of_expert(lora, e) for lora in loras)) for e in range(len(W))]
        )
    return unrounded_merged_weight(W, *loras).to(W.dtype)


def unrounded_merged_weight(W: Tensor, *loras: Lora) -> Tensor:
    """`merged_weight` in float32 (float64 for a float64 W), before it is rounded. Any rows of W, with theirs of B."""
    dtype = _accumulation_dtype(W)
    if len(loras) == 1:
        return add_change_(W.to(dtype, copy=True), loras[0])
    return sum((weight_change(W, lora) for lora in loras), W.to(dtype))


def without(W: Tensor, lora: Lora) -> Tensor:
    """W (out, in) − ΔW, in W's dtype but at least float32, and the same on every machine but for one entry in 10⁸ or so.

    Summed in float64 and rounded once, so that what is quantised from it can be quantised again elsewhere.
    """
    delta = delta_weight(
        lora._replace(A=lora.A.to(W.device).double(), B=lora.B.to(W.device).double())
    )
    return (W.double() - delta).to(_accumulation_dtype(W))


def merged_bias(bias: Tensor, *loras: Lora) -> Tensor | None:
    """`bias` (out,) with the adapters' own, summed in float32, in bias's dtype; None if they have none."""
    changes = [lora.bias * lora.scaling for lora in loras if lora.bias is not None]
    if not changes:
        return None
    return sum(changes, bias.to(_accumulation_dtype(bias))).to(bias.dtype)


def add_change_(W: Tensor, lora: Lora) -> Tensor:
    """`W` itself, (out, in) in float32 or float64, with what `lora` changes added in place."""
    if lora.magnitude is None:
        check_shapes(W.shape, lora)
        return W.addmm_(lora.B.to(W.dtype) * lora.scaling, lora.A.to(W.dtype))
    return W.add_(weight_change(W, lora))


def of_expert(lora: Lora, e: int) -> Lora:
    """The adapter of one expert among those of `lora`."""
    magnitude = None if lora.magnitude is None else lora.magnitude[e]
    return lora._replace(A=lora.A[e], B=lora.B[e], magnitude=magnitude)


def weight_change(W: Tensor, lora: Lora) -> Tensor:
    """What `lora` adds to `W`, as a tensor of W's shape in float32 (float64 for a float64 W).

    For LoRA this is ΔW; for DoRA, m ⊙ V / ‖V‖ − W, by row or, `by_column`, by column. Several adapters on one weight add up.
    """
    check_shapes(W.shape, lora)
    dtype = _accumulation_dtype(W)
    delta = delta_weight(lora._replace(A=lora.A.to(dtype), B=lora.B.to(dtype)))
    if lora.magnitude is None:
        return delta
    W = W.to(dtype)
    V = W + delta
    along = -2 if lora.by_column else -1
    norm = torch.linalg.vector_norm(V, dim=along, keepdim=True).detach().clamp_min(_TINY)
    return (lora.magnitude.to(dtype).unsqueeze(along) / norm) * V - W


def delta_norm(lora: Lora) -> tuple[float, float]:
    """‖ΔW‖ (Frobenius) to three digits or more, and the bound scaling·‖B‖·‖A‖ on it; without forming ΔW.

    ‖B·A‖² is the trace of (BᵀB)(AAᵀ). In float32, or in float64 where that would lose it to cancellation.
    """
    square = bound = 0.0
    for dtype in (torch.float32, torch.float64):
        A, B = lora.A.to(dtype), lora.B.to(dtype)
        of_A, of_B = A @ A.mT, B.mT @ B
        square = (of_B * of_A).sum().item()
        traces = [g.diagonal(dim1=-2, dim2=-1).sum(-1) for g in (of_A, of_B)]
        bound = torch.dot(traces[0].view(-1), traces[1].view(-1)).item()
        if square > 1e-4 * bound:
            break
    scaling = abs(float(lora.scaling))
    return scaling * math.sqrt(max(0.0, square)), scaling * math.sqrt(bound)


def merged_weight_norm(W: Tensor, lora: Lora, squares: Tensor | None = None) -> Tensor:
    """‖W + ΔW‖ by row, (*expert, out), in float32 (float64 for a float64 W), without forming ΔW.

    squares: `row_squares(W)`, where it is known. A 16-bit W is not copied to float32. The result is a
    constant for the gradient.

    ‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·bᵀ for each row w of W and b of B: the largest
    tensor besides W is (out, r).
    """
    dtype = _accumulation_dtype(W)
    with torch.no_grad(), _without_autocast(W):
        A, B = lora.A.to(dtype), lora.B.to(dtype) * lora.scaling
        cross = (_product(W, A) * B).sum(-1)
        square = ((B @ (A @ A.mT)) * B).sum(-1)
        squares = row_squares(W) if squares is None else squares
        return (squares + 2 * cross + square).clamp_min(_TINY).sqrt()


def row_squares(W: Tensor) -> Tensor:
    """‖w‖² of each row, (*expert, out), in float32 (float64 for a float64 W)."""
    dtype = _accumulation_dtype(W)
    with torch.no_grad():
        if W.dtype == dtype or torch.compiler.is_compiling():
            return torch.linalg.vector_norm(W, dim=-1, dtype=dtype).square()
        # a few rows at a time: a wide copy of all of W would be twice its size
        rows = W.split(max(1, 2**20 // W.shape[-1]), dim=-2)
        return torch.cat([part.to(dtype).square().sum(-1) for part in rows], dim=-1)


def _product(W: Tensor, A: Tensor) -> Tensor:
    """W·Aᵀ, (*expert, out, r), in A's dtype, which is at least float32; no copy of W in that dtype.

    A product of 16-bit matrices is summed in float32 and then rounded to 16 bits. So A goes in as the sum of
    two 16-bit matrices, and a second product with the first of them, which begins at minus the first
    product, leaves what the rounding took: 16 bits or more in all.
    """
    if W.dtype == A.dtype or W.dtype.itemsize < 2:  # nothing multiplies float8
        return W.to(A.dtype) @ A.mT
    *expert, out, in_ = W.shape
    W, A = W.reshape(-1, out, in_), A.reshape(-1, A.shape[-2], in_)
    high = A.to(W.dtype)
    low = (A - high).to(W.dtype)
    first = torch.bmm(W, high.mT)
    rest = torch.baddbmm(first, W, high.mT, beta=-1)
    product = sum((p.to(A.dtype) for p in (first, rest)), torch.bmm(W, low.mT).to(A.dtype))
    return product.view(*expert, out, -1)


def _without_autocast(W: Tensor) -> AbstractContextManager:
    """Autocast would take the products that are float32 on purpose to 16 bits."""
    kind = W.device.type
    if not torch.amp.autocast_mode.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def transposed(lora: Lora) -> Lora:
    """The adapter that changes Wᵀ as `lora` changes W; without its bias. Views."""
    return Lora(lora.B.mT, lora.A.mT, lora.scaling, lora.magnitude, by_column=not lora.by_column)


def initial_magnitude(W: Tensor, lora: Lora) -> Tensor:
    """DoRA's m at the start: ‖W + ΔW‖ by row (Liu et al. 2024, §4.1), (*expert, out), so that W′ = W + ΔW."""
    return torch.linalg.vector_norm(W.to(_accumulation_dtype(W)) + delta_weight(lora), dim=-1)


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, in one pass: only a sum that is not finite has each looked at."""
    tensor = tensor.float() if tensor.dtype.itemsize < 2 else tensor  # float8 has no sum
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def check_shapes(W_shape: torch.Size, lora: Lora) -> None:
    """Raises ShapeError unless A is (*expert, r, in) and B is (*expert, out, r) for W (*expert, out, in)."""
    *expert, out, in_ = W_shape
    r = lora.A.shape[-2] if lora.A.ndim >= 2 else -1
    if tuple(lora.A.shape) != (*expert, r, in_) or tuple(lora.B.shape) != (*expert, out, r):
        raise ShapeError(
            f"A {tuple(lora.A.shape)} and B {tuple(lora.B.shape)} do not fit a weight of "
            f"(out, in) = {tuple(W_shape)}: A must be (r, {in_}) and B ({out}, r) with the same r."
        )


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
