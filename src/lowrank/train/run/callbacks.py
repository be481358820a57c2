"""What watches a training run: the log file, the clock, the loss, the gradients."""

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lowrank.errors import LowrankWarning
from lowrank.files import write_text
from lowrank.train.data.encode import IGNORE, Encoded
from lowrank.train.evaluate import summed_loss
from lowrank.train.metrics import METRICS
from lowrank.train.run import processes
from lowrank.train.run.divergence import DivergedError, GradientWatch, LossWatch, rows_words

# in log.jsonl under the Trainer's own names; what it computes beside them is left out
LOGGED = (
    *("loss", "grad_norm", "learning_rate"),
    # TRL's, of preferences, reward models and GRPO
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl"),
    *("margin", "accuracy", "reward", "reward_std", "frac_reward_zero_std", "entropy"),
    *("completions/mean_length", "completions/clipped_ratio"),
)


Total = Callable[[Any, Tensor], tuple[Tensor, Any]]


def next_tokens(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    return summed_loss(outputs.logits, labels), (labels[:, 1:] != IGNORE).sum()


class Loss:
    """The loss that training minimises, and evaluation reports.

    Training: nats a supervised token of the whole optimiser step, accumulated batches and other
    processes included. Evaluation: the Trainer averages batches by rows; each is scaled so that the
    average is nats a supervised token over all evaluation rows, as `evaluate.mean_loss` has it.

    total: (outputs, labels) → the loss summed over a batch, and over how many items; next tokens by default.
    """

    def __init__(self, evaluation: Encoded | None, total: Total = next_tokens):
        self.total = total
        self.items = evaluation.supervised if evaluation else 1
        self.rows = len(evaluation.examples) if evaluation else 1

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total, count = self.total(outputs, labels)
        if not torch.is_grad_enabled():
            # the Trainer takes it for a share of a step's, and multiplies by the number of processes
            many = 1 if num_items_in_batch is None else processes.count()
            return total / (labels.shape[0] * many) * (self.rows / self.items)
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        auxiliary = getattr(outputs, "aux_loss", None)  # of a mixture of experts' router
        return loss if auxiliary is None else loss + auxiliary


@dataclass
class Step:
    """What is known of the optimiser step under way."""

    losses: list[Tensor] = field(default_factory=list)  # a batch each
    grad_norm: Any = None


class Watch(TrainerCallback):
    """Stops before the optimiser takes in a step that went wrong, and measures the time."""

    def __init__(self, model: nn.Module, patience: int | None):
        self.step = Step()
        self.loss = LossWatch(patience)
        self.gradients = GradientWatch(model)
        # (state, number of a batch in the step) -> where its rows come from
        self.places: Callable[[Any, int], list[str]] = lambda state, batch: []
        self.steps = 0
        self.train_seconds = 0.0
        self.eval_seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        losses = torch.stack(self.step.losses).tolist() if self.step.losses else []
        norm = self.step.grad_norm
        self.step.losses.clear()
        odd = [i for i, loss in enumerate(losses) if loss - loss != 0] or range(len(losses))
        problem = self.loss.problem(sum(losses))
        rows = [place for batch in odd for place in self.places(state, batch)] if problem else []
        if norm is not None and float(norm) - float(norm) != 0:  # in every process: all are here
            given = [
                (found, places) for found, places in processes.everyones((problem, rows)) if found
            ]
            problem, rows = given[0] if given else (f"the gradient's norm is {float(norm)}", [])
        if problem:
            raise DivergedError(
                f"{problem} at step {state.global_step + 1} of {state.max_steps}; training "
                "stopped before that step changed the weights.\n"
                + (f"Its rows: {rows_words(rows)}.\n" if rows else "")
                + f"Try a lower train.learning_rate (now {args.learning_rate:g}), a longer "
                "train.warmup_ratio, or model.dtype float32; look for odd rows in the data."
            )
        if problem := self.gradients.problem(args.world_size > 1):
            warnings.warn(problem, LowrankWarning, stacklevel=2)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        self.train_seconds += time.perf_counter() - self.started
        if state.global_step == state.max_steps:  # a curve that ends where the run ended
            control.should_log = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.eval_seconds += (metrics or {}).get("eval_runtime", 0.0)


class LogFile(TrainerCallback):
    """One JSON object a line: step, epoch, seconds, and what the Trainer logged."""

    def __init__(self, path: Path, append: bool):
        self.path = path
        self.lines: list[dict[str, Any]] = read_log(path) if append and path.exists() else []
        self.started = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        # after a resume: what was logged beyond the checkpoint is trained, and logged, again
        self.lines = [line for line in self.lines if line["step"] <= state.global_step]
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def on_log(self, args, state, control, logs=None, **kwargs):
        given = logs or {}
        names = [*LOGGED, *(f"eval_{name}" for name in (*LOGGED, *METRICS))]
        values = {name: given[name] for name in names if given.get(name) is not None}
        if not values:
            return
        seconds = round(time.perf_counter() - self.started, 3)
        line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **values}
        self.lines.append({**line, "seconds": seconds})
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was cut off in writing is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
