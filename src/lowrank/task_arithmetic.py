"""Several adapters at one weight as one: the mathematics. Tensors in, tensors out.

Every method takes the adapters that a layer has, each with its weight, and gives the two factors of the
result, whose scaling is 1. What needs no (out, in) matrix forms none.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank.errors import ShapeError
from lowrank.lora import Lora, delta_weight, of_expert

_EXACT_SVD = 512  # up to this side a dense SVD takes a second or less
_OVERSAMPLING = 8
_POWER_ITERATIONS = 4
_MOST_ITERATIONS = 30


class Weighted(NamedTuple):
    """One adapter at one weight, and the factor that its ΔW gets."""

    lora: Lora
    weight: float


class Options(NamedTuple):
    """What a method may be told. `random` gives a generator for each (what, index of the adapter)."""

    random: Callable[[str, int], torch.Generator]
    rank: int | None = None
    energy: float | None = None
    density: float = 1.0
    majority_sign_method: str = "total"


class Combined(NamedTuple):
    """The factors of a combination, ΔW = B·A, and how near they are to what the method means."""

    A: Tensor  # (*expert, r, in), float32 or float64
    B: Tensor  # (*expert, out, r)
    norm: float | None  # ‖M‖ (Frobenius) of the matrix M that the method means
    error: float | None  # ‖B·A − M‖ / ‖M‖; None where the method works on the factors alone


# --- the methods ----------------------------------------------------------------------------------


def concatenated(parts: Sequence[Weighted], options: Options) -> Combined:
    """Σ wᵢ·ΔWᵢ exactly: the factors side by side, wᵢ·scalingᵢ folded into Bᵢ. Rank Σ rᵢ."""
    B, A = _stacked(parts)
    return Combined(A, B, _product_norm(B, A), 0.0)


def best_approximation(parts: Sequence[Weighted], options: Options) -> Combined:
    """The best approximation of Σ wᵢ·ΔWᵢ with rank `options.rank`, or that keeps `options.energy`.

    By Eckart and Young (1936) the truncated SVD. With B·A the sum, B = Q₁R₁ and Aᵀ = Q₂R₂, the SVD of the
    small core R₁R₂ᵀ (Σ rᵢ, Σ rᵢ) is the SVD of the sum up to the orthogonal Q₁ and Q₂. In float64.
    Energy is the share of ‖M‖². The singular values are divided evenly between B and A. Of several experts, each
    by itself, at the rank of the one that needs most.
    """
    B, A = _stacked(parts, torch.float64)
    dtype = _dtype(parts)
    left, R1 = torch.linalg.qr(B)
    right, R2 = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R1 @ R2.mT, full_matrices=False)
    k = max(_kept(each, options) for each in S.reshape(-1, S.shape[-1]))
    root = S[..., :k].sqrt()
    norm = S.norm().item()
    return Combined(
        A=((root[..., None] * Vh[..., :k, :]) @ right.mT).to(dtype),
        B=(left @ (U[..., :k] * root[..., None, :])).to(dtype),
        norm=norm,
        error=S[..., k:].norm().item() / norm if norm else 0.0,
    )


Merge = Callable[[list[Tensor], list[float], Options, str], Tensor]
Combine = Callable[[Sequence[Weighted], Options], Combined]


def each_expert(method: Combine) -> Combine:
    """`method` on every expert's matrices by themselves, where the weight holds several."""

    def on_all(parts: Sequence[Weighted], options: Options) -> Combined:
        A = parts[0].lora.A
        if A.ndim == 2:
            return method(parts, options)

        def of(e: int) -> Combined:
            random = options._replace(random=lambda what, i: options.random(f"{what}.{e}", i))
            return method([Weighted(of_expert(lora, e), weight) for lora, weight in parts], random)

        found = [of(e) for e in range(len(A))]
        return stacked_experts(found)

    return on_all


def stacked_experts(each: Sequence[Combined]) -> Combined:
    """The combinations of several experts as one, at the highest of their ranks; the errors add up as squares."""
    r = max(len(found.A) for found in each)
    A = torch.stack([pad(found.A, (0, 0, 0, r - len(found.A))) for found in each])
    B = torch.stack([pad(found.B, (0, r - len(found.A))) for found in each])
    if any(found.norm is None or found.error is None for found in each):
        return Combined(A, B, None, None)
    norm = math.hypot(*(found.norm or 0.0 for found in each))
    lost = math.hypot(*((found.error or 0.0) * (found.norm or 0.0) for found in each))
    return Combined(A, B, norm, lost / norm if norm else 0.0)


def on_weights(merge: Merge) -> Combine:
    """The method that applies `merge` to the ΔWᵢ themselves and takes the best approximation of the result.

    A negative weight negates ΔWᵢ before the merge, so that it counts as the adapter −ΔWᵢ with |wᵢ|.
    Forms the layer's (out, in) matrices. The SVD is dense up to 512 rows or columns, else randomised.
    """

    def method(parts: Sequence[Weighted], options: Options) -> Combined:
        dtype = _dtype(parts)
        deltas = [delta_weight(lora).to(dtype) * math.copysign(1, weight) for lora, weight in parts]
        M = merge(deltas, [abs(weight) for _, weight in parts], options, "W")
        k = min(options.rank or 1, *M.shape)
        A, B = _truncated(M, k, options.random("range", 0))
        norm = M.norm().item()
        return Combined(A, B, norm, (M - B @ A).norm().item() / norm if norm else 0.0)

    return each_expert(method)


def on_factors(merge: Merge, of_sum: bool = False) -> Combine:
    """The method that applies `merge` to the Aᵢ and to the Bᵢ, each by itself, as PEFT does.

    Aᵢ gets the weight sign·√|wᵢ·scalingᵢ| and Bᵢ √|wᵢ·scalingᵢ|. (ΣBᵢ)(ΣAᵢ) has products of one adapter's
    B with another's A in it: this is not Σ wᵢ·ΔWᵢ. of_sum: report how far from that sum it is.
    Raises ShapeError unless all ranks are the same.
    """

    def method(parts: Sequence[Weighted], options: Options) -> Combined:
        ranks = [lora.A.shape[0] for lora, _ in parts]
        if len(set(ranks)) > 1:
            raise ShapeError(f"the ranks differ: {', '.join(map(str, ranks))}")
        products = [float(lora.scaling) * weight for lora, weight in parts]
        roots = [math.sqrt(abs(product)) for product in products]
        signed = [math.copysign(root, p) for root, p in zip(roots, products, strict=True)]
        dtype = _dtype(parts)
        A = merge([lora.A.to(dtype) for lora, _ in parts], signed, options, "A")
        B = merge([lora.B.to(dtype) for lora, _ in parts], roots, options, "B")
        if not of_sum:
            return Combined(A, B, None, None)
        B_sum, A_sum = _stacked(parts)
        norm = _product_norm(B_sum, A_sum)
        off = _product_norm(torch.cat([B, -B_sum], dim=1), torch.cat([A, A_sum], dim=0))
        return Combined(A, B, norm, off / norm if norm else 0.0)

    return each_expert(method)


# --- merging tensors element by element: (tensors, weights, options, what) -> tensor ---------------


def weighted_sum(
    tensors: list[Tensor], weights: list[float], options: Options, what: str
) -> Tensor:
    """Σ wᵢ·tᵢ (task arithmetic: Ilharco et al. 2023, §2)."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def magnitude_prune(
    tensors: list[Tensor], weights: list[float], options: Options, what: str
) -> Tensor:
    """Σ wᵢ·trim(tᵢ): of each tensor only its largest entries, a share of `density`."""
    return weighted_sum(_trimmed(tensors, options), weights, options, what)


def ties(tensors: list[Tensor], weights: list[float], options: Options, what: str) -> Tensor:
    """Trim, elect a sign for each entry, average those that have it (TIES: Yadav et al. 2023, §4)."""
    return _elected_mean(_trimmed(tensors, options), weights, options.majority_sign_method)


def dare_linear(tensors: list[Tensor], weights: list[float], options: Options, what: str) -> Tensor:
    """Σ wᵢ·drop(tᵢ): random entries dropped, the others divided by `density` (DARE: Yu et al. 2024, §3.2)."""
    return weighted_sum(_dropped(tensors, options, what), weights, options, what)


def dare_ties(tensors: list[Tensor], weights: list[float], options: Options, what: str) -> Tensor:
    """DARE's dropping, then TIES' election and average (Yu et al. 2024, §3.3)."""
    return _elected_mean(_dropped(tensors, options, what), weights, options.majority_sign_method)


def _trimmed(tensors: list[Tensor], options: Options) -> list[Tensor]:
    return [_largest(tensor, options.density) for tensor in tensors]


def _largest(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with zeros in place of all but its ⌊density·n⌋ largest entries (more, where some are equal)."""
    size = tensor.abs()
    n = size.numel()
    keep = int(density * n)
    if keep == 0:
        return torch.zeros_like(tensor)
    threshold = size.flatten().kthvalue(n - keep + 1).values
    return torch.where(size >= threshold, tensor, 0)


def _dropped(tensors: list[Tensor], options: Options, what: str) -> list[Tensor]:
    found = []
    for i, tensor in enumerate(tensors):
        chance = torch.rand(tensor.shape, generator=options.random(what, i))
        keep = (chance < options.density).to(tensor.device)
        found.append(torch.where(keep, tensor / options.density, 0))
    return found


def _elected_mean(tensors: list[Tensor], weights: list[float], how: str) -> Tensor:
    """The mean of wᵢ·tᵢ over those i whose sign is the elected one; 0 where there is none.

    how: "total", the sign of Σ tᵢ (Yadav et al. 2023, eq. 3); "frequency", that of most tᵢ. A draw is plus.
    """
    votes = tensors if how == "total" else [tensor.sign() for tensor in tensors]
    elected = torch.where(sum(votes[1:], votes[0]) >= 0, 1.0, -1.0)
    total = torch.zeros_like(tensors[0])
    count = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = tensor.sign() == elected
        total += torch.where(agrees, tensor * weight, 0)
        count += agrees
    return total / count.clamp_min(1)


# --- products and their SVD -----------------------------------------------------------------------


def _stacked(
    parts: Sequence[Weighted], at_least: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(B, A), (*expert, out, Σr) and (*expert, Σr, in), with B·A = Σ wᵢ·ΔWᵢ, in the widest of the factors' dtypes."""
    dtype = torch.promote_types(_dtype(parts), at_least)
    B = torch.cat([lora.B.to(dtype) * (lora.scaling * weight) for lora, weight in parts], dim=-1)
    return B, torch.cat([lora.A.to(dtype) for lora, _ in parts], dim=-2)


def _dtype(parts: Sequence[Weighted]) -> torch.dtype:
    """The widest of the factors' dtypes, at least float32."""
    found = torch.float32
    for lora, _ in parts:
        found = torch.promote_types(found, torch.promote_types(lora.A.dtype, lora.B.dtype))
    return found


def _product_norm(B: Tensor, A: Tensor) -> float:
    """‖B·A‖ (Frobenius) without forming B·A; in float64, of the triangular factors' product."""
    R1 = torch.linalg.qr(B.double(), mode="r").R
    R2 = torch.linalg.qr(A.double().mT, mode="r").R
    return (R1 @ R2.mT).norm().item()


def _kept(S: Tensor, options: Options) -> int:
    """How many of the singular values S stay: `rank` of them, or as many as hold `energy` of Σ σ²."""
    if options.energy is None:
        return min(options.rank or len(S), len(S))
    squares = S.square()
    # what is lost by keeping 0, 1, … of them; summed from the smallest, so that nothing is rounded away
    lost = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    enough = lost <= (1 - options.energy) * lost[0]
    return max(1, int(enough.nonzero()[0, 0]))


def low_rank(
    M: Tensor, generator: torch.Generator, *, rank: int | None = None, energy: float | None = None
) -> Combined:
    """The best approximation of M (out, in) with rank `rank`, or with as many singular values as hold `energy`.

    Energy is the share of ‖M‖². Dense up to 512 rows or columns, and where the rank is no small part of them; else
    randomised, with power iterations until another one would improve the error by less than a thousandth. The error
    is measured on M itself.
    """
    k = rank or 16
    while True:
        U, S, Vh, exact = _leading(M, k, generator, checked=True)
        if energy is None:
            kept = min(k, len(S))
            break
        lost = M.norm().double().square() - S.double().square().cumsum(0)
        enough = (lost <= (1 - energy) * M.norm().double().square()).nonzero()
        if len(enough) or exact:
            kept = int(enough[0, 0]) + 1 if len(enough) else len(S)
            break
        k *= 2
    root = S[:kept].sqrt()
    A, B = root[:, None] * Vh[:kept], U[:, :kept] * root
    norm = M.norm().item()
    return Combined(A, B, norm, (M - B @ A).norm().item() / norm if norm else 0.0)


def _truncated(M: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(A, B) of rank k with B·A near the best approximation of M (out, in)."""
    U, S, Vh, _ = _leading(M, k, generator)
    root = S[:k].sqrt()
    return root[:, None] * Vh[:k], U[:, :k] * root


def _leading(
    M: Tensor, k: int, generator: torch.Generator, checked: bool = False
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """U, S, Vh of at least the k largest singular values of M (or all that it has), and whether they are all.

    Randomised for a large M: the range of (MMᵀ)^q·M·Ω, Ω random (Halko et al. 2011, alg. 4.4 and 5.1).
    checked: q grows until the part of ‖M‖² outside the range shrinks by less than two thousandths a step.
    """
    side = min(M.shape)
    if side <= _EXACT_SVD or 4 * (k + _OVERSAMPLING) > side:
        return *torch.linalg.svd(M, full_matrices=False), True
    whole = M.norm().double().square().item()
    start = torch.randn(M.shape[1], k + _OVERSAMPLING, generator=generator)
    Q = torch.linalg.qr(M @ start.to(M)).Q
    outside = math.inf
    for step in range(_MOST_ITERATIONS if checked else _POWER_ITERATIONS):
        P, R = torch.linalg.qr(M.mT @ Q)
        before, outside = outside, whole - R.norm().double().square().item()
        if checked and step > 1 and before - outside <= 2e-3 * abs(outside):
            break
        Q = torch.linalg.qr(M @ P).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return Q @ U, S, Vh, False


class Method(NamedTuple):
    """One row: how a layer is combined, and what belongs to it."""

    combine: Combine
    is_sum: bool  # its result means Σ wᵢ·ΔWᵢ, to which biases can be added likewise
    takes_rank: bool = False
    takes_density: bool = False
    takes_sign: bool = False


METHODS: dict[str, Method] = {
    "linear": Method(concatenated, is_sum=True),
    "cat": Method(concatenated, is_sum=True),
    "svd": Method(best_approximation, is_sum=True, takes_rank=True),
    "linear_factors": Method(on_factors(weighted_sum, of_sum=True), is_sum=False),
    "magnitude_prune": Method(on_factors(magnitude_prune), False, takes_density=True),
    "ties": Method(on_factors(ties), False, takes_density=True, takes_sign=True),
    "dare_linear": Method(on_factors(dare_linear), False, takes_density=True),
    "dare_ties": Method(on_factors(dare_ties), False, takes_density=True, takes_sign=True),
    "magnitude_prune_svd": Method(on_weights(magnitude_prune), False, True, True),
    "ties_svd": Method(on_weights(ties), False, True, True, True),
    "dare_linear_svd": Method(on_weights(dare_linear), False, True, True),
    "dare_ties_svd": Method(on_weights(dare_ties), False, True, True, True),
}
