"""The settings of a training run, as the Python API and the YAML file's sections have them.

The texts in Annotated are what `--help` shows; a Bound is checked where settings are read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from lowrank.train.data.task_shapes import SHAPE_NAMES
from lowrank.train.metrics import OF_ANSWERS
from lowrank.train.run.optimizers import OPTIMIZERS
from lowrank.train.run.trackers import TRACKERS, known_trackers
from lowrank.train.tasks.table import TASKS, meant


class Bound(NamedTuple):
    words: str
    holds: Callable[[Any], bool]
    hint: Callable[[Any], str] = lambda value: ""  # what a wrong value may have meant


POSITIVE = Bound("above 0", lambda value: value > 0)
NOT_NEGATIVE = Bound("0 or more", lambda value: value >= 0)
COUNT = Bound("1 or more", lambda value: value >= 1)
SHARE_OR_ALL = Bound("above 0, up to 1", lambda value: 0 < value <= 1)
SHARE = Bound("from 0 to below 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class DataSettings:
    train: Annotated[
        list[str] | str | None, "file(s), folder(s), a name on the hub, or embedded:NAME"
    ] = None
    eval: Annotated[list[str] | str | None, "the same; of several splits the test part"] = None
    eval_split: Annotated[
        float | None,
        "no data.eval: rows held out of train, a share (0.1) or a number (100)",
        POSITIVE,
    ] = None
    base_skill: Annotated[
        str | None, "rows whose loss before and after shows forgetting; or embedded"
    ] = None
    max_length: Annotated[
        int | None, "tokens a row; null: 2048, or less if the model is", COUNT
    ] = None
    loss_on: Annotated[
        Literal["completion", "assistant", "last", "all"],
        "which tokens are learnt: the answer's, all of the assistant, its last turn's, or all",
    ] = "completion"
    chat_template: Annotated[bool, "put prompts through the tokenizer's chat template"] = True
    limit: Annotated[int | None, "use only the first N training rows", COUNT] = None
    shape: Annotated[
        str | None,
        f"null: told from the columns; or {', '.join(SHAPE_NAMES)}",
        Bound(f"one of {', '.join(SHAPE_NAMES)}", SHAPE_NAMES.__contains__),
    ] = None
    columns: Annotated[
        dict[str, str] | list[str] | None, "{question: prompt, …}; a list names those of a table"
    ] = None
    separator: Annotated[str | None, "between the columns of .csv, .tsv and .txt"] = None
    prompt_template: Annotated[str | None, "Jinja over a row's columns, for its prompt"] = None
    max_target_length: Annotated[
        int | None, "seq2seq: tokens an answer may have; null: max_length", COUNT
    ] = None
    doc_stride: Annotated[
        int | None,
        "question-answering: tokens that windows share; null: 128, a quarter at most",
        COUNT,
    ] = None
    problem_type: Annotated[
        Literal["single_label_classification", "multi_label_classification", "regression"] | None,
        "what a label is; null: as the first one looks",
    ] = None
    on_bad_row: Annotated[Literal["error", "skip"], "what a row that cannot be used does"] = "error"

    @property
    def reading(self) -> dict[str, Any]:
        """The options of `rows.read_data`."""
        return {name: getattr(self, name) for name in READING}


READING = ("shape", "columns", "separator", "prompt_template", "on_bad_row")


@dataclass(frozen=True)
class TrainSettings:
    """The learning rate is LoRA's: about ten times what full fine-tuning takes."""

    task: Annotated[
        str,
        f"{', '.join(TASKS)}; in YAML also task: at the top",
        Bound(f"one of {', '.join(TASKS)}", TASKS.__contains__, meant),
    ] = "sft"
    method: Annotated[Literal["lora", "full"], "train an adapter, or every weight"] = "lora"
    epochs: Annotated[float, "passes over the training rows", POSITIVE] = 3.0
    max_steps: Annotated[int | None, "optimiser steps; wins over epochs", COUNT] = None
    learning_rate: Annotated[float, "at its peak", POSITIVE] = 2e-4
    loraplus_lr_ratio: Annotated[
        float | None, "LoRA+: B is learnt at this times the rate of A; null: alike", POSITIVE
    ] = None
    optimizer: Annotated[
        str,
        f"{', '.join(OPTIMIZERS)}; 8 bits and pages are bitsandbytes'",
        Bound(f"one of {', '.join(OPTIMIZERS)}", OPTIMIZERS.__contains__),
    ] = "adamw"
    lr_scheduler_type: Annotated[
        Literal["cosine", "linear", "constant"], "the rate after warmup"
    ] = "cosine"
    warmup_ratio: Annotated[float, "share of the steps in which the rate rises", SHARE] = 0.03
    warmup_steps: Annotated[
        int | None, "steps in which the rate rises; wins over warmup_ratio", NOT_NEGATIVE
    ] = None
    batch_size: Annotated[int, "rows in one batch", COUNT] = 8
    gradient_accumulation_steps: Annotated[int, "batches summed into one optimiser step", COUNT] = 1
    weight_decay: Annotated[float, "of the optimiser", NOT_NEGATIVE] = 0.0
    max_grad_norm: Annotated[float, "gradients are clipped to this norm", POSITIVE] = 1.0
    group_by_length: Annotated[
        bool, "batch rows of like length: less padding; the longest come first"
    ] = True
    packing: Annotated[
        bool, "rows end to end up to data.max_length, apart; batch_size counts the packed ones"
    ] = False
    gradient_checkpointing: Annotated[bool, "recompute activations: less memory, slower"] = False
    seed: Annotated[int, "of the adapter's start, the order of rows and dropout", NOT_NEGATIVE] = 42
    logging_steps: Annotated[int, "steps between two lines of the log", COUNT] = 10
    eval_steps: Annotated[int | None, "steps between evaluations; null: each epoch", COUNT] = None
    save_steps: Annotated[int | None, "steps between checkpoints; null: each epoch", COUNT] = None
    save_total_limit: Annotated[int | None, "checkpoints kept; null: all", COUNT] = 2
    early_stopping_patience: Annotated[
        int | None, "stop after so many evaluations that were no better; null: never", COUNT
    ] = None
    early_stopping_threshold: Annotated[float, "what counts as better", NOT_NEGATIVE] = 0.0
    load_best_model_at_end: Annotated[
        bool | None, "save the best state, not the last; null: with early stopping"
    ] = None
    metric_for_best_model: Annotated[
        str | None, "loss, or one of the task's metrics; null: loss on data.eval, or reward"
    ] = None
    report_to: Annotated[
        list[str] | str | None,
        f"also log to {', '.join(TRACKERS)}; null: log.jsonl alone",
        Bound(f"of {', '.join(TRACKERS)}", known_trackers),
    ] = None
    fsdp: Annotated[bool, "several GPUs share the weights (FSDP2), each holding a part"] = False
    deepspeed: Annotated[str | None, "several GPUs: DeepSpeed's JSON file"] = None
    divergence_steps: Annotated[
        int | None,
        "stop when the loss is far above its start for so many steps; null: never",
        COUNT,
    ] = 50
    beta: Annotated[
        float | None,
        "dpo, kto: how far from the reference costs, null: 0.1; grpo: of KL, null: 0",
        NOT_NEGATIVE,
    ] = None
    loss_type: Annotated[str | None, "as in TRL; null: sigmoid (dpo), kto (kto), dapo (grpo)"] = (
        None
    )
    label_smoothing: Annotated[
        float | None, "dpo: share of pairs that are the wrong way round", SHARE
    ] = None
    desirable_weight: Annotated[float | None, "kto: of good answers; null: 1", POSITIVE] = None
    undesirable_weight: Annotated[float | None, "kto: of bad answers; null: 1", POSITIVE] = None
    reward_functions: Annotated[
        list[str] | str | None,
        "grpo: exact_match, final_number, format:REGEX, length:WORDS, file.py:function",
    ] = None
    reward_weights: Annotated[list[float] | None, "grpo: of each; null: 1"] = None
    num_generations: Annotated[
        int | None, "grpo: answers sampled for each prompt; null: 8", COUNT
    ] = None
    max_completion_length: Annotated[
        int | None, "grpo: tokens of an answer; null: half of data.max_length, 256 at most", COUNT
    ] = None
    temperature: Annotated[float | None, "grpo: of sampling; null: 1", POSITIVE] = None


# settings that some tasks alone have
OF_TASKS = {
    "beta": ("dpo", "kto", "grpo"),
    "loss_type": ("dpo", "kto", "grpo"),
    "label_smoothing": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reward_functions": ("grpo",),
    "reward_weights": ("grpo",),
    "num_generations": ("grpo",),
    "max_completion_length": ("grpo",),
    "temperature": ("grpo",),
}


def misplaced(settings: TrainSettings) -> list[str]:
    """What is wrong with settings that were given and belong to other tasks than theirs."""
    return [
        f"train.{name} is a setting of {' and '.join(tasks)}, and train.task is {settings.task}."
        for name, tasks in OF_TASKS.items()
        if settings.task not in tasks and getattr(settings, name) is not None
    ]


@dataclass(frozen=True)
class EvalSettings:
    batch_size: Annotated[int, "rows at once", COUNT] = 16
    generate: Annotated[
        int, "rows answered before and after training, at even distances", NOT_NEGATIVE
    ] = 64
    max_new_tokens: Annotated[int, "tokens an answer may have", COUNT] = 64
    samples: Annotated[int, "answers shown in the report", NOT_NEGATIVE] = 5
    during_training: Annotated[
        bool, "the task's metrics at each evaluation, not the loss alone"
    ] = False
    metrics: Annotated[
        list[str] | None,
        f"of answers, the headline one first; null: the task's; {', '.join(OF_ANSWERS)}",
        Bound(f"of {', '.join(OF_ANSWERS)}", set(OF_ANSWERS).issuperset),
    ] = None
    temperature: Annotated[
        float | None, "answer each row once more, sampled; null: greedy alone", POSITIVE
    ] = None
    top_p: Annotated[float, "sampling: from the likeliest tokens of this share", SHARE_OR_ALL] = 1.0
    top_k: Annotated[int, "sampling: from so many likeliest tokens; 0: all", NOT_NEGATIVE] = 0
    seed: Annotated[int, "of sampling", NOT_NEGATIVE] = 0


class Sections(Protocol):
    """What a task is told: a run's settings, or those of `lowrank evaluate`."""

    @property
    def data(self) -> DataSettings: ...
    @property
    def train(self) -> TrainSettings: ...
    @property
    def eval(self) -> EvalSettings: ...
