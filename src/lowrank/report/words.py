"""Numbers as they are written in text and HTML."""

from __future__ import annotations

import math

UNITS = ("", "k", "M", "G", "T")


def number(value: float | None, form: str = ".3g") -> str:
    """`value` in a format such as ".3f" or ".1%"; a dash for what is not known or not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return format(value, form)


def percent(value: float | None) -> str:
    """A share with as many digits as it needs: 100%, 12.5%, 0.31%, 0.002%."""
    if value is None or not math.isfinite(value):
        return "–"
    if value in (0, 1):
        return f"{value:.0%}"
    if abs(value) < 1e-7:
        return "0.00001% or less"
    digits = max(1, min(5, 1 - math.floor(math.log10(abs(100 * value)))))
    return f"{value:.{digits}%}"


def amount(value: float, unit: str = "") -> str:
    """1234567 as "1.2 M", with a unit "1.2 MB"; thousands are 1,000."""
    size = abs(value)
    step = min(int(math.log10(size) // 3), len(UNITS) - 1) if size >= 1000 else 0
    scaled = value / 1000**step
    digits = 0 if step == 0 or abs(scaled) >= 100 else 1
    return f"{scaled:.{digits}f} {UNITS[step]}{unit}".strip()
