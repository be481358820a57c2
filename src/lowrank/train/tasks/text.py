"""Continued pretraining: every token of plain text is learnt, and long documents are cut into pieces."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lowrank.train.data.encode import IGNORE, Encoded, encode
from lowrank.train.data.problems import DataError
from lowrank.train.data.shapes import Row
from lowrank.train.evaluate import Evaluation, evaluate
from lowrank.train.settings import Sections


def prepare(
    rows: Sequence[Row],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: Mapping[str, Any] | None = None,
) -> Encoded:
    """`rows`, all of whose tokens are learnt, in pieces of up to `max_length` tokens.

    A piece begins with the last token of the one before, so that each token of a document but its
    first is predicted once. A prompt and its answer are one document.
    """
    if max_length < 2:
        raise DataError("data.max_length 1: a token is predicted from one before it, so 2 at least")
    whole = encode(
        rows,
        tokenizer,
        max_length=sys.maxsize,
        loss_on="all",
        chat_template=settings.data.chat_template,
    )
    examples, kept = [], []
    for row, example in zip(whole.rows, whole.examples, strict=True):
        for start in range(0, len(example["input_ids"]) - 1, max_length - 1):
            piece = slice(start, start + max_length)
            labels = [IGNORE, *example["labels"][piece][1:]]
            examples.append({"input_ids": example["input_ids"][piece], "labels": labels})
            kept.append(row)
    return dataclasses.replace(
        whole,
        examples=examples,
        rows=kept,
        tokens=sum(len(e["input_ids"]) for e in examples),
        longest=max(len(e["input_ids"]) for e in examples),
        max_length=max_length,
    )


def score(model: nn.Module, tokenizer: Any, data: Encoded, settings: Sections) -> Evaluation:
    """Loss and perplexity; nothing is generated."""
    return evaluate(model, tokenizer, data, batch_size=settings.eval.batch_size)
