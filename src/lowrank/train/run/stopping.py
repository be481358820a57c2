"""Stopping on a signal: the step under way is finished, a checkpoint saved, and the way on is said."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

# SIGTERM: schedulers and torchrun; SIGUSR1: SLURM's --signal=USR1@120; SIGINT: Ctrl-C
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


class Stopped(Exception):
    """Training was told to stop, and has saved a checkpoint. `status` is the process's exit status."""

    def __init__(self, name: str, checkpoint: Path, steps: int, max_steps: int):
        super().__init__(f"{name}: stopped after step {steps} of {max_steps}; saved {checkpoint}")
        self.checkpoint = checkpoint
        self.status = 130 if name == "SIGINT" else 0  # a scheduler asked: that is no failure


class Stopping(TrainerCallback):
    """Saves at the end of the step in which a signal came, and raises Stopped."""

    def __init__(self, speaks: bool = True):
        self.speaks = speaks  # one of several processes
        self.received = 0
        self.begun = False
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals in; afterwards they do what they did before. Only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if not self.begun:  # there is nothing to save yet
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
            return
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received and self.speaks:
            again = "; again stops at once" if number == signal.SIGINT else ""
            words = f"\n{signal.Signals(number).name}: saving a checkpoint after this step{again}\n"
            os.write(2, words.encode())  # print is not for handlers
        self.received = number

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # the processes hear of it at different steps
            heard = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            self.received = int(heard)
        if self.received:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.received:
            name = signal.Signals(self.received).name
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            raise Stopped(name, checkpoint, state.global_step, state.max_steps)
