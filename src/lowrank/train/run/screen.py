"""A run on the screen: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time
from datetime import timedelta
from typing import Any, TextIO

from transformers import TrainerCallback

from lowrank.train.metrics import METRICS
from lowrank.train.run.memory import peak_memory

# what a line shows beside the loss, and its name there
SHOWN = {"rewards/margins": "margin", "margin": "margin", "reward": "reward"}
BAR = "{n_fmt}/{total_fmt} {bar} {percentage:3.0f}%  {desc}"


class Screen(TrainerCallback):
    """The loss, tokens a second, peak memory and the time that is left."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.bar: Any = None
        self.loss = ""
        self.tokens_a_step = 0.0
        self.step_seconds = 0.0  # of all steps, without evaluations and saving
        self.first_step = 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        rows = getattr(train_dataloader, "dataset", ())
        if isinstance(rows, list) and rows and "input_ids" in rows[0]:
            tokens = sum(len(row["input_ids"]) for row in rows) / len(rows)
            batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            self.tokens_a_step = tokens * batch
        self.began, self.first_step = time.monotonic(), state.global_step
        if self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                file=self.stream,
                bar_format=BAR,
                dynamic_ncols=True,
                leave=False,
            )

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds += time.monotonic() - self.step_began
        if self.bar is not None:
            parts = [self.loss, *self._pace(state, "tok/s")]
            self.bar.set_description_str(" · ".join(filter(None, parts)), refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.bar is not None and control.should_evaluate:
            self.bar.set_description_str("evaluating")

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"
        line = self._line(state, logs)
        if line and self.bar is not None and "loss" not in logs:
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
            pace = self._pace(state, "tokens/s")
            return "  ".join([where, self.loss, *more, f"lr {logs['learning_rate']:.2e}", *pace])
        scores = {name: logs[f"eval_{name}"] for name in METRICS if f"eval_{name}" in logs}
        if not scores:
            return ""
        loss = [f"eval loss {scores.pop('loss'):.4f}"] if "loss" in scores else ["eval"]
        more = [f"{METRICS[n].title} {v:{METRICS[n].format}}" for n, v in scores.items()]
        return "  ".join([where, *loss, *more])

    def _pace(self, state, unit: str) -> list[str]:
        """Tokens a second, peak memory, time left; nothing of what is not known yet."""
        done = state.global_step - self.first_step
        if not done:
            return []
        seconds = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
        pace = self.tokens_a_step * done / max(self.step_seconds, 1e-9)
        return [
            *([f"{pace:,.0f} {unit}"] if pace else []),
            f"{peak_memory()[0] / 1e9:.2f} GB",
            f"{timedelta(seconds=round(seconds))} left",
        ]
