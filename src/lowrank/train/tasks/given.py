"""What every task trains with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.train.run.trainer import Training, fit
from lowrank.train.settings import Sections


@dataclass(frozen=True)
class Given:
    """The model, the rows and the settings of one training."""

    model: Any
    tokenizer: Any
    train: Any  # as the task's `prepare` gives it, with `examples`, `rows` and `tokens`
    evaluation: Any | None
    output_dir: str | Path
    settings: Sections
    options: Mapping[str, Any] = field(default_factory=dict)  # of `fit`: resume_from, callbacks, …

    def fit(self, rows: Callable[[Any], Any] = lambda rows: rows, **options: Any) -> Training:
        """`trainer.fit`, which says what it raises. rows: makes of examples what the Trainer takes.

        options: the task's own; those that are given go before them.
        """
        return fit(
            self.model,
            rows(self.train.examples),
            rows(self.evaluation.examples) if self.evaluation else None,
            self.output_dir,
            self.settings.train,
            self.settings.eval,
            tokens=self.train.tokens,
            places=[row.where for row in self.train.rows],
            **{**options, **self.options},
        )
