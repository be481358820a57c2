"""Supervised fine-tuning of a causal language model: transformers' Trainer underneath."""

import contextlib
import ctypes
import dataclasses
import gc
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.bases.kinds import count_parameters
from lowrank.errors import LowrankError, NotTrainableError
from lowrank.train.encode import Encoded, pad_id
from lowrank.train.optimizers import transformers_name
from lowrank.train.packing import check_packing, collate, pack, wants_flat
from lowrank.train.settings import EvalSettings, TrainSettings


class ResumeError(LowrankError, ValueError):
    """There is no checkpoint to go on from."""


class NotRecognisedError(LowrankError, RuntimeError):
    """transformers' Trainer does not see that this model carries an adapter."""


@dataclass(frozen=True)
class Training:
    """What a training run did. `history` is what `log.jsonl` holds, a line each."""

    steps: int
    epochs: float
    train_loss: float  # mean over the run's steps
    history: list[dict[str, float]]
    train_seconds: float  # without evaluations and saving
    eval_seconds: float
    tokens_per_second: float
    start_bytes: int  # memory when training began: the model, its adapter, the libraries
    peak_bytes: int  # and at its peak while it ran
    peak_of: str  # "process": resident memory; "cuda": allocated on the device
    trainable_params: int
    total_params: int


def train_sft(
    model: nn.Module,
    tokenizer: Any,
    train: Encoded,
    evaluation: Encoded | None,
    output_dir: str | Path,
    settings: TrainSettings,
    eval_settings: EvalSettings | None = None,
    *,
    resume_from: str | Path | None = None,
    callbacks: Sequence[Any] = (),
) -> Training:
    """Train what is trainable in `model`, in place.

    Writes `checkpoint-N/` and `log.jsonl` into `output_dir`; saving the result is the caller's.
    Raises NotTrainableError, NotRecognisedError and PackingError before the first step; DivergedError at a step
    whose loss is not finite, with the weights as they were before that step.
    """
    trainable = count_trainable(model)
    _check_recognised(model)
    from transformers import PrinterCallback, Trainer

    from lowrank.train.callbacks import LogFile, Loss, Watch

    examples = train.examples
    if settings.packing:
        check_packing(model)
        examples = pack(examples, train.max_length)
    output_dir = Path(output_dir)
    loss = Loss(evaluation)
    watch = Watch(loss)
    log = LogFile(output_dir / "log.jsonl", append=resume_from is not None)
    trainer = Trainer(
        model=model,
        args=training_arguments(
            settings,
            eval_settings,
            output_dir,
            evaluation is not None,
            use_cpu=next(model.parameters()).device.type == "cpu",
        ),
        train_dataset=examples,
        eval_dataset=evaluation.examples if evaluation else None,
        data_collator=collate(pad_id(tokenizer), wants_flat(model)),
        compute_loss_func=loss,
        callbacks=[watch, log, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    if settings.loraplus_lr_ratio is not None:
        trainer.optimizer = _loraplus(model, trainer, settings)
    start_bytes = start_of_peak()
    result = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    rows_seen = watch.steps * settings.batch_size * settings.gradient_accumulation_steps
    tokens_seen = rows_seen * train.tokens / len(examples)
    peak_bytes, peak_of = peak_memory()
    return Training(
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch or 0.0,
        train_loss=result.training_loss,
        history=log.lines,
        train_seconds=watch.train_seconds,
        eval_seconds=watch.eval_seconds,
        tokens_per_second=tokens_seen / max(watch.train_seconds, 1e-9),
        start_bytes=start_bytes,
        peak_bytes=peak_bytes,
        peak_of=peak_of,
        trainable_params=trainable,
        total_params=count_parameters(model)[1],
    )


def training_arguments(
    settings: TrainSettings,
    eval_settings: EvalSettings | None,
    output_dir: Path,
    evaluate: bool,
    use_cpu: bool,
) -> Any:
    """transformers' TrainingArguments for our settings."""
    from transformers import TrainingArguments

    names = {f.name for f in dataclasses.fields(TrainingArguments)}
    # the old name warns where the new one exists; drop it when transformers >= 6
    recompute = (
        "activation_checkpointing"
        if "activation_checkpointing" in names
        else "gradient_checkpointing"
    )
    extra: dict[str, Any] = {recompute: True} if settings.gradient_checkpointing else {}
    return TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        optim=transformers_name(settings.optimizer),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share of the steps
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=(eval_settings or EvalSettings()).batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
        seed=settings.seed,
        eval_strategy=_strategy(settings.eval_steps) if evaluate else "no",
        eval_steps=settings.eval_steps,
        save_strategy=_strategy(settings.save_steps),
        save_steps=settings.save_steps or 500,
        save_total_limit=settings.save_total_limit,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would put an older loss in place of NaN
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        use_cpu=use_cpu,
        report_to=[],
        **extra,
    )


def _loraplus(model: nn.Module, trainer: Any, settings: TrainSettings) -> torch.optim.Optimizer:
    """The Trainer's own optimiser, with LoRA+'s rates."""
    from lowrank.train.loraplus import create_loraplus_optimizer

    assert settings.loraplus_lr_ratio is not None
    cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    return create_loraplus_optimizer(
        model,
        cls,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        loraplus_weight_decay=settings.weight_decay,
        **options,
    )


def count_trainable(model: nn.Module) -> int:
    """Trainable parameters; raises NotTrainableError if there is none."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if count == 0:
        raise NotTrainableError(
            "nothing is trainable in this model: all its parameters are frozen.\n"
            "An adapter loads frozen, for inference; to train it on, load it with "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    return count


def newest_checkpoint(output_dir: str | Path) -> Path:
    """The `checkpoint-N` of the largest N that was written to its end."""
    found = sorted(
        (
            path
            for path in Path(output_dir).glob("checkpoint-*")
            if path.name.split("-")[1].isdigit() and (path / "trainer_state.json").is_file()
        ),
        key=lambda path: int(path.name.split("-")[1]),
    )
    if not found:
        raise ResumeError(
            f"no checkpoint in {output_dir}: nothing to resume.\n"
            "Start afresh without resume, or name the checkpoint's folder."
        )
    return found[-1]


def start_of_peak() -> int:
    """Memory in use now, in bytes; the peak is counted from here on, where the system lets us."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Linux, with glibc
        # what an evaluation before has freed goes back to the system: it would hide what training takes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _linux_memory("VmRSS") or peak_memory()[0]


def peak_memory() -> tuple[int, str]:
    """The largest memory since `start_of_peak`, in bytes, and of what."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "cuda"
    unit = 1 if sys.platform == "darwin" else 1024
    ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return _linux_memory("VmHWM") or ever, "process"


def _linux_memory(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _strategy(steps: int | None) -> str:
    return "epoch" if steps is None else "steps"


def _check_recognised(model: nn.Module) -> None:
    """The Trainer writes whole models, and reports no eval loss, for an adapter it does not know."""
    if not hasattr(model, "peft_config"):
        return
    from transformers.trainer_utils import _is_peft_model

    if not _is_peft_model(model):
        raise NotRecognisedError(
            f"transformers' Trainer does not recognise {type(model).__module__}."
            f"{type(model).__name__} as an adapted model, and would save whole models.\n"
            "Call lowrank.compat.install(override=True) before importing transformers, or train "
            "inside `with lowrank.compat.standing_in():`."
        )
