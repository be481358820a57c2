"""Rounding a weight so that its outputs, not its entries, stay near the exact ones."""

import torch
from torch import Tensor

_SWEEPS = 3
_COLUMNS = 64  # updated one by one before the other columns hear of it
_DAMPING = 0.01  # of the mean square of an input: the examples are not all there is


def rounded_for_inputs(exact: Tensor, covariance: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact` (rows, in) in `dtype`, each entry rounded down or up so that E·x is small, E the rounding error.

    covariance: (in, in), the mean of x·xᵀ over typical inputs x, as C. Minimises eᵀ·C·e for each row e of E (the
    objective of GPTQ, Frantar et al. 2022, eq. 1) by coordinate descent from the nearest values: an entry takes
    its other neighbour where that lowers the sum. No entry is off by a unit in the last place or more.
    """
    nearest, step = _neighbours(exact, dtype)
    C = covariance.to(exact.dtype)
    C = C + _DAMPING * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    E = nearest - exact
    gradient = E @ C  # half of it; (rows, in)
    moved = torch.zeros_like(exact)
    for _ in range(_SWEEPS):
        for begin in range(0, exact.shape[1], _COLUMNS):
            part = slice(begin, begin + _COLUMNS)
            change = _descended(
                gradient[:, part].clone(), C[part, part], moved[:, part], step[:, part]
            )
            moved[:, part] += change
            gradient += change @ C[part]
    return (nearest + moved).to(dtype)


def _descended(gradient: Tensor, C: Tensor, moved: Tensor, step: Tensor) -> Tensor:
    """What one pass over these columns changes."""
    changes = torch.zeros_like(step)
    for j in range(step.shape[1]):
        change = torch.where(moved[:, j] == 0, step[:, j], -step[:, j])
        lowers = change * (2 * gradient[:, j] + change * C[j, j]) < 0
        changes[:, j] = change = torch.where(lowers, change, 0.0)
        gradient.addr_(change, C[j])
    return changes


def _neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest value in `dtype`, and how far from it the one on the other side of `exact` lies; 0 if there is none."""
    rounded = exact.to(dtype)
    nearest = rounded.to(exact.dtype)
    beyond = torch.full_like(rounded, torch.inf)
    other = torch.nextafter(rounded, torch.where(nearest > exact, -beyond, beyond))
    step = other.to(exact.dtype) - nearest
    return nearest, torch.where((nearest == exact) | ~step.isfinite(), 0.0, step)
