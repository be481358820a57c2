"""A training run as one self-contained HTML page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lowrank.report.chart import loss_label, step_chart
from lowrank.report.data import RunReport, to_json
from lowrank.report.words import amount, number, percent

TEMPLATE = "report.html.jinja"


def write_report(path: str | Path, data: RunReport) -> Path:
    """Write `data` as one HTML page with nothing outside it; returns the path written.

    The folder is made if it is missing; an existing page is replaced in one rename.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        work.write_text(page(data), encoding="utf-8")
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)
    return path


def page(data: RunReport) -> str:
    """The page as a string."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lowrank", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "amount": amount,
        "shown": _shown,
    }
    return environment.get_template(TEMPLATE).render(
        data=data,
        loss_chart=step_chart(data.losses, loss_label(data)),
        reward_chart=step_chart(data.rewards, "reward"),
        full=any(metric.full is not None for metric in data.metrics),
        full_samples=any(sample.full is not None for sample in data.samples),
        outputs=_outputs(data),
    )


def _shown(value: Any) -> str:
    """A setting's value: strings as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(to_json(value), ensure_ascii=False)


def _outputs(data: RunReport) -> list[tuple[str, float, float]]:
    """Rows (what, merged against base+adapter, base against base+adapter) of the verification."""
    o = data.verification and data.verification.outputs
    if not o:
        return []
    rows: list[tuple[str, Any, Any]] = [
        (f"{o.what}, root mean square", o.rms_difference, o.effect),
        (f"{o.what}, mean", o.mean_difference, o.mean_effect),
        (f"{o.what}, largest", o.max_difference, o.max_effect),
        ("KL divergence, nats", o.kl, o.kl_effect),
    ]
    return [row for row in rows if row[1] is not None]
