"""Curves over a run's steps as one inline SVG that takes the page's colours, light and dark."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank.files import replacing
from lowrank.report.data import Curve, RunReport

INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = ("#3b78d8", "#d9782b", "#3f9b62", "#a45bc4", "#c0504d")
MOST_POINTS = 800  # of one curve; more cannot be seen


def step_chart(curves: Sequence[Curve], y_label: str = "loss, nats per token") -> str:
    """An `<svg>` element without fixed size, script, or anything outside it; "" without points.

    Points that are not finite are left out and the line is broken there.
    """
    curves = _drawable(curves)
    if not curves:
        return ""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    _draw(curves, y_label, file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue(), curves, y_label)


def loss_label(data: RunReport) -> str:
    return f"loss, {data.losses_in}" if data.losses_in else "loss"


def step_image(path: Path, curves: Sequence[Curve], y_label: str = "loss, nats per token") -> bool:
    """Draws the curves into a PNG file, on white; nothing without points. Returns whether there is a file."""
    curves = _drawable(curves)
    if curves:
        with replacing(path) as temporary:
            _draw(curves, y_label, temporary, format="png", dpi=150, metadata={"Software": None})
    return bool(curves)


def _drawable(curves: Sequence[Curve]) -> list[Curve]:
    return [curve for curve in curves if any(map(math.isfinite, curve.values))]


def _draw(curves: Sequence[Curve], y_label: str, file: Any, **how: Any) -> None:
    # the object interface: no pyplot, no global state, no window system
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "lowrank",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for i, curve in enumerate(curves):
            steps, values = _thinned(curve)
            few = len(steps) <= 30
            axes.plot(
                steps,
                values,
                color=COLOURS[i % len(COLOURS)],
                label=curve.name,
                linewidth=1.6,
                marker="o" if few else None,
                markersize=3.5,
            )
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.25, color=INK)
        if len(curves) > 1 or curves[0].name:
            axes.legend(frameon=False)
        figure.savefig(file, **how)


def _thinned(curve: Curve) -> tuple[list[int], list[float]]:
    every = math.ceil(len(curve.steps) / MOST_POINTS)
    values = [value if math.isfinite(value) else math.nan for value in curve.values]
    return curve.steps[::every], values[::every]


def _inline(svg: str, curves: Sequence[Curve], y_label: str) -> str:
    """The element alone, scaling with the page, in its text colour, with words for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    words = (
        f"{y_label.capitalize()} by optimiser steps: {', '.join(curve.name for curve in curves)}"
    )
    body = body.replace(INK, "currentColor").replace("xlink:href", "href")
    return f'<svg {box.group() if box else ""} role="img" aria-label="{html.escape(words)}">{body}'
