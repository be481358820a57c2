"""What every task shares of training: a Trainer of transformers or TRL, watched and measured."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.bases.kinds import count_parameters
from lowrank.errors import LowrankError, NotTrainableError
from lowrank.train.data.encode import IGNORE
from lowrank.train.run import processes
from lowrank.train.run.best import (
    Best,
    arguments_for_best,
    best_of,
    check_best,
    measuring,
    stopping_early,
)
from lowrank.train.run.checkpoints import (
    check_same_run,
    clean,
    data_digest,
    of_settings,
    weights_digest,
)
from lowrank.train.run.memory import peak_memory, start_of_peak
from lowrank.train.run.optimizers import transformers_name
from lowrank.train.run.trackers import trackers, variables
from lowrank.train.settings import EvalSettings, TrainSettings

# transformers' "constant" has no warmup, whatever is set beside it
SCHEDULES = {"constant": "constant_with_warmup"}


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
    best: Best | None = None  # the state that was kept; None: the last


def fit(
    model: nn.Module,
    train: Any,
    evaluation: Any | None,
    output_dir: str | Path,
    settings: TrainSettings,
    eval_settings: EvalSettings | None = None,
    *,
    tokens: int,
    trainer_class: type | None = None,
    arguments_class: type | None = None,
    arguments: dict[str, Any] | None = None,
    places: Sequence[str] | None = None,
    resume_from: str | Path | None = None,
    callbacks: Sequence[Any] = (),
    measure: Callable[[], Mapping[str, float]] | None = None,
    **options: Any,
) -> Training:
    """Train what is trainable in `model`, in place, with a Trainer of `trainer_class`.

    train, evaluation: what the Trainer takes as datasets. tokens: in all of `train`, for the pace. places: where
    each row of `train` comes from ("rows.jsonl:3"), for errors.
    trainer_class: transformers' Trainer, or a subclass, as TRL's are; arguments_class: of its TrainingArguments;
    arguments: for it, over those of `settings`; options: the Trainer's own (data_collator, …).
    measure: scores of the model as it is, which each evaluation then has beside the loss.
    Writes `checkpoint-N/` and `log.jsonl` into `output_dir`; saving the result is the caller's.
    Raises NotTrainableError and NotRecognisedError before the first step; DivergedError at a step whose
    loss is not finite, with the weights as they were before that step.
    """
    trainable = count_trainable(model)
    check_recognised(model)
    check_best(settings, evaluation is not None)
    from transformers import PrinterCallback, Trainer

    from lowrank.train.run.callbacks import LogFile, Loss, Watch
    from lowrank.train.run.resuming import Finished, Whole, places_of, resumable, stopped_early
    from lowrank.train.run.stopping import Stopping

    output_dir = Path(output_dir)
    loss = options.get("compute_loss_func")
    if isinstance(loss, Loss) and evaluation:
        evaluation = evened(evaluation, (eval_settings or EvalSettings()).batch_size)
        loss.rows = len(evaluation)
    run = run_record(model, train, settings)
    early = False
    if resume_from:
        check_same_run(resume_from, run)
        early = stopped_early(Path(resume_from))
    names = trackers(settings.report_to)
    watch, stopping = Watch(model, settings.divergence_steps), Stopping(processes.first())
    log = LogFile(output_dir / "log.jsonl", append=resume_from is not None)
    with variables(names, output_dir), stopping.listening():
        cls = measuring(resumable(trainer_class or Trainer, run), measure)
        trainer = _watched(cls, watch.step)(
            model=model,
            args=training_arguments(
                settings,
                eval_settings,
                output_dir,
                evaluation is not None,
                use_cpu=next(model.parameters()).device.type == "cpu",
                cls=arguments_class,
                **(
                    {"report_to": names}
                    | processes.sharing(settings)
                    | arguments_for_best(settings)
                    | (arguments or {})
                ),
            ),
            train_dataset=train,
            eval_dataset=evaluation,
            callbacks=[
                *(watch, log, *callbacks, *stopping_early(settings), stopping, Whole(early)),
            ],
            **options,
        )
        trainer.remove_callback(PrinterCallback)
        if places is not None:
            watch.places = partial(places_of, trainer, places)
        if settings.loraplus_lr_ratio is not None:
            trainer.optimizer = _loraplus(model, trainer, settings)
        if settings.deepspeed:
            processes.announce(model)
        if processes.first():
            clean(output_dir)
        processes.wait()
        start_bytes = start_of_peak()
        try:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        except BaseException as error:  # the bar and the trackers hear of the end however it comes
            handler = trainer.callback_handler
            handler.on_train_end(trainer.args, trainer.state, trainer.control)
            if not isinstance(error, Finished):
                raise
            if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()
    rows_a_step = settings.batch_size * settings.gradient_accumulation_steps
    tokens_seen = watch.steps * rows_a_step * trainer.args.world_size * tokens / len(train)
    peak_bytes, peak_of = peak_memory()
    return Training(
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch or 0.0,
        train_loss=mean_logged(log.lines),
        history=log.lines,
        train_seconds=watch.train_seconds,
        eval_seconds=watch.eval_seconds,
        tokens_per_second=tokens_seen / max(watch.train_seconds, 1e-9),
        start_bytes=start_bytes,
        peak_bytes=peak_bytes,
        peak_of=peak_of,
        trainable_params=trainable,
        total_params=count_parameters(model)[1],
        best=best_of(trainer),
    )


def evened(rows: Sequence[dict[str, Any]], batch: int) -> Sequence[dict[str, Any]]:
    """`rows`, and more in which nothing is supervised, so that each process gets as many whole batches.

    Rows that accelerate would give twice, to that end, would count twice.
    """
    missing = -len(rows) % (batch * processes.count()) if processes.count() > 1 else 0
    if not missing:
        return rows
    labels = rows[0]["labels"]
    none = [IGNORE] * len(labels) if isinstance(labels, list) else IGNORE
    return [*rows, *[{**rows[0], "labels": none}] * missing]


def run_record(model: nn.Module, train: Any, settings: TrainSettings) -> dict[str, Any]:
    """What a checkpoint remembers of its run, so that no other goes on from it."""
    configs = getattr(model, "peft_config", {})
    return {
        **of_settings(settings),
        **{
            f"{name}.{field}": sorted(value) if isinstance(value, set) else value
            for name, config in configs.items()
            for field, value in config.to_dict().items()
        },
        "processes": processes.count(),
        "data": data_digest(train),
        "model": weights_digest(model),
    }


def mean_logged(lines: list[dict[str, float]]) -> float:
    """The mean loss over all steps, those before a resume included; each line holds that since the last."""
    steps, total = 0, 0.0
    for line in lines:
        if "loss" in line:
            total += line["loss"] * (line["step"] - steps)
            steps = int(line["step"])
    return total / max(steps, 1)


def training_arguments(
    settings: TrainSettings,
    eval_settings: EvalSettings | None,
    output_dir: Path,
    evaluate: bool,
    use_cpu: bool,
    cls: Any = None,
    **more: Any,
) -> Any:
    """transformers' TrainingArguments, or a subclass of them, for our settings; `more` goes over these."""
    from transformers import TrainingArguments

    cls = cls or TrainingArguments
    names = {f.name for f in dataclasses.fields(cls)}
    # the old name warns where the new one exists; drop it when transformers >= 6
    recompute = (
        "activation_checkpointing"
        if "activation_checkpointing" in names
        else "gradient_checkpointing"
    )
    given: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "optim": transformers_name(settings.optimizer),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": SCHEDULES.get(settings.lr_scheduler_type, settings.lr_scheduler_type),
        # below 1 it is a share of the steps
        "warmup_steps": settings.warmup_ratio
        if settings.warmup_steps is None
        else settings.warmup_steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": (eval_settings or EvalSettings()).batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "train_sampling_strategy": "group_by_length" if settings.group_by_length else "random",
        "seed": settings.seed,
        "eval_strategy": _strategy(settings.eval_steps) if evaluate else "no",
        "eval_steps": settings.eval_steps,
        "save_strategy": _strategy(settings.save_steps),
        "save_steps": settings.save_steps or 500,
        "save_total_limit": settings.save_total_limit,
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would put an older loss in place of NaN
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "use_cpu": use_cpu,
        "report_to": [],
        "run_name": output_dir.name,
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has waited
    }
    if "project" in names:  # trackio's
        given["project"] = "lowrank"
    if recompute in names:  # always named: TRL's configurations have it on
        given[recompute] = settings.gradient_checkpointing
    return cls(**(given | more))


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


def check_recognised(model: nn.Module) -> None:
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


def _watched(cls: Any, step: Any) -> Any:
    """`cls`, which puts the loss of each batch and the gradient's norm into `step`, whoever computes them."""

    class Watched(cls):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            step.losses.append(loss.detach())
            return loss

        def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
            norm = super()._get_grad_norm(*args, **kwargs)
            step.grad_norm = norm
            return norm

    Watched.__name__ = cls.__name__
    return Watched


def _loraplus(model: nn.Module, trainer: Any, settings: TrainSettings) -> torch.optim.Optimizer:
    """The Trainer's own optimiser, with LoRA+'s rates."""
    from lowrank.train.run.loraplus import create_loraplus_optimizer

    assert settings.loraplus_lr_ratio is not None
    cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    return create_loraplus_optimizer(
        model,
        cls,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        loraplus_weight_decay=settings.weight_decay,
        **options,
    )


def _strategy(steps: int | None) -> str:
    return "epoch" if steps is None else "steps"
