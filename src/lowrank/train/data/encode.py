"""Rows as token ids and labels: the loss mask by position, truncation, batches."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import LowrankWarning
from lowrank.train.data.problems import BadRow, DataError, Problems
from lowrank.train.data.render import LossOn, Rendered, rendered
from lowrank.train.data.shapes import Row

IGNORE = -100  # a label that takes no part in the loss


@dataclass(frozen=True)
class Encoded:
    """Rows ready for training, and what was done to them. `examples[i]` came from `rows[i]`."""

    examples: list[dict[str, list[int]]]  # {"input_ids", "labels"}, of equal length
    rows: list[Any]  # of the type that the task takes
    tokens: int
    supervised: int  # tokens that the loss looks at
    longest: int  # tokens in the longest example
    truncated: int  # rows cut at max_length that kept a part of their answer
    dropped: int  # rows whose whole answer lay beyond max_length
    max_length: int
    what: str = ""  # is learnt, where it is not a share of the tokens: "77 classes"
    learnt: list[str] | None = None  # of each example, where it is no part of its tokens
    # what the model's configuration has to say for these rows: num_labels, id2label, …
    model_options: dict[str, Any] = field(default_factory=dict)

    def parts(self, i: int, tokenizer: Any) -> list[tuple[str, list[tuple[str, bool]]]]:
        """What there is to see of `rows[i]`: names, and parts of a text, of which True are learnt."""
        if self.learnt is None:
            return [("", segments(self.examples[i], tokenizer))]
        text = tokenizer.decode(self.examples[i]["input_ids"], clean_up_tokenization_spaces=False)
        return [("", [(f"{text} ", False), (self.learnt[i], True)])]

    @property
    def summary(self) -> str:
        what = self.what or f"{100 * self.supervised / self.tokens:.0f}% supervised"
        return (
            f"{len(self.examples)} rows, {self.tokens} tokens ({what}), "
            f"longest {self.longest}, truncated {self.truncated}, dropped {self.dropped}"
        )


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: LossOn = "completion",
    chat_template: bool = True,
) -> Encoded:
    """Token ids and labels of `rows`; a row longer than `max_length` tokens is cut at its end.

    Labels are decided by position: those of the turns that `render.rendered` tells for `loss_on`, and
    of the end-of-sequence token that closes the last, whatever ids they have. Raises DataError where
    the chat template cannot take a row, and if no row keeps a part of its answer.
    """
    examples, kept, truncated = [], [], 0
    for row, (ids, labels) in zip(
        rows, labelled(rows, tokenizer, loss_on, chat_template), strict=True
    ):
        if not teaches(labels[:max_length]):
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


def labelled(
    rows: Sequence[Row],
    tokenizer: Any,
    loss_on: LossOn = "completion",
    chat_template: bool = True,
) -> list[tuple[list[int], list[int]]]:
    """For each of `rows` its token ids and labels, of whatever length, as `encode` describes them."""
    if tokenizer.eos_token_id is None:
        warnings.warn(
            "this tokenizer has no end token: where an answer ends is not learnt, unless the chat "
            "template closes it. Set the tokenizer's eos_token.",
            LowrankWarning,
            stacklevel=3,
        )
    problems, texts, good = Problems(), [], []
    for row in rows:
        try:
            texts.append(rendered(row, tokenizer, loss_on, chat_template))
            good.append(row)
        except BadRow as bad:
            problems.add(row.where, str(bad))
    if problems.found:
        raise DataError(problems.report(len(good)))
    return [
        (ids, [token if yes else IGNORE for token, yes in zip(ids, learnt, strict=True)])
        for ids, learnt in _tokens(texts, tokenizer)
    ]


def teaches(labels: Sequence[int]) -> bool:
    """Whether something is learnt: the first token is never predicted."""
    return any(label != IGNORE for label in labels[1:])


def prompt_ids(texts: Sequence[str], tokenizer: Any, templated: bool) -> list[list[int]]:
    """Token ids of prompts: a rendered template brings its own special tokens, plain text does not."""
    if not texts:
        return []
    ids = tokenizer(
        list(texts), add_special_tokens=not templated, return_attention_mask=False, verbose=False
    )
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
        labels[:, 0] = IGNORE  # nothing predicts it, and some Trainers would count it
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate


def pad_id(tokenizer: Any) -> int:
    """An id to fill with; which one does not matter, since padding is masked by position."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def segments(example: dict[str, list[int]], tokenizer: Any) -> list[tuple[str, bool]]:
    """An example as text, cut where what is learnt begins or ends; True: learnt."""
    ids, labels = example["input_ids"], example["labels"]
    learnt = [label != IGNORE for label in labels]
    learnt[:1] = learnt[1:2]  # the first token is never predicted
    ends = [i for i in range(1, len(ids)) if learnt[i] != learnt[i - 1]] + [len(ids)]
    # each from the start of the row: decoded by itself, a part may lose the space before it
    texts = [tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) for end in ends]
    starts = ["", *texts[:-1]]
    return [
        (text[len(before) :], learnt[end - 1])
        for before, text, end in zip(starts, texts, ends, strict=True)
    ]


def _tokens(texts: Sequence[Rendered], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """For each text its ids, closed by the end token, and which of them are learnt."""
    found: list[tuple[list[int], list[bool]]] = [([], [])] * len(texts)
    eos = tokenizer.eos_token_id
    marked = [i for i, text in enumerate(texts) if text.marked is not None]
    for i in marked:
        found[i] = _by_marks(texts[i], tokenizer)
    for templated in (False, True):
        where = [i for i, t in enumerate(texts) if t.marked is None and t.templated is templated]
        # all beginnings of all texts in one call: the tokenizer has threads of its own
        parts = dict.fromkeys(
            texts[i].text[:border] for i in where for border in (*_borders(texts[i]), None)
        )
        ids = dict(zip(parts, prompt_ids(list(parts), tokenizer, templated), strict=True))
        for i in where:
            found[i] = _by_spans(texts[i], ids, tokenizer)
    special = _special(tokenizer)
    return [
        _closed(
            ids, _ended(ids, learnt, special, tokenizer) if text.templated else learnt, text, eos
        )
        for (ids, learnt), text in zip(found, texts, strict=True)
    ]


def _ended(ids: list[int], learnt: list[bool], special: set[int], tokenizer: Any) -> list[bool]:
    """Turns that end in no special token, as with marks around the words alone, end in the next one.

    That is what a model stops at, even where it begins the next turn (GLM's).
    """
    learnt = list(learnt)
    for start, end in runs(learnt):
        last = end
        while last > start and not tokenizer.decode([ids[last - 1]]).strip():
            last -= 1  # a line break after the end
        if ids[last - 1] not in special and end < len(ids) and ids[end] in special:
            learnt[end] = True
    return learnt


def _borders(text: Rendered) -> list[int]:
    return [b for span in text.spans for b in span if 0 < b < len(text.text)]


def _by_spans(
    text: Rendered, ids: dict[str, list[int]], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """The text's ids and which are learnt. ids: of the text, and of all that comes before a border."""

    def plain(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    done: list[int] = []  # ids before `base`
    base, rest, position = 0, ids[text.text], {0: 0}
    for border in _borders(text):
        head = plain(text.text[base:border]) if base else ids[text.text[:border]]
        if rest[: len(head)] != head:
            # a token straddles the border: the model will be given the prompt's own tokens
            done, base = [*done, *head], border
            head, rest = [], plain(text.text[border:])
        position[border] = len(done) + len(head)
    done += rest
    position[len(text.text)] = len(done)
    learnt = [False] * len(done)
    for start, end in text.spans:
        learnt[position[start] : position[end]] = [True] * (position[end] - position[start])
    return done, learnt


def _by_marks(text: Rendered, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The ids, and which are learnt as the template's {% generation %} marks say."""
    out = tokenizer.apply_chat_template(
        **(text.marked or {}), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, learnt = list(out["input_ids"]), [bool(mark) for mark in out["assistant_masks"]]
    return ids, learnt


def _closed(
    ids: list[int], learnt: list[bool], text: Rendered, eos: int | None
) -> tuple[list[int], list[bool]]:
    """Each learnt turn ends in its end token: what a template puts after it is not learnt.

    After the last one it is cut, and a missing end token is added.
    """
    if eos is None:
        return ids, learnt
    learnt = list(learnt)
    for start, end in runs(learnt):
        if text.templated and eos in ids[start:end]:
            after = end - ids[start:end][::-1].index(eos)
            learnt[after:end] = [False] * (end - after)
    if not text.closed or ids[-1:] == [eos]:
        return ids, learnt
    last = max((i for i, yes in enumerate(learnt) if yes), default=-1)
    if text.templated and last >= 0 and ids[last] == eos:
        return ids[: last + 1], learnt[: last + 1]
    return [*ids, eos], [*learnt, True]


def runs(learnt: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, end) of every unbroken stretch of what is learnt."""
    padded = [False, *learnt, False]
    turns = [i for i in range(len(padded) - 1) if padded[i] != padded[i + 1]]
    return list(zip(turns[::2], turns[1::2], strict=True))


def _special(tokenizer: Any) -> set[int]:
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | {tokenizer.eos_token_id}
