"""The settings of a training run, as the Python API and the YAML file's sections have them."""

from dataclasses import dataclass
from typing import Annotated, Literal

# the text in Annotated is the line that `--help` shows


@dataclass(frozen=True)
class DataSettings:
    train: Annotated[list[str] | str | None, "JSONL file(s), or embedded:NAME"] = None
    eval: Annotated[list[str] | str | None, "JSONL file(s); embedded:NAME is its test part"] = None
    eval_split: Annotated[
        float | None, "without data.eval: rows held out of train, a share (0.1) or a number (100)"
    ] = None
    max_length: Annotated[int | None, "tokens a row; null: 2048, or less if the model is"] = None
    loss_on: Annotated[Literal["completion", "all"], "which tokens are learnt"] = "completion"
    chat_template: Annotated[bool, "put prompts through the tokenizer's chat template"] = True
    limit: Annotated[int | None, "use only the first N training rows"] = None


@dataclass(frozen=True)
class TrainSettings:
    """The learning rate is LoRA's: about ten times what full fine-tuning takes."""

    method: Annotated[Literal["lora", "full"], "train an adapter, or every weight"] = "lora"
    epochs: Annotated[float, "passes over the training rows"] = 3.0
    max_steps: Annotated[int | None, "optimiser steps; wins over epochs"] = None
    learning_rate: Annotated[float, "at its peak"] = 2e-4
    lr_scheduler_type: Annotated[
        Literal["cosine", "linear", "constant"], "the rate after warmup"
    ] = "cosine"
    warmup_ratio: Annotated[float, "share of the steps in which the rate rises"] = 0.03
    batch_size: Annotated[int, "rows in one batch"] = 8
    gradient_accumulation_steps: Annotated[int, "batches summed into one optimiser step"] = 1
    weight_decay: Annotated[float, "of AdamW"] = 0.0
    max_grad_norm: Annotated[float, "gradients are clipped to this norm"] = 1.0
    group_by_length: Annotated[bool, "batch rows of like length: less padding"] = True
    gradient_checkpointing: Annotated[bool, "recompute activations: less memory, slower"] = False
    seed: Annotated[int, "of the adapter's start, the order of rows and dropout"] = 42
    logging_steps: Annotated[int, "steps between two lines of the log"] = 10
    eval_steps: Annotated[int | None, "steps between evaluations; null: each epoch"] = None
    save_steps: Annotated[int | None, "steps between checkpoints; null: each epoch"] = None
    save_total_limit: Annotated[int | None, "checkpoints kept; null: all"] = 2


@dataclass(frozen=True)
class EvalSettings:
    batch_size: Annotated[int, "rows at once"] = 16
    generate: Annotated[int, "rows answered before and after training; 0: none"] = 64
    max_new_tokens: Annotated[int, "tokens an answer may have"] = 64
    samples: Annotated[int, "answers shown in the report"] = 5
