"""CorDA: components of W that matter most, or least, for given inputs.

Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import InitDataError

_LARGEST_ERROR = 0.05  # ‖C·C⁻¹ − I‖ up to which C counts as invertible: the authors' code
_FIRST_RIDGE = 0.01  # of the mean of C's diagonal, doubled until it suffices: the same


class CordaEigens(NamedTuple):
    """r components of the context-oriented decomposition W = U·diag(S)·Vᵀ, under PEFT's names."""

    S_WC: Tensor  # (r,)
    U_WC: Tensor  # (out, r)
    V_WC: Tensor  # (in, r): C⁻¹ times the right singular vectors of W·C


def decompose(W: Tensor, C: Tensor, r: int, method: str) -> CordaEigens:
    """The r components of W·C with the largest ("ipm") or smallest ("kpm") singular values, times C⁻¹.

    W (out, in); C (in, in) is the covariance XXᵀ of the layer's inputs, up to a factor. SVD(W·C) = U·S·Vᵀ,
    W = U·S·Vᵀ·C⁻¹. C is first scaled to a mean diagonal of 1: that leaves
    each component's product as it is, and how it is shared between A and B free of the inputs' scale. Where
    C has no good inverse, its diagonal is raised until it has. Computed in float64; returns
    W's device, float32 (float64 for a float64 W).
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    C = invertible(C.to(W.device).double())
    U, S, Vh = torch.linalg.svd(W.double() @ C, full_matrices=False)
    chosen = slice(0, r) if method == "ipm" else slice(len(S) - r, len(S))
    V = torch.cholesky_solve(Vh[chosen].T, torch.linalg.cholesky(C))
    return CordaEigens(
        S[chosen].to(dtype), U[:, chosen].to(dtype).contiguous(), V.to(dtype).contiguous()
    )


def invertible(C: Tensor) -> Tensor:
    """C (n, n), symmetric, over the mean of its diagonal; raised on the diagonal until it has a good inverse.

    The test is the authors', in float32: ‖C·C⁻¹ − I‖ < 0.05 in the Frobenius norm.
    Raises InitDataError if C is zero or not finite.
    """
    mean = C.diagonal().mean()
    if not mean > 0 or not torch.isfinite(C).all():
        raise InitDataError("the covariance of the inputs is zero or not finite.")
    C = C / mean
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    ridge = 0.0
    while not _has_inverse(C + ridge * identity):
        ridge = 2 * ridge or _FIRST_RIDGE
    return C + ridge * identity


def _has_inverse(C: Tensor) -> bool:
    C = C.float()
    inverse, info = torch.linalg.inv_ex(C)
    if info or torch.linalg.cholesky_ex(C).info:
        return False
    error = torch.dist(C @ inverse, torch.eye(len(C), device=C.device))
    return bool(error < _LARGEST_ERROR)  # False for NaN


def factors(eigens: CordaEigens, scaling: float) -> tuple[Tensor, Tensor]:
    """A = √S·Vᵀ·C⁻¹ (r, in) and B = U·√S (out, r), S over the scaling: scaling·B·A is the component itself."""
    root = (eigens.S_WC / scaling).sqrt()
    return root[:, None] * eigens.V_WC.T, eigens.U_WC * root
