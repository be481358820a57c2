"""Rows as token ids and labels: the loss mask by position, truncation, batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank.train.rows import DataError, Row

IGNORE = -100  # a label that takes no part in the loss


@dataclass(frozen=True)
class Encoded:
    """Rows ready for training, and what was done to them. `examples[i]` came from `rows[i]`."""

    examples: list[dict[str, list[int]]]  # {"input_ids", "labels"}, of equal length
    rows: list[Row]
    tokens: int
    supervised: int  # tokens that the loss looks at
    longest: int  # tokens in the longest example
    truncated: int  # rows cut at max_length that kept a part of their answer
    dropped: int  # rows whose whole answer lay beyond max_length
    max_length: int

    @property
    def summary(self) -> str:
        share = 100 * self.supervised / self.tokens
        return (
            f"{len(self.examples)} rows, {self.tokens} tokens ({share:.0f}% supervised), "
            f"longest {self.longest}, truncated {self.truncated}, dropped {self.dropped}"
        )


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: Literal["completion", "all"] = "completion",
    chat_template: bool = True,
) -> Encoded:
    """Token ids and labels of `rows`; a row longer than `max_length` tokens is cut at its end.

    Labels are decided by position: with `loss_on="completion"` the answer and the end-of-sequence
    token that closes it, whatever ids they have; with "all" the prompt too; of `text` rows always
    everything. Raises DataError if no row keeps a part of its answer.
    """
    prompts = [prompt_text(row.prompt, tokenizer, chat_template) for row in rows]
    texts = [
        prompt + _answer_text(row, prompt, tokenizer, chat_template)
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    templated = [_has_template(row.prompt, tokenizer, chat_template) for row in rows]
    examples, kept, truncated = [], [], 0
    for row, (ids, start) in zip(
        rows, _split_ids(prompts, texts, templated, tokenizer), strict=True
    ):
        start = 0 if loss_on == "all" else start
        labels = [IGNORE] * start + ids[start:]
        # the first token is never predicted: without a token after it nothing is learnt
        if all(label == IGNORE for label in labels[1:max_length]):
            continue
        truncated += len(ids) > max_length
        examples.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
        kept.append(row)
    if not examples:
        raise DataError(
            f"nothing to learn from: none of the {len(rows)} rows has a token of its answer within "
            f"max_length={max_length}.\nRaise data.max_length or shorten the prompts."
        )
    return Encoded(
        examples=examples,
        rows=kept,
        tokens=sum(len(e["input_ids"]) for e in examples),
        supervised=sum(label != IGNORE for e in examples for label in e["labels"][1:]),
        longest=max(len(e["input_ids"]) for e in examples),
        truncated=truncated,
        dropped=len(rows) - len(examples),
        max_length=max_length,
    )


def prompt_text(
    prompt: list[dict[str, str]] | str | None, tokenizer: Any, chat_template: bool = True
) -> str:
    """The text a model is given before it answers; a string is a user's turn if there is a template."""
    if prompt is None:
        return ""
    if not _has_template(prompt, tokenizer, chat_template):
        return prompt  # type: ignore[return-value]  # a conversation without a template has raised
    return tokenizer.apply_chat_template(_turns(prompt), tokenize=False, add_generation_prompt=True)


def prompt_ids(texts: Sequence[str], tokenizer: Any, templated: bool) -> list[list[int]]:
    """Token ids of prompts: a rendered template brings its own special tokens, plain text does not."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=not templated, return_attention_mask=False)
    if templated:
        return ids["input_ids"]
    eos = tokenizer.eos_token_id  # some tokenizers close every text with it, a prompt too
    return [row[:-1] if row and row[-1] == eos else row for row in ids["input_ids"]]


def pad_right(pad_id: int) -> Callable[[list[dict[str, list[int]]]], dict[str, Tensor]]:
    """A collator: ids (rows, longest), mask, and labels with IGNORE on the padding.

    Padding is known by position, so `pad_id` may equal any token's id, that of eos included.
    """

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(e["input_ids"]) for e in examples)
        ids = torch.full((len(examples), width), pad_id)
        labels = torch.full((len(examples), width), IGNORE)
        mask = torch.zeros((len(examples), width), dtype=torch.long)
        for i, e in enumerate(examples):
            n = len(e["input_ids"])
            ids[i, :n] = torch.tensor(e["input_ids"])
            labels[i, :n] = torch.tensor(e["labels"])
            mask[i, :n] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate


def pad_id(tokenizer: Any) -> int:
    """An id to fill with; which one does not matter, since padding is masked by position."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def _turns(prompt: list[dict[str, str]] | str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _has_template(prompt: Any, tokenizer: Any, chat_template: bool) -> bool:
    """Whether `prompt` goes through the tokenizer's chat template."""
    if prompt is None:
        return False
    usable = chat_template and bool(tokenizer.chat_template)
    if not usable and not isinstance(prompt, str):
        raise DataError(
            "these rows hold `messages`, which need a chat template: "
            + ("data.chat_template is false" if not chat_template else "this tokenizer has none")
            + ".\nUse prompt/completion rows, or a tokenizer with a chat template."
        )
    return usable


def _answer_text(row: Row, prompt: str, tokenizer: Any, chat_template: bool) -> str:
    if not _has_template(row.prompt, tokenizer, chat_template):
        return row.answer
    turns = [*_turns(row.prompt or ""), {"role": "assistant", "content": row.answer}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    # a template that renders the prompt in another way once an answer follows (it drops an old
    # thinking part, say): train on what the model will see when it has to answer
    return whole[len(prompt) :] if whole.startswith(prompt) else row.answer


def _split_ids(
    prompts: list[str], texts: list[str], templated: list[bool], tokenizer: Any
) -> list[tuple[list[int], int]]:
    """For each row its ids, closed by eos, and the position at which the answer starts."""
    split: list[tuple[list[int], int]] = [([], 0)] * len(texts)
    for flag in set(templated):
        where = [i for i, t in enumerate(templated) if t is flag]
        heads = prompt_ids([prompts[i] for i in where], tokenizer, templated=flag)
        wholes = prompt_ids([texts[i] for i in where], tokenizer, templated=flag)
        for i, head, whole in zip(where, heads, wholes, strict=True):
            head = head if prompts[i] else []
            if whole[: len(head)] != head:
                # a token straddles the border: the model will be given the prompt's own tokens
                tail = tokenizer(texts[i][len(prompts[i]) :], add_special_tokens=False)
                whole = head + tail["input_ids"]
            split[i] = (_closed(whole, len(head), flag, tokenizer.eos_token_id), len(head))
    return split


def _closed(ids: list[int], start: int, templated: bool, eos: int | None) -> list[int]:
    """`ids` ending in eos: what a template puts after it is cut, a missing one is added."""
    if eos is None or ids[-1:] == [eos]:
        return ids
    if templated and eos in ids[start:]:
        return ids[: len(ids) - ids[::-1].index(eos)]
    return [*ids, eos]
