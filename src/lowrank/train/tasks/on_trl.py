"""TRL's trainers on our rows: made to take tokens as they are, and no second copy of the model."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from lowrank.errors import (
    AdapterNameError,
    LowrankError,
    MissingExtraError,
    TargetError,
    did_you_mean,
    listed,
)
from lowrank.layer import LoraLayer
from lowrank.train.run.trainer import Training
from lowrank.train.settings import Sections, TrainSettings
from lowrank.train.tasks.given import Given
from lowrank.trainable_tokens import TrainableTokensWrapper

# what to name in TRL, for each task
CLASSES = {
    "dpo": ("DPOTrainer", "DPOConfig"),
    "kto": ("KTOTrainer", "KTOConfig"),
    "reward": ("RewardTrainer", "RewardConfig"),
    "grpo": ("GRPOTrainer", "GRPOConfig"),
}
# TRL's losses; the first is the default. TRL has no list of them that a program could read
LOSSES = {
    "dpo": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
        *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "reward": (),
    "grpo": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
}
# β without train.beta; GRPO has no reference at 0
BETA = {"dpo": 0.1, "kto": 0.1, "grpo": 0.0}
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # the losses that have label_smoothing


class TaskSettingsError(LowrankError, ValueError):
    """Settings that do not go with the task, all of them in one text."""


def trl_class(task: str, of: int) -> Any:
    """TRL's trainer (of=0) or its configuration (of=1). Raises MissingExtraError without TRL."""
    try:
        import datasets  # noqa: F401
        import trl
    except ImportError as error:
        raise MissingExtraError(
            f"train.task {task} runs on TRL's trainers, and {error.name} is not installed: "
            "pip install 'lowrank[trl]'"
        ) from error
    return getattr(trl, CLASSES[task][of])


def beta_of(task: str, settings: TrainSettings) -> float:
    return BETA[task] if settings.beta is None else settings.beta


def check_settings(task: str, settings: Sections, more: Sequence[str] = ()) -> None:
    """Raises TaskSettingsError with everything in `settings` that `task` cannot do, and with `more`."""
    train, data, problems = settings.train, settings.data, list(more)
    loss = train.loss_type
    if loss is not None and loss not in LOSSES[task]:
        problems.append(
            f"train.loss_type {loss!r} is none of {task}'s: {', '.join(LOSSES[task]) or 'there is one only'}."
            f"{did_you_mean(loss, LOSSES[task])}"
        )
    if train.label_smoothing is not None and loss not in SMOOTHED:
        problems.append(f"train.label_smoothing is for loss_type {', '.join(SMOOTHED)}")
    if loss == "exo_pair" and not train.label_smoothing:
        problems.append("train.loss_type exo_pair needs train.label_smoothing, 0.001 in its paper")
    if loss == "robust" and (train.label_smoothing or 0) >= 0.5:
        problems.append("train.loss_type robust needs train.label_smoothing below 0.5")
    if train.packing:
        problems.append(f"train.packing is for fine-tuning; {task} compares whole answers")
    if data.loss_on != "completion":
        problems.append(
            f"data.loss_on {data.loss_on}: {task} looks at the answers, whatever it says"
        )
    if train.method == "full" and beta_of(task, train) if task in BETA else False:
        problems.append(
            f"train.method full: {task} needs the model as it was beside the one that is trained. An "
            "adapter is switched off for that (method: lora); weights would need a second copy"
        )
    if problems:
        raise TaskSettingsError(listed(problems))


def train_on_trl(
    task: str,
    given: Given,
    *,
    arguments: dict[str, Any],
    prompt_ids: Callable[[list[str]], list[list[int]]] | None = None,
    **options: Any,
) -> Training:
    """`trainer.fit` with TRL's trainer for `task`; the reference is the model with its adapters off.

    arguments: of TRL's configuration. prompt_ids: GRPO's.
    The base's own dropout is off: policy and reference have to be the same function of it, else what is
    learnt from, their difference, is noise. Raises what `fit` raises, MissingExtraError, TargetError.
    """
    model = given.model
    check_adapted(model, task)
    trainer, configuration = trainer_on(task, prompt_ids), trl_class(task, 1)
    counting = positions_by_mask(model) if task == "grpo" else nullcontext()
    with base_without_dropout(model), own_forward(model), counting, without_noise():
        return given.fit(
            dataset,
            trainer_class=trainer,
            arguments_class=configuration,
            # TRL's defaults would be: mixed precision, its own cut, and no dropout in adapters either
            arguments={"bf16": False, "disable_dropout": False, **arguments},
            processing_class=given.tokenizer,
            **options,
        )


def trainer_on(task: str, prompt_ids: Callable[[list[str]], list[list[int]]] | None = None) -> Any:
    """A subclass of TRL's trainer that leaves the rows as they are.

    TRL's own preparation would tokenise texts, in another way than fine-tuning here does; a copy of the
    adapter as reference would take memory where switching it off does as well; a README.md for each
    checkpoint and a ping to the hub are not wanted. TRL has no options for these.
    """
    from transformers.trainer_utils import EvalLoopOutput

    cls: Any = trl_class(task, 0)

    class OnTokens(cls):
        def __init__(self, model: nn.Module, args: Any, **options: Any):
            strategy = args.train_sampling_strategy
            if (
                task == "kto"
            ):  # TRL pairs rows with their neighbours; `judged_batch` does so in any order
                args.train_sampling_strategy = "sequential"
            trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
            super().__init__(model, args=args, **options)
            args.train_sampling_strategy = strategy
            for parameter, value in trained:
                parameter.data = value  # on a base in 4 bits TRL rounds adapters to bfloat16
            if "ref" in getattr(model, "peft_config", ()):
                model.delete_adapter("ref")  # type: ignore[operator]
            if task != "grpo":
                self.processing_class = None  # else it is written into every checkpoint

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            if task != "grpo":
                return super().evaluation_loop(*args, **kwargs)
            # what counts is `fit`'s measure; TRL would sample other answers, and has no loss that says much
            self.model.eval()  # by which TRL tells its numbers of training from these
            nothing: Any = None
            return EvalLoopOutput(nothing, nothing, {}, num_samples=0)

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
            assert prompt_ids is not None
            return prompt_ids(prompts), None, {}

        def _send_telemetry(self) -> None:
            pass

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            pass

    OnTokens.__name__ = cls.__name__
    return OnTokens


def dataset(examples: Sequence[dict[str, Any]]) -> Any:
    """Rows as TRL takes them."""
    from datasets import Dataset

    return Dataset.from_list(list(examples))


def check_adapted(model: Any, task: str) -> None:
    """TRL multiplies by the head's own weight: an adapter on the head would never be trained."""
    if "default" not in getattr(model, "peft_config", ("default",)):
        raise AdapterNameError(
            f"train.task {task} on TRL takes the adapter that is named default; this model has "
            f"{', '.join(model.peft_config)}"
        )
    if task not in BETA:  # a reward model has no head of words
        return
    head = model.get_output_embeddings()
    if isinstance(head, LoraLayer | TrainableTokensWrapper):
        raise TargetError(
            f"train.task {task} cannot train an adapter on the output head: TRL takes the head's "
            "weight past it. Leave the head out of lora.target_modules; with tied embeddings, leave "
            "out the embedding and lora.trainable_token_indices too."
        )


@contextmanager
def base_without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, nothing of `model` drops out but its adapters."""
    changed: list[tuple[nn.Module, str, float]] = []
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        names = ["p"] if isinstance(module, nn.Dropout) else []
        names += [n for n in vars(module) if n.endswith(("dropout", "dropout_p", "pdrop"))]
        for attribute in names:
            value = getattr(module, attribute)
            if isinstance(value, float) and value:
                changed.append((module, attribute, value))
                setattr(module, attribute, 0.0)
    try:
        yield
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)


@contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Afterwards the base has the forward of its class again: TRL puts its own in, and leaves it there."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = vars(base).get("forward")
    try:
        yield
    finally:
        if before is not None:
            base.forward = before
        else:
            vars(base).pop("forward", None)


@contextmanager
def positions_by_mask(model: Any) -> Iterator[None]:
    """Inside, a row's positions are counted from its first token, wherever in the batch that stands.

    GRPO's prompts stand at the right, and TRL leaves the positions to the model: one that counts from the
    batch's edge, as GPT-2 does, would be asked for other probabilities than those it sampled by.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        yield
        return

    def counted(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        given = any(kwargs.get(name) is not None for name in ("position_ids", "past_key_values"))
        if mask is not None and mask.ndim == 2 and not given:
            kwargs = {**kwargs, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
        return args, kwargs

    hook = base.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def without_noise() -> Iterator[None]:
    """Inside, TRL's use of names that transformers has replaced is not warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield
