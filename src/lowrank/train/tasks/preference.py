"""Preferences as token ids, and what a model makes of them: rewards, their margin, how often they agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowrank.train.data.encode import IGNORE, labelled, pad_id, pad_right, segments, teaches
from lowrank.train.data.problems import DataError
from lowrank.train.data.rows import as_rows
from lowrank.train.data.shapes import Judged, Preference
from lowrank.train.evaluate import (
    Answer,
    Evaluation,
    answer_rows,
    asked_text,
    device_of,
    of_each,
    spread,
)
from lowrank.train.settings import Sections

Example = dict[str, list[int]]  # {"input_ids", "labels"}, as `encode.encode` has them


@dataclass(frozen=True)
class Preferences:
    """Pairs of answers, or judged answers, ready for training. `examples[i]` came from `rows[i]`.

    A pair's example is {"chosen", "rejected", "length"}, a judged answer's {"answer", "label", "length"}.
    """

    examples: list[dict[str, Any]]
    rows: list[Any]  # Preference or Judged
    tokens: int  # of both answers, with the prompt in each
    supervised: int  # tokens of answers
    longest: int
    truncated: int  # rows of which an answer was cut at max_length
    dropped: (
        int  # rows of which an answer lay beyond max_length, or whose answers differ only there
    )
    max_length: int
    note: str = ""  # for who reads the summary
    # what the model's configuration has to say for these rows: num_labels, …
    model_options: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[Example]:
        """All of them: chosen before rejected, row after row."""
        return [e[name] for e in self.examples for name in ANSWERS if name in e]

    def parts(self, i: int, tokenizer: Any) -> list[tuple[str, list[tuple[str, bool]]]]:
        """What there is to see of `rows[i]`: names, and parts of a text, of which True are learnt."""
        example = self.examples[i]
        if "label" in example:
            name = ", good" if example["label"] else ", bad"
            return [(name, segments(example["answer"], tokenizer))]
        return [(f", {name}", segments(example[name], tokenizer)) for name in ANSWERS[:2]]

    @property
    def summary(self) -> str:
        share = 100 * self.supervised / self.tokens
        labels = [e["label"] for e in self.examples if "label" in e]
        what = f"answers ({sum(labels)} good)" if labels else "pairs"
        return (
            f"{len(self.examples)} {what}, {self.tokens} tokens ({share:.0f}% supervised), "
            f"longest {self.longest}, truncated {self.truncated}, dropped {self.dropped}{self.note}"
        )


ANSWERS = ("chosen", "rejected", "answer")


def encode_preferences(
    rows: Sequence[Preference | Judged],
    tokenizer: Any,
    *,
    max_length: int,
    chat_template: bool = True,
) -> Preferences:
    """Token ids and labels of every answer after its prompt, as `encode.encode` makes them.

    An answer longer than `max_length` is cut at its end. A row is dropped where nothing of an answer is
    left, or the two were cut so that they are the same. Raises DataError if none stays.
    """
    flat = [(i, answer) for i, row in enumerate(rows) for _, answer in as_rows(row)]
    made: list[list[tuple[list[int], list[int]]]] = [[] for _ in rows]
    found = labelled([answer for _, answer in flat], tokenizer, "completion", chat_template)
    for (i, _), tokens in zip(flat, found, strict=True):
        made[i].append(tokens)
    examples, kept, truncated = [], [], 0
    for row, tokens_of in zip(rows, made, strict=True):
        cut: list[Example] = [
            {"input_ids": ids[:max_length], "labels": labels[:max_length]}
            for ids, labels in tokens_of
        ]
        if (cut[0] == cut[-1] and len(cut) > 1) or not all(teaches(e["labels"]) for e in cut):
            continue
        truncated += any(len(ids) > max_length for ids, _ in tokens_of)
        examples.append(_example(row, cut))
        kept.append(row)
    if not examples:
        raise DataError(
            f"nothing to learn from: none of the {len(rows)} rows has a token of its answers, or a "
            f"difference between them, within max_length={max_length}.\n"
            "Raise data.max_length or shorten the prompts."
        )
    answers = [e[name] for e in examples for name in ANSWERS if name in e]
    return Preferences(
        examples=examples,
        rows=kept,
        tokens=sum(len(a["input_ids"]) for a in answers),
        supervised=sum(label != IGNORE for a in answers for label in a["labels"][1:]),
        longest=max(e["length"] for e in examples),
        truncated=truncated,
        dropped=len(rows) - len(examples),
        max_length=max_length,
    )


def _example(row: Preference | Judged, answers: list[Example]) -> dict[str, Any]:
    length = max(len(a["input_ids"]) for a in answers)
    if isinstance(row, Judged):
        return {"answer": answers[0], "label": row.label, "length": length}
    return {"chosen": answers[0], "rejected": answers[1], "length": length}


# --- batches ----------------------------------------------------------------------------------------


def pair_batch(pad: int) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A collator: all chosen answers, then all rejected ones, padded to one width."""
    collate = pad_right(pad)

    def batch(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return _masked(collate([e["chosen"] for e in examples] + [e["rejected"] for e in examples]))

    return batch


def judged_batch(
    pad: int, pool: Sequence[dict[str, Any]]
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A collator: answers and their labels, and each prompt with the answer of another row.

    From those mismatched rows KTO estimates how far the policy is from its reference (Ethayarajh et al.
    2024, §4.2). The answer is the one of the row before in the batch, of a lone row one out of `pool`.
    """
    collate = pad_right(pad)

    def batch(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        others = [*examples[-1:], *examples[:-1]]
        if len(examples) == 1:
            others = [next((e for e in pool if e["answer"] != examples[0]["answer"]), examples[0])]
        mixed = [
            _mismatched(e["answer"], o["answer"]) for e, o in zip(examples, others, strict=True)
        ]
        found = _masked(collate([e["answer"] for e in examples]))
        found |= {f"KL_{name}": tensor for name, tensor in _masked(collate(mixed)).items()}
        return {**found, "label": torch.tensor([e["label"] for e in examples])}

    return batch


def _mismatched(asked: Example, answered: Example) -> Example:
    """The prompt of one with the answer of another, at most as long as the longer of both."""
    cut, start = _prompt_length(asked), _prompt_length(answered)
    limit = max(len(asked["input_ids"]), len(answered["input_ids"]))
    return {
        name: [*values[:cut], *answered[name][start:]][:limit] for name, values in asked.items()
    }


def _prompt_length(example: Example) -> int:
    return next(i for i, label in enumerate(example["labels"]) if label != IGNORE)


def _masked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """TRL's names: a mask of what is learnt in place of labels."""
    labels = batch.pop("labels")
    return {**batch, "completion_mask": (labels != IGNORE).long()}


# --- rewards ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewards:
    """What a model makes of evaluation rows: a reward each answer, in the order of `Preferences.answers`.

    scores, by their names in metrics.METRICS: how often a better answer gets more than a worse one (a tie
    is half), by how much on average, and where the model writes answers, its loss on the better ones.
    """

    rewards: list[float]
    scores: dict[str, float]


def implicit_rewards(
    model: Any, data: Preferences, pad: int, *, beta: float = 0.1, batch_size: int = 16
) -> Rewards:
    """β·(log π(y|x) − log π_ref(y|x)) of every answer y (Rafailov et al. 2023, §4).

    The reference π_ref is `model` with its adapters switched off; of a model without any it is the model
    itself, and every reward 0.
    """
    answers = data.answers
    policy = answer_logps(model, answers, pad, batch_size)
    reference = policy
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            reference = answer_logps(model, answers, pad, batch_size)
    rewards = [beta * (p - r) for p, r in zip(policy, reference, strict=True)]
    better = [
        (-logp, sum(label != IGNORE for label in answer["labels"][1:]))
        for logp, answer, good in zip(policy, answers, _good(data), strict=True)
        if good
    ]
    found = _compared(data, rewards)
    if better:
        nats, tokens = (sum(values) for values in zip(*better, strict=True))
        found["chosen_loss"] = nats / tokens
    return Rewards(rewards, found)


def scored_rewards(model: Any, data: Preferences, pad: int, *, batch_size: int = 16) -> Rewards:
    """What a reward model with one output gives each answer after its prompt."""
    answers = data.answers
    collate, device = pad_right(pad), device_of(model)

    def given(batch: Sequence[int]) -> list[float]:
        inputs = collate([answers[i] for i in batch])
        del inputs["labels"]
        logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        return logits[:, 0].float().tolist()

    rewards = of_each(given, _lengths(answers), batch_size, model)
    return Rewards(rewards, _compared(data, rewards))


def answer_logps(
    model: Any, answers: Sequence[Example], pad: int, batch_size: int = 16
) -> list[float]:
    """log π(answer | prompt) of each, in nats: the sum over the tokens that are learnt."""
    collate, device = pad_right(pad), device_of(model)

    def logps(batch: Sequence[int]) -> list[float]:
        inputs = {
            name: tensor.to(device) for name, tensor in collate([answers[i] for i in batch]).items()
        }
        targets = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1].float()
        nats = cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        return nats.view(targets.shape).sum(1).neg().tolist()

    return of_each(logps, _lengths(answers), batch_size, model)


def _lengths(answers: Sequence[Example]) -> list[int]:
    return [len(answer["input_ids"]) for answer in answers]


def _good(data: Preferences) -> list[bool]:
    """For each of `data.answers` whether it is the better one, or judged good."""
    found = []
    for example in data.examples:
        found += [example["label"]] if "label" in example else [True, False]
    return found


def _compared(data: Preferences, rewards: list[float]) -> dict[str, float]:
    """Pair by pair; of judged answers every good one with every bad one. Empty without any of one kind."""
    of = {
        better: torch.tensor(
            [r for r, b in zip(rewards, _good(data), strict=True) if b is better],
            dtype=torch.float64,
        )
        for better in (True, False)
    }
    good, bad = of[True], of[False]
    if not len(good) or not len(bad):
        return {}
    if "label" in data.examples[0]:
        ordered = bad.sort().values
        below, upto = (torch.searchsorted(ordered, good, right=right) for right in (False, True))
        wins = (below + upto).double() / (2 * len(bad))
    else:
        wins = (good > bad).double() + (good == bad).double() / 2
    margin = good.mean() - bad.mean()
    return {"preference_accuracy": float(wins.mean()), "reward_margin": float(margin)}


def against_reference(
    model: Any, tokenizer: Any, data: Preferences, settings: Sections, *, beta: float
) -> Evaluation:
    """Preference accuracy and reward margin against the model with its adapters off, and some answers."""
    rewards = implicit_rewards(
        model, data, pad_id(tokenizer), beta=beta, batch_size=settings.eval.batch_size
    )
    return evaluation_of(model, tokenizer, data, rewards, settings)


def evaluation_of(
    model: Any, tokenizer: Any, data: Preferences, rewards: Rewards, settings: Sections
) -> Evaluation:
    """The scores, and for the report some answers of the model beside the better ones."""
    named = [as_rows(row)[0] for row in data.rows]
    asked = [row for name, row in named if name != ", bad"]
    asked = spread(asked, min(settings.eval.generate, settings.eval.samples))
    answers = [
        Answer(asked_text(row), row.answer, text, None)
        for row, text in zip(
            asked,
            answer_rows(
                model,
                tokenizer,
                asked,
                max_new_tokens=settings.eval.max_new_tokens,
                batch_size=settings.eval.batch_size,
                chat_template=settings.data.chat_template,
            ),
            strict=True,
        )
    ]
    return Evaluation(rewards.scores, len(data.rows), data.supervised, len(answers), answers)
