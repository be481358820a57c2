"""Every tensor of a merged folder against the exact value it should have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lowrank.expected import Change, loss
from lowrank.lora import all_finite
from lowrank.verify.result import TENSOR_TOLERANCE, TensorCheck

PRESENCE_TOLERANCE = (
    0.05  # where entries may be either neighbour, of which one may be the base's own
)


class Tally:
    """Checks tensor by tensor, so that only one pair of float64 tensors is held at a time."""

    def __init__(
        self,
        base: Mapping[str, Tensor],
        merged: Mapping[str, Tensor],
        either_neighbour: bool = False,
    ) -> None:
        """base, merged: state dicts, tied names each listed; base in its exact values. either_neighbour: as `loss`."""
        self.either_neighbour = either_neighbour
        self.base, self.merged = base, merged
        self.checks: list[TensorCheck] = []
        self.missing: list[str] = []
        self.changed: set[str] = set()
        self.noise, self.change = 0.0, 0.0  # squares, over the adapted tensors

    def check(self, changes: Iterable[Change]) -> None:
        """Fill `checks`, `missing` and `changed`: the changed tensors, then all others of the base."""
        for change in changes:
            self.changed.add(change.name)
            self._changed(change)
        for name, W in self.base.items():
            if name not in self.changed:
                self._untouched(name, W)

    @property
    def rounding(self) -> float | None:
        """‖round(W+ΔW) − (W+ΔW)‖ / ‖ΔW‖ over all adapted tensors together."""
        return math.sqrt(self.noise / self.change) if self.change else None

    def _changed(self, change: Change) -> None:
        role = "saved" if change.saved else "adapted"
        M = self._found(change.name, change.after.shape, role)
        if M is None:
            return
        result = loss(M, change, self.either_neighbour and not change.saved)
        problem = ""
        if not all_finite(M):
            problem = f"{int((~M.isfinite()).sum())} of {M.numel()} values are not finite"
        elif result.error > TENSOR_TOLERANCE:
            problem = f"off by {result.overall_error:.2g} ‖ΔW‖, most in row {result.row}"
        elif self.either_neighbour and abs(result.present - 1) > PRESENCE_TOLERANCE:
            problem = f"{result.present:.3g} of the adapter's change is there"
        if not change.saved:
            self.noise += result.rounding_norm**2
            self.change += result.change_norm**2
        self.checks.append(
            TensorCheck(
                change.name,
                _name(M.dtype),
                role,
                error=_finite(result.error),
                present=_finite(result.present),
                moved=_finite(result.moved),
                rounding=_finite(result.rounding),
                problem=problem,
            )
        )

    def _untouched(self, name: str, W: Tensor) -> None:
        M = self._found(name, W.shape, "base")
        if M is None:
            return
        different = int((W.to(M.dtype) != M).sum()) - int((M.isnan() & W.isnan()).sum())
        problem = f"{different} of {M.numel()} values are not the base's" if different else ""
        error = None if different else 0.0
        self.checks.append(TensorCheck(name, _name(M.dtype), "base", error, problem=problem))

    def _found(self, name: str, shape: torch.Size, role: str) -> Tensor | None:
        M = self.merged.get(name)
        if M is None:
            self.missing.append(name)
            return None
        if M.shape != shape:
            problem = f"shape {tuple(M.shape)} instead of {tuple(shape)}"
            self.checks.append(TensorCheck(name, _name(M.dtype), role, None, problem=problem))
            return None
        return M


def worst_first(checks: Iterable[TensorCheck], most: int = 10) -> list[TensorCheck]:
    """The wrong tensors by how wrong they are, then the adapted ones by what rounding costs them."""
    wrong = [check for check in checks if check.problem]
    wrong.sort(key=lambda check: -_or_infinite(check.error))
    costly = [check for check in checks if not check.problem and check.role == "adapted"]
    costly.sort(key=lambda check: -_or_infinite(check.rounding))
    return (wrong + costly)[:most]


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
