"""Which of a run's states is the best one: measured at each evaluation, kept, and where the run stops early."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lowrank.errors import LowrankError, did_you_mean, listed
from lowrank.train.metrics import METRICS
from lowrank.train.settings import TrainSettings


class BestError(LowrankError, ValueError):
    """Settings of the best checkpoint that do not go together, or with the data."""


def keeps_best(settings: TrainSettings) -> bool:
    """Whether what is saved is the best state, not the last: as asked, and with early stopping."""
    if settings.load_best_model_at_end is None:
        return settings.early_stopping_patience is not None
    return settings.load_best_model_at_end


def metric_of(settings: TrainSettings) -> str:
    """What tells the best state, by its name in METRICS; GRPO's loss says nothing of how good a model is."""
    return settings.metric_for_best_model or ("reward" if settings.task == "grpo" else "loss")


def check_best(
    settings: TrainSettings, evaluates: bool, scores: Mapping[str, float] | None = None
) -> None:
    """Raises BestError for what cannot be had. scores: of the task, once they are known."""
    problems = []
    wanted = settings.metric_for_best_model
    decides = keeps_best(settings) or settings.early_stopping_patience is not None
    if not keeps_best(settings) and wanted is not None:
        problems.append(
            "train.metric_for_best_model: nothing looks at it. Set train.load_best_model_at_end true, or "
            "train.early_stopping_patience."
        )
    if decides:
        if not evaluates:
            problems.append(
                "the best checkpoint is told by evaluations: give data.eval or data.eval_split"
            )
        if settings.save_steps is not None and settings.save_steps != settings.eval_steps:
            problems.append(
                f"train.save_steps is {settings.save_steps} and train.eval_steps {settings.eval_steps or 'null'}: what "
                "is the best has to be saved where it is measured. Set both alike, or leave save_steps out."
            )
    known = set(METRICS) if scores is None else {*scores}
    if settings.task != "grpo":
        known.add("loss")
    if decides and not known:
        problems.append("nothing is measured by which to tell the best: raise eval.generate")
    elif wanted is not None and wanted not in known:
        problems.append(
            f"train.metric_for_best_model {wanted} is none of {', '.join(sorted(known))}, which are measured here."
            f"{did_you_mean(wanted, known)}"
        )
    if problems:
        raise BestError(listed(problems))


def arguments_for_best(settings: TrainSettings) -> dict[str, Any]:
    """Of TrainingArguments."""
    if not keeps_best(settings) and settings.early_stopping_patience is None:
        return {}
    metric = metric_of(settings)
    saved = "epoch" if settings.eval_steps is None else "steps"
    return {
        "load_best_model_at_end": keeps_best(settings),
        "metric_for_best_model": f"eval_{metric}",
        "greater_is_better": METRICS[metric].higher_is_better,
        "save_strategy": saved,
        "save_steps": settings.eval_steps or 500,
    }


def stopping_early(settings: TrainSettings) -> list[Any]:
    """The callback that stops a run whose metric gets no better."""
    if settings.early_stopping_patience is None:
        return []
    from transformers import EarlyStoppingCallback

    return [
        EarlyStoppingCallback(settings.early_stopping_patience, settings.early_stopping_threshold)
    ]


def measuring(cls: Any, measure: Callable[[], Mapping[str, float]] | None) -> Any:
    """`cls`, a Trainer, whose evaluations have the scores that `measure` gives beside the loss."""
    if measure is None:
        return cls
    scores_now = measure

    class Measuring(cls):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            output = super().evaluation_loop(*args, **kwargs)
            prefix = kwargs.get("metric_key_prefix", "eval")
            scores = {f"{prefix}_{name}": value for name, value in scores_now().items()}
            output.metrics.update(scores | output.metrics)
            return output

    Measuring.__name__ = cls.__name__
    return Measuring


@dataclasses.dataclass(frozen=True)
class Best:
    """The state that a run kept."""

    step: int
    metric: str
    value: float


def best_of(trainer: Any) -> Best | None:
    """None: the last state was kept."""
    args, state = trainer.args, trainer.state
    if not args.load_best_model_at_end or not state.best_model_checkpoint:
        return None
    step = int(state.best_model_checkpoint.rpartition("-")[2])
    return Best(step, args.metric_for_best_model.removeprefix("eval_"), float(state.best_metric))
