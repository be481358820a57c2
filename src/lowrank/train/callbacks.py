"""What watches a training run: the log file, the clock, the loss, the lines on the screen."""

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import TrainerCallback

from lowrank.errors import LowrankError
from lowrank.train.encode import IGNORE, Encoded
from lowrank.train.evaluate import summed_loss

# in log.jsonl under the Trainer's own names; what it computes beside them is left out
LOGGED = (
    *("loss", "grad_norm", "learning_rate"),
    # TRL's, of preferences, reward models and GRPO
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl"),
    *("margin", "accuracy", "reward", "reward_std", "frac_reward_zero_std", "entropy"),
    *("completions/mean_length", "completions/clipped_ratio"),
)
# what of them a line on the screen shows beside the loss, and its name there
SHOWN = {"rewards/margins": "margin", "margin": "margin", "reward": "reward"}


class DivergedError(LowrankError, ArithmeticError):
    """The loss is no longer a finite number."""


class Loss:
    """The loss that training minimises, and evaluation reports.

    Training: nats a supervised token of the whole optimiser step, accumulated batches and other
    processes included. Evaluation: the Trainer averages batches by rows; each is scaled so that the
    average is nats a supervised token over all evaluation rows, as `evaluate.mean_loss` has it.
    """

    def __init__(self, evaluation: Encoded | None):
        self.tokens_a_row = evaluation.supervised / len(evaluation.rows) if evaluation else 1.0

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total = summed_loss(outputs.logits, labels)
        if not torch.is_grad_enabled():
            return total / (labels.shape[0] * self.tokens_a_row)
        count = num_items_in_batch
        loss = total / ((labels[:, 1:] != IGNORE).sum() if count is None else count)
        auxiliary = getattr(outputs, "aux_loss", None)  # of a mixture of experts' router
        return loss if auxiliary is None else loss + auxiliary


class Watch(TrainerCallback):
    """Stops before the optimiser takes in a loss that is not finite, and measures the time."""

    def __init__(self, losses: list[Tensor]):
        self.losses = losses  # of the optimiser step under way, a batch each
        self.steps = 0
        self.train_seconds = 0.0
        self.eval_seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        value = float(torch.stack(self.losses).sum()) if self.losses else 0.0
        self.losses.clear()
        if value - value != 0:  # NaN or ±inf
            raise DivergedError(
                f"the loss is {value} at step {state.global_step + 1} of {state.max_steps}; training "
                "stopped before that step changed the weights.\n"
                f"Try a lower train.learning_rate (now {args.learning_rate:g}), a longer "
                "train.warmup_ratio, or model.dtype float32; look for odd rows in the data."
            )

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def on_log(self, args, state, control, logs=None, **kwargs):
        given = logs or {}
        names = [*LOGGED, *(f"eval_{name}" for name in LOGGED)]
        values = {name: given[name] for name in names if given.get(name) is not None}
        if not values:
            return
        seconds = round(time.perf_counter() - self.started, 3)
        line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **values}
        self.lines.append({**line, "seconds": seconds})
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


class Screen(TrainerCallback):
    """A progress bar on a terminal; elsewhere a plain line for each entry of the log."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.bar: Any = None
        self.loss = ""

    def on_train_begin(self, args, state, control, **kwargs):
        if self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                file=self.stream,
                unit="step",
                dynamic_ncols=True,
                leave=False,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix_str(self.loss, refresh=False)
        line = self._line(state, logs)
        if line and self.bar is not None and "eval_loss" in logs:
            self.bar.write(line, file=self.stream)
        elif line and self.bar is None:
            print(line, file=self.stream, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def _line(self, state, logs: dict[str, float]) -> str:
        where = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "loss" in logs:
            more = [f"{word} {logs[name]:.3f}" for name, word in SHOWN.items() if name in logs]
            return "  ".join([where, self.loss, *more, f"lr {logs['learning_rate']:.2e}"])
        if "eval_loss" in logs:
            return f"{where}  eval loss {logs['eval_loss']:.4f}"
        return ""
