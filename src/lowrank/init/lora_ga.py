"""LoRA-GA: A and B from the gradient of W, so that LoRA's first step is the full step's best approximation.

Wang, Yu & Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation".
"""

import torch
from torch import Tensor

from lowrank.init.weight import randomised_svd, svd

_ITERATIONS = 4


def factors(
    W: Tensor,
    gradient: Tensor,
    r: int,
    scaling: float,
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float = 16,
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), orthonormal up to a factor: singular vectors of the gradient (out, in).

    direction: which of the 2r leading ones A and B take, never the same (`DIRECTIONS`); theorem 3.1 shows
    "ArB2r" to be best. scale: their factor (`SCALES`), "stable" being theorem 3.2's ⁴√out / √γ.
    Needs 2r ≤ min(out, in). "random" draws from torch's generator. In W's dtype, at least float32.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    U, Vh = leading_vectors(gradient.to(W.device, dtype), 2 * r)
    for_A, for_B = DIRECTIONS[direction](r)
    factor = SCALES[scale](W, r, scaling, stable_gamma)
    return Vh[for_A].to(W.device) * factor, U[:, for_B] * factor


def leading_vectors(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """U (out, k) and Vᵀ (k, in) of G's k largest singular values.

    Exact where 4k reaches a side of G; else by four subspace iterations, as many as the authors take: enough
    for a gradient, whose singular values fall quickly.
    """
    found = svd(G, k) if 4 * k >= min(G.shape) else randomised_svd(G, k, _ITERATIONS)
    return found.U, found.Vh


def _random(r: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(2 * r)
    return order[:r], order[r:]


# For A and for B, the indices of the singular vectors, largest singular value first.
DIRECTIONS = {
    "ArBr": lambda r: (torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)),
    "A2rBr": lambda r: (torch.arange(r, 2 * r), torch.arange(r)),
    "ArB2r": lambda r: (torch.arange(r), torch.arange(r, 2 * r)),
    "random": _random,
}


def _weight_svd(W: Tensor, r: int, scaling: float, gamma: float) -> float:
    """The mean root of W's r largest singular values over the scaling: ΔW as large as W's own components."""
    S = torch.linalg.svdvals(W.to(torch.promote_types(W.dtype, torch.float32)))
    return float((S[:r] / scaling).sqrt().mean())


# What A and B are multiplied by: W, r, scaling, gamma -> factor.
SCALES = {
    "stable": lambda W, r, scaling, gamma: W.shape[0] ** 0.25 / gamma**0.5,
    "weight_svd": _weight_svd,
    "gd_scale": lambda W, r, scaling, gamma: 1 / scaling,
    "unit": lambda W, r, scaling, gamma: 1.0,
}
