"""Initialisations that look at W: PiSSA and OLoRA take their start out of it, LoftQ puts a quantised one in its place."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.init.start import Start
from lowrank.kernels.quantisation import rounded
from lowrank.lora import Lora, without
from lowrank.quantisation import Quantisation

LOFTQ = {  # bits -> what LoftQ rounds to
    2: Quantisation("nf2", block_size=64),
    4: Quantisation("nf4", block_size=64),
    8: Quantisation("int8"),
}
_OVERSAMPLING = 8  # columns beyond r that a randomised SVD works with: Halko et al. 2011, §4.2


class SVD(NamedTuple):
    """M ≈ U·diag(S)·Vh, the largest singular values first."""

    U: Tensor  # (out, r)
    S: Tensor  # (r,)
    Vh: Tensor  # (r, in)


def pissa(
    read: Callable[[], Tensor],
    shape: tuple[int, int],
    r: int,
    scaling: float,
    iterations: int | None = None,
) -> Start:
    """The r largest singular triplets: B = U_r·√(S_r/s), A = √(S_r/s)·V_rᵀ (Meng et al. 2024, eq. 2–4).

    What stays of W is W_res = W − s·B·A (ibid., eq. 5), so that the scaling s changes nothing at the start.
    iterations: None for an exact SVD, else of the randomised one. Float32, or W's float64.
    """
    W = _wide(read())
    found = svd(W, r) if iterations is None else randomised_svd(W, r, iterations)
    root = (found.S / scaling).sqrt()
    A, B = root[:, None] * found.Vh, found.U * root
    return Start(A.contiguous(), B.contiguous(), taken_out=True)


def olora(read: Callable[[], Tensor], shape: tuple[int, int], r: int, scaling: float) -> Start:
    """B = Q_r and A = R_r of W = Q·R: the first r columns and rows (Büyükakyüz 2024, Algorithm 1)."""
    Q, R = torch.linalg.qr(_wide(read()))
    A, B = R[:r], Q[:, :r]
    return Start(A.contiguous(), B.contiguous(), taken_out=True)


def loftq(
    read: Callable[[], Tensor],
    shape: tuple[int, int],
    r: int,
    scaling: float,
    bits: int = 4,
    iterations: int = 1,
) -> Start:
    """A quantised base Q and the adapter that is nearest to what it lost: Q + s·B·A ≈ W.

    In turns Q = q(W − s·B·A), from B·A = 0, and s·B·A = the best approximation of W − Q with rank r (Li et al.
    2023, Algorithm 1, there with s = 1). Q is rounded to W's dtype, and the adapter makes up for that too.
    bits: what q rounds to, of LOFTQ. The start's `less` is the s·B·A of the turn before the last: with it Q follows from W
    without any SVD.
    """
    stored = read().detach()
    W = _wide(stored)
    less, found = None, None
    for _ in range(iterations):
        less = found
        Q = _loftq_base(stored, less, bits)
        U, S, Vh = svd(W - Q.to(W.dtype), r)
        root = (S / scaling).sqrt()
        found = Lora((root[:, None] * Vh).contiguous(), (U * root).contiguous(), scaling)
    assert found is not None
    return Start(found.A, found.B, base=Q, less=less)


def loftq_again(
    read: Callable[[], Tensor],
    shape: tuple[int, int],
    r: int,
    scaling: float,
    A: Tensor,
    B: Tensor,
    bits: int,
) -> Start:
    """The quantised base that `loftq` made, from what it took out of W before it rounded: s·B·A."""
    less = Lora(A, B, scaling)
    return Start(A, B, base=_loftq_base(read().detach(), less, bits), less=less)


def _loftq_base(stored: Tensor, less: Lora | None, bits: int) -> Tensor:
    W = _wide(stored) if less is None else without(stored, less)
    return rounded(W, LOFTQ[bits]).to(stored.dtype)


def svd(M: Tensor, r: int) -> SVD:
    """The r largest singular triplets of M (out, in), exactly."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return SVD(U[:, :r], S[:r], Vh[:r])


def randomised_svd(M: Tensor, r: int, iterations: int) -> SVD:
    """The r largest singular triplets of M (out, in), nearly: Halko et al. 2011, Algorithms 4.4 and 5.1.

    The same M gives the same result: the random numbers are its own, and none of torch's is drawn.
    """
    width = min(r + _OVERSAMPLING, *M.shape)
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(M.shape[1], width, generator=generator, dtype=M.dtype, device="cpu")
    Q = torch.linalg.qr(M @ sketch.to(M.device)).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(M.T @ Q).Q
        Q = torch.linalg.qr(M @ Q).Q
    small = svd(Q.T @ M, r)
    return small._replace(U=Q @ small.U)


def _wide(W: Tensor) -> Tensor:
    return W.detach().to(torch.promote_types(W.dtype, torch.float32))
