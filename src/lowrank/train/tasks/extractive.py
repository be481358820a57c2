"""Extractive question answering: where in a text the answer stands (Rajpurkar et al. 2016; 2018 with none)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank.errors import some
from lowrank.train.answers import squad_em, squad_f1
from lowrank.train.data.batches import collate_padded, totalled
from lowrank.train.data.encode import Encoded
from lowrank.train.data.problems import DataError
from lowrank.train.data.task_shapes import Question
from lowrank.train.evaluate import Answer, Evaluation, spread
from lowrank.train.metrics import mean
from lowrank.train.run.trainer import Training
from lowrank.train.settings import Sections
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.heads import fit_head, padded_with

LONGEST = 30  # tokens of an answer
BEST = 20  # starts and ends that are tried with each other


@dataclass(frozen=True)
class Windows(Encoded):
    """A row's text in windows: rows[i] is the question of window i, several times where its text is long."""

    # of each window its tokens' characters in the text; None for tokens of the question, and special ones
    characters: list[list[tuple[int, int] | None]] = field(default_factory=list)


def prepare(
    rows: Sequence[Question],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: Mapping[str, Any] | None = None,
) -> Windows:
    """Question and text, the text in windows that overlap by data.doc_stride tokens where it is long.

    A window's label is where the first answer starts and ends in it; token 0 twice where it is not in it.
    Raises DataError for questions that leave no room for a text.
    """
    stride = settings.data.doc_stride
    if stride is None:
        stride = min(128, max_length // 4)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    questions = tokenizer([row.question for row in rows], add_special_tokens=False, verbose=False)
    long = [
        row.where
        for row, ids in zip(rows, questions["input_ids"], strict=True)
        if room - len(ids) <= stride
    ]
    if long:
        raise DataError(
            f"{len(long)} questions leave less than data.doc_stride={stride} of {max_length} tokens to their "
            f"texts: {some(long)}.\nRaise data.max_length, or lower data.doc_stride."
        )
    encoded = tokenizer(
        [row.question for row in rows],
        [row.context for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    names = [n for n in encoded if n not in ("offset_mapping", "overflow_to_sample_mapping")]
    examples, kept, characters = [], [], []
    for i, which in enumerate(encoded["overflow_to_sample_mapping"]):
        row, parts = rows[which], encoded.sequence_ids(i)
        places = [
            tuple(place) if part == 1 else None
            for place, part in zip(encoded["offset_mapping"][i], parts, strict=True)
        ]
        labels = _span(row.answers[0], places) if row.answers else [0, 0]
        labels = [*labels, len(places)]
        examples.append({**{name: encoded[name][i] for name in names}, "labels": labels})
        kept.append(row)
        characters.append(places)
    lengths = [len(e["input_ids"]) for e in examples]
    found = {id(row) for row, e in zip(kept, examples, strict=True) if e["labels"][:2] != [0, 0]}
    nowhere = [row.where for row in rows if row.answers and id(row) not in found]
    if len(nowhere) == len(rows):
        raise DataError("nothing to learn from: no answer lies within one window of its text")
    without = sum(not row.answers for row in rows)
    return Windows(
        examples=examples,
        rows=kept,
        tokens=sum(lengths),
        supervised=3 * len(examples),
        longest=max(lengths),
        truncated=len(nowhere),  # answers that no window holds whole
        dropped=0,
        max_length=max_length,
        what=f"{len(rows)} questions" + (f", {without} without an answer" if without else ""),
        learnt=[row.answers[0][0] if row.answers else "no answer" for row in kept],
        characters=characters,
    )


def _span(answer: tuple[str, int], places: Sequence[tuple[int, int] | None]) -> list[int]:
    """The first and last token of the answer, or [0, 0]: it is not whole in this window."""
    begin, end = answer[1], answer[1] + len(answer[0])
    inside = [i for i, p in enumerate(places) if p and p[0] < end and p[1] > begin]
    there = [p for p in places if p]
    if not inside or not there or there[0][0] > begin or there[-1][1] < end:
        return [0, 0]
    return [inside[0], inside[-1]]


def total(outputs: Any, labels: Tensor) -> tuple[Tensor, int]:
    """labels (rows, 3): the first and the last token of the answer, and how many tokens the window has.

    What is filled up beyond those is no candidate, so that a window's loss does not hang on those beside it. Over
    three items a row, as many as the Trainer counts labels: each row weighs the mean of its two losses.
    """
    width = torch.arange(outputs.start_logits.shape[1], device=labels.device)
    filled = width >= labels[:, 2:]
    losses = [
        cross_entropy(logits.float().masked_fill(filled, -torch.inf), target, reduction="sum")
        for logits, target in (
            (outputs.start_logits, labels[:, 0]),
            (outputs.end_logits, labels[:, 1]),
        )
    ]
    return (losses[0] + losses[1]) * 3 / 2, labels.numel()


def train(given: Given) -> Training:
    return fit_head(given, total=total)


def score(model: nn.Module, tokenizer: Any, data: Windows, settings: Sections) -> Evaluation:
    """Exact match and F1 as SQuAD's own script has them, of the best span over all windows of a text.

    Where some of the rows have no answer, none is given if token 0 is likelier than every span.
    """
    spans: dict[int, list[tuple[float, str]]] = {id(row): [] for row in data.rows}
    nothing: dict[int, float] = {}
    collate = collate_padded(padded_with(model, tokenizer))

    def read(chosen: Sequence[int], out: Any, labels: Tensor) -> tuple[float, list[Any]]:
        windows = [
            (
                _best(start.float(), end.float(), data.characters[i], data.rows[i].context),
                float(start[0] + end[0]),
            )
            for i, start, end in zip(chosen, out.start_logits, out.end_logits, strict=True)
        ]
        return float(total(out, labels)[0]), windows

    nats, windows = totalled(read, model, data.examples, collate, settings.eval.batch_size)
    for row, (best, none) in zip(data.rows, windows, strict=True):
        spans[id(row)] += best
        nothing[id(row)] = min(none, nothing.get(id(row), none))
    rows = list({id(row): row for row in data.rows}.values())
    may_be_none = any(not row.answers for row in rows)
    answers = []
    for row in rows:
        score, text = max(spans[id(row)], default=(-torch.inf, ""))
        text = "" if may_be_none and nothing[id(row)] > score else text
        wanted = [answer for answer, _ in row.answers] or [""]
        exact = squad_em(text, wanted)
        answers.append(
            (Answer(row.question, wanted[0], text, exact == 1), exact, squad_f1(text, wanted))
        )
    scores = {
        "squad_f1": mean([f1 for _, _, f1 in answers]),
        "squad_em": mean([exact for _, exact, _ in answers]),
        "loss": nats / data.supervised,
    }
    shown = spread((answer for answer, _, _ in answers), settings.eval.generate)
    return Evaluation(scores, len(rows), 0, 0, shown)


def _best(
    start: Tensor, end: Tensor, places: Sequence[tuple[int, int] | None], context: str
) -> list[tuple[float, str]]:
    """The best span of one window, with its score: the sum of the two logits."""
    inside = torch.tensor([i for i, place in enumerate(places) if place])
    if not len(inside):
        return []
    starts, ends = (
        inside[x[inside.to(x.device)].topk(min(BEST, len(inside))).indices.cpu()].tolist()
        for x in (start, end)
    )
    pairs = [(float(start[a] + end[b]), a, b) for a in starts for b in ends if a <= b < a + LONGEST]
    if not pairs:
        return []
    value, a, b = max(pairs)
    first, last = places[a], places[b]
    assert first is not None
    assert last is not None
    return [(value, context[first[0] : last[1]].strip())]
