"""Where a run's figures go besides log.jsonl: `train.report_to`, each without a login unless one is there."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lowrank.errors import MissingExtraError, listed


class Tracker(NamedTuple):
    package: str
    # environment variables that hold where nothing else was said
    variables: Callable[[Path], dict[str, str]]


def _wandb(folder: Path) -> dict[str, str]:
    login = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in _netrc()
    mode = {} if login else {"WANDB_MODE": "offline"}  # `wandb sync` sends it later
    return {"WANDB_PROJECT": "lowrank", "WANDB_DIR": str(folder), **mode}


def _netrc() -> str:
    try:
        return Path(os.environ.get("NETRC", "~/.netrc")).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


TRACKERS = {
    "tensorboard": Tracker(
        "tensorboard", lambda folder: {"TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard")}
    ),
    "wandb": Tracker("wandb", _wandb),
    "mlflow": Tracker(
        "mlflow", lambda folder: {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    ),
    "trackio": Tracker("trackio", lambda folder: {"TRACKIO_DIR": str(folder / "trackio")}),
}


def known_trackers(report_to: Sequence[str] | str) -> bool:
    return all(name in TRACKERS for name in _names(report_to))


def trackers(report_to: Sequence[str] | str | None) -> list[str]:
    """The names in `report_to`. Raises MissingExtraError with the line that installs what is missing."""
    names = _names(report_to)
    problems = [
        f"train.report_to {name}: the package is not installed: pip install {TRACKERS[name].package}"
        for name in names
        if importlib.util.find_spec(TRACKERS[name].package) is None
    ]
    if problems:
        raise MissingExtraError(listed(problems))
    return names


def _names(report_to: Sequence[str] | str | None) -> list[str]:
    return [report_to] if isinstance(report_to, str) else list(report_to or ())


@contextmanager
def variables(names: Sequence[str], folder: Path) -> Iterator[None]:
    """Sets the trackers' environment variables for a while, where the user has set none."""
    folder = folder.absolute()
    wanted = {k: v for name in names for k, v in TRACKERS[name].variables(folder).items()}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    if added:
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
