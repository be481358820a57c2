"""Supervised fine-tuning of a causal language model: transformers' Trainer underneath."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.train.data.encode import Encoded, encode, pad_id
from lowrank.train.data.packing import check_packing, collate, pack, wants_flat
from lowrank.train.data.shapes import Row
from lowrank.train.evaluate import Evaluation, evaluate, sampling_of
from lowrank.train.run.trainer import Training, fit
from lowrank.train.settings import EvalSettings, Sections, TrainSettings
from lowrank.train.tasks.given import Given


def prepare(
    rows: Sequence[Row],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: Mapping[str, Any] | None = None,
) -> Encoded:
    return encode(
        rows,
        tokenizer,
        max_length=max_length,
        loss_on=settings.data.loss_on,
        chat_template=settings.data.chat_template,
    )


def train(given: Given) -> Training:
    return train_sft(
        given.model,
        given.tokenizer,
        given.train,
        given.evaluation,
        given.output_dir,
        given.settings.train,
        given.settings.eval,
        **given.options,
    )


def score(model: nn.Module, tokenizer: Any, data: Encoded, settings: Sections) -> Evaluation:
    return evaluate(
        model,
        tokenizer,
        data,
        batch_size=settings.eval.batch_size,
        generate=settings.eval.generate,
        max_new_tokens=settings.eval.max_new_tokens,
        chat_template=settings.data.chat_template,
        metrics=settings.eval.metrics or ("exact_match", "rouge_l"),
        sampling=sampling_of(settings.eval),
    )


def train_sft(
    model: nn.Module,
    tokenizer: Any,
    train: Encoded,
    evaluation: Encoded | None,
    output_dir: str | Path,
    settings: TrainSettings,
    eval_settings: EvalSettings | None = None,
    **options: Any,
) -> Training:
    """Train what is trainable in `model`, in place: `trainer.fit`, with its `options`, on the answers' tokens.

    Raises what that raises, and PackingError where the model cannot keep packed rows apart.
    """
    from lowrank.train.run.callbacks import Loss

    examples, places = train.examples, [row.where for row in train.rows]
    if settings.packing:
        check_packing(model)
        examples = pack(examples, train.max_length)
    return fit(
        model,
        examples,
        evaluation.examples if evaluation else None,
        output_dir,
        settings,
        eval_settings,
        tokens=train.tokens,
        places=None if settings.packing else places,
        data_collator=collate(pad_id(tokenizer), wants_flat(model)),
        compute_loss_func=Loss(evaluation),
        **options,
    )
