"""What makes a Trainer, of transformers or TRL, go on exactly where it was killed.

The order of rows is a function of seed and epoch alone; a checkpoint is taken where nothing is half done (a loss
between two lines of the log, an evaluation that is due); and it is whole or not there (`checkpoints.py`).
"""

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

from lowrank.train.run.checkpoints import STATE, explained, install, rotate, seal, staging
from lowrank.train.run.saving import save

MEGABATCHES = 50  # batches whose rows are sorted together


class RowOrder(Sampler[int]):
    """Row numbers in the order of `trainer`'s epoch."""

    def __init__(self, trainer: Any, rows: Any, lengths: Sequence[int] | None):
        args = trainer.args
        together = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.rows, self.trainer = rows, trainer
        self.order = partial(
            row_order, count=len(rows), lengths=lengths, batch=together, seed=args.seed
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(epoch=int(self.trainer.state.epoch or 0)))


class Reseeded(Sampler[int]):
    """A sampler with a generator of its own, whose order becomes one of seed and epoch alone."""

    def __init__(self, trainer: Any, sampler: Any):
        self.trainer, self.sampler = trainer, sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        epoch = int(self.trainer.state.epoch or 0)
        self.sampler.generator.manual_seed(self.trainer.args.seed + epoch)
        return iter(self.sampler)


def row_order(
    *, count: int, lengths: Sequence[int] | None, batch: int, seed: int, epoch: int
) -> list[int]:
    """The numbers below `count`, shuffled by seed and epoch.

    With lengths, rows of like length are neighbours, in groups of up to MEGABATCHES batches, and the longest row of
    all comes first: what does not fit into memory shows at once.
    """
    shuffled = list(range(count))
    random.Random(f"rows {seed} {epoch}").shuffle(shuffled)
    if lengths is None or not count:
        return shuffled
    size = batch * max(min(count // (batch * 4), MEGABATCHES), 1)
    groups = [
        sorted(shuffled[i : i + size], key=lambda row: -lengths[row]) for i in range(0, count, size)
    ]
    longest = max(groups, key=lambda group: lengths[group[0]])
    groups[0][0], longest[0] = longest[0], groups[0][0]
    return [row for group in groups for row in group]


def resumable(cls: type, run: Mapping[str, Any]) -> Any:
    """`cls`, a Trainer, with rows in `row_order` and whole checkpoints, which record that they are of `run`."""

    class Resumable(cls):
        def _get_train_sampler(self, *args: Any) -> Any:
            if hasattr(self, "num_generations"):  # GRPO's repeats each prompt
                return Reseeded(self, super()._get_train_sampler(*args))
            rows = args[0] if args else self.train_dataset
            grouped = self.args.train_sampling_strategy == "group_by_length"
            self.row_order = RowOrder(self, rows, lengths_of(rows) if grouped else None)
            return self.row_order

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if self.is_fsdp_enabled and hasattr(self.model, "peft_config"):
                # the Trainer would gather the base too, to write none of it
                save(self.model, Path(output_dir or self.args.output_dir))
            else:
                super().save_model(output_dir, _internal_call)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            args, step = self.args, self.state.global_step
            output_dir = Path(args.output_dir)
            folder = staging(output_dir, step) / f"checkpoint-{step}"
            final = output_dir / folder.name
            with explained(output_dir, step):
                if args.should_save:
                    shutil.rmtree(folder.parent, ignore_errors=True)
                    folder.parent.mkdir(parents=True)
                barrier(args)
                args.output_dir = str(folder.parent)
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    args.output_dir = str(output_dir)
                if self.state.best_model_checkpoint == str(folder):
                    self.state.best_model_checkpoint = str(final)
                barrier(args)  # every process has written what is its own
                if args.should_save:
                    self.state.save_to_json(str(folder / STATE))
                    seal(folder, run)
                    install(folder, final)
                    shutil.rmtree(folder.parent)
                    rotate(output_dir, args.save_total_limit, self.state.best_model_checkpoint)
            barrier(args)

    Resumable.__name__ = cls.__name__
    return Resumable


def places_of(trainer: Any, places: Sequence[str], state: Any, batch: int) -> list[str]:
    """Where the rows of this process's batch number `batch` of the step under way come from."""
    loader, args = trainer.callback_handler.train_dataloader, trainer.args
    if not hasattr(trainer, "row_order"):
        return []
    order, epoch = list(trainer.row_order), state.epoch or 0.0
    done = round((epoch - int(epoch)) * len(loader)) + batch
    start = (done * args.world_size + args.process_index) * args.train_batch_size
    return [places[row] for row in order[start : start + args.train_batch_size]]


def lengths_of(rows: Any) -> list[int] | None:
    """Tokens of each row, where rows have a `length` or `input_ids`."""
    if len(rows) and "length" in rows[0]:
        return [row["length"] for row in rows]
    if not len(rows) or "input_ids" not in rows[0]:
        return None
    return [len(row["input_ids"]) for row in rows]


def barrier(args: Any) -> None:
    if args.world_size > 1:
        torch.distributed.barrier()


class Finished(Exception):
    """The checkpoint that was resumed from is the run's last."""


class Whole(TrainerCallback):
    """Takes checkpoints where nothing is half done, and ends a resumed run that has nothing left to do."""

    def __init__(self, early_stop: bool = False):
        self.early_stop = early_stop  # the checkpoint resumed from was the last, before max_steps
        self.put_off = False

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # a resumed state has the intervals of before
        if state.global_step >= state.max_steps or self.early_stop:
            raise Finished

    def on_step_end(self, args, state, control, **kwargs):
        if not control.should_save:
            return
        # the epoch's evaluation comes next: with it behind, the resumed run need not know of it
        due = state.epoch == int(state.epoch) or control.should_training_stop
        if due and args.eval_strategy == "epoch":
            control.should_save, self.put_off = False, True
        else:
            control.should_log = True  # the loss since the last line is not in a checkpoint

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.put_off
        self.put_off = False
        control.should_log |= control.should_save


def stopped_early(checkpoint: Path) -> bool:
    """Whether the run ended with this checkpoint although steps were left: early stopping."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / STATE))
    saved = state.stateful_callbacks.get("TrainerControl", {})
    control = saved[-1] if isinstance(saved, list) else saved
    ended = control.get("attributes", {}).get("should_training_stop", False)
    return ended and state.global_step < state.max_steps
