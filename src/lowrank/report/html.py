"""A training run as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from lowrank.report.data import RunReport


def write_report(path: str | Path, data: RunReport) -> Path:
    """Write `data` as one HTML page with nothing outside it; returns the path written.

    The folder is made if it is missing; an existing page is replaced in one rename.
    """
    raise NotImplementedError
