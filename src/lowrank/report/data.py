"""What a training run has to say: plain dataclasses, filled by the run and read by text, HTML and JSON.

Every field has a default that means "not known": a section with nothing in it is left out.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank.verify import Verification


@dataclass(frozen=True)
class Curve:
    """One line of a chart: `values[i]` was seen after `steps[i]` optimiser steps."""

    name: str  # "train", "eval", "full fine-tuning, eval"
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Metric:
    """One number on the same evaluation data: the base, the adapter, and full fine-tuning."""

    name: str  # "exact match", "perplexity", "base's own skill (loss)"
    before: float | None = None
    after: float | None = None
    full: float | None = None  # full fine-tuning on the same steps and data, when it was run
    format: str = ".3f"  # how the numbers are written: ".1%", ".3f"
    higher_is_better: bool = True
    note: str = ""  # "60 examples of the test part"


@dataclass(frozen=True)
class Sample:
    """One evaluation example: what was asked, what was expected, and what the models said."""

    prompt: str
    expected: str = ""
    before: str = ""
    after: str = ""
    full: str | None = None
    correct_before: bool | None = None  # None: the metric does not judge single answers
    correct_after: bool | None = None


@dataclass(frozen=True)
class ModuleRow:
    """The adapter's parameters at all modules of one name and shape."""

    module: str  # "q_proj"
    kind: str  # the name in lowrank's table of kinds: "linear", "embedding"
    shape: str  # of the base's weight, as "out × in": "192 × 64"
    r: int | None  # None: trained and saved whole
    count: int  # how many such modules
    params: int  # trainable parameters in all of them


@dataclass(frozen=True)
class Setting:
    """One resolved setting and where it came from."""

    name: str  # "lora.r"
    value: Any
    source: str  # "default", "config.yaml", "flag"


@dataclass(frozen=True)
class Fact:
    """One line of the table of costs: what, how much (already in words), and a remark."""

    name: str  # "training time"
    value: str  # "16.2 s"
    note: str = ""  # "150 steps, 2 threads"


@dataclass(frozen=True)
class RunReport:
    """A training run: all that `reports/report.html` shows."""

    title: str
    summary: str = ""  # one or two sentences under the title
    created: str = ""  # ISO 8601, UTC
    command: str = ""
    metrics: list[Metric] = field(default_factory=list)
    losses: list[Curve] = field(default_factory=list)
    losses_in: str = "nats per token"  # "": of the task's own sort
    rewards: list[Curve] = field(default_factory=list)  # of preferences and sampled answers
    samples: list[Sample] = field(default_factory=list)
    modules: list[ModuleRow] = field(default_factory=list)
    trainable_params: int | None = None  # adapter, modules_to_save and biases together
    total_params: int | None = None  # the base and what is trainable
    costs: list[Fact] = field(default_factory=list)  # time, memory, file sizes
    settings: list[Setting] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    verification: Verification | None = None


def to_json(data: Any) -> Any:
    """A dataclass (or lists and dicts of them) as what JSON can hold; NaN and ±inf become None."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return {f.name: to_json(getattr(data, f.name)) for f in dataclasses.fields(data)}
    if isinstance(data, dict):
        return {str(key): to_json(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [to_json(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if data is None or isinstance(data, (str, int, bool)):
        return data
    return str(data)
