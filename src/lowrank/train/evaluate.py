"""What a model makes of evaluation rows: loss, perplexity, greedy answers and how right they are."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank.train.answers import ANSWER_METRICS, exact_match
from lowrank.train.data.encode import IGNORE, Encoded, pad_id, pad_right, prompt_ids
from lowrank.train.data.render import prompt_text
from lowrank.train.data.shapes import Row
from lowrank.train.metrics import METRICS, ROWS, TOKENS
from lowrank.train.run import processes
from lowrank.train.settings import EvalSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What a model made of one row, beside what was asked and expected."""

    prompt: str  # as the user put it: the last message of a conversation
    expected: str
    answer: str
    exact: bool | None  # None: the task has no right or wrong
    sampled: str | None = None  # another one, drawn


@dataclass(frozen=True)
class Evaluation:
    scores: dict[str, float]  # by their names in metrics.METRICS, the headline one first
    rows: int
    tokens: int  # that the loss looks at; 0: it is one of rows
    answered: int  # rows that were answered; 0: the task has no answers, or generation was off
    answers: list[Answer]

    @property
    def record(self) -> dict[str, Any]:
        """As run.json has it."""
        rest = {name: getattr(self, name) for name in ("rows", "tokens", "answered", "answers")}
        return {**self.scores, **rest}

    def over(self, name: str) -> str:
        """What a score was taken over, in words."""
        words = METRICS[name].over
        return (ROWS if words is TOKENS and not self.tokens else words).format(**self.record)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    data: Encoded,
    *,
    batch_size: int = 16,
    generate: int = 0,
    max_new_tokens: int = 64,
    chat_template: bool = True,
    metrics: Sequence[str] = ("exact_match", "rouge_l"),
    sampling: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Loss over all of `data`, and greedy answers to `generate` of its rows that have a prompt.

    metrics: of answers.ANSWER_METRICS. sampling: how each row is answered once more, beside the greedy answer.
    """
    loss, tokens = mean_loss(model, data.examples, pad_id(tokenizer), batch_size)
    asked = spread([row for row in data.rows if row.prompt is not None], generate)

    def said(**sampled: Any) -> list[str]:
        return answer_rows(
            model,
            tokenizer,
            asked,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            chat_template=chat_template,
            **sampled,
        )

    scores, answers = answered(asked, said, metrics, sampling)
    return Evaluation(
        scores={**scores, "loss": loss, "perplexity": perplexity(loss)},
        rows=len(data.rows),
        tokens=tokens,
        answered=len(answers),
        answers=answers,
    )


def spread(items: Iterable[T], count: int) -> list[T]:
    """`count` of `items`, at even distances, or all: a file of rows is often sorted by what they ask for."""
    items = list(items)
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def answered(
    rows: Sequence[Row],
    said: Callable[..., list[str]],
    metrics: Sequence[str],
    sampling: Mapping[str, Any] | None = None,
) -> tuple[dict[str, float], list[Answer]]:
    """The scores of generated answers to `rows`, greedy, and sampled too where `sampling` says how; empty without rows.

    said: options of `generate` → the answers. sampling: such options, and `seed`.
    """
    if not rows:
        return {}, []
    expected, greedy = [row.answer for row in rows], said(**GREEDY)
    scores = {name: ANSWER_METRICS[name](greedy, expected) for name in metrics}
    sampled: list[str | None] = [None] * len(rows)
    if sampling is not None:
        options = {**sampling}
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(options.pop("seed", 0))
            found = said(do_sample=True, **options)
        scores |= {f"sampled_{name}": ANSWER_METRICS[name](found, expected) for name in metrics}
        sampled = [*found]
    answers = [
        Answer(asked_text(row), row.answer, one, exact_match(one, row.answer), other)
        for row, one, other in zip(rows, greedy, sampled, strict=True)
    ]
    return scores, answers


def sampling_of(settings: EvalSettings) -> dict[str, Any] | None:
    """How the settings want answers sampled; None: greedy alone."""
    if not settings.temperature:
        return None
    return {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "seed": settings.seed,
    }


def mean_loss(
    model: nn.Module, examples: Sequence[dict[str, list[int]]], pad: int, batch_size: int
) -> tuple[float, int]:
    """Nats a supervised token over all `examples` together, and how many tokens that is."""
    collate, device = pad_right(pad), device_of(model)

    def summed(batch: Sequence[int]) -> tuple[float, int]:
        inputs = {n: t.to(device) for n, t in collate([examples[i] for i in batch]).items()}
        labels = inputs.pop("labels")
        nats = summed_loss(model(**inputs).logits, labels).item()
        return nats, int((labels[:, 1:] != IGNORE).sum())

    # neighbours of like length: less padding, the same sum
    alike = by_length([len(e["input_ids"]) for e in examples], batch_size)
    with evaluating(model):
        nats, tokens = zip(*processes.divided(summed, alike, model), strict=True)
    return sum(nats) / sum(tokens), sum(tokens)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Nats summed over the supervised tokens; the logits at t predict the label at t + 1.

    logits (rows, tokens, vocabulary), labels (rows, tokens). The sum is taken in float32, over the
    supervised positions alone.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE
    return cross_entropy(logits[:, :-1][supervised].float(), targets[supervised], reduction="sum")


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def answer_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    chat_template: bool = True,
    **sampling: Any,
) -> list[str]:
    """Answers to the prompts of `rows`, in their order, greedy unless `sampling` says otherwise.

    Several processes divide greedy answers among themselves, and draw the same ones.
    """
    texts = [prompt_text(row.prompt, tokenizer, chat_template, row.tools) for row in rows]
    templated = chat_template and bool(tokenizer.chat_template)
    prompts = prompt_ids(texts, tokenizer, templated)

    def said(batch: Sequence[int]) -> list[str]:
        asked = [prompts[i] for i in batch]
        return generate_batch(model, tokenizer, asked, max_new_tokens, **sampling)

    drawn = bool(sampling.get("do_sample"))
    return of_each(said, list(map(len, prompts)), batch_size, model, divide=not drawn)


def generate_batch(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, **sampling: Any
) -> list[str]:
    """The continuations of `prompts`, greedy unless `sampling` says otherwise.

    The prompts stand at the right of one batch, so that each new token follows its own prompt.
    """
    pad, width, device = pad_id(tokenizer), max(map(len, prompts)), device_of(model)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    with evaluating(model):
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **(sampling or GREEDY),
        )
    return [
        text.strip() for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    ]


# a model's own generation config may sample: what it sets has to be unset by name
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def asked_text(row: Row) -> str:
    """What a reader of samples wants to see of a prompt: its last message."""
    if isinstance(row.prompt, list):
        return row.prompt[-1]["content"]
    return row.prompt or ""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no graph; the training mode comes back whatever happens inside."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def of_each(
    work: Callable[[Sequence[int]], Sequence[T]],
    lengths: Sequence[int],
    batch_size: int,
    model: nn.Module,
    *,
    divide: bool = True,
) -> list[T]:
    """What `work` finds of each row, in their order; several processes divide the batches.

    lengths: of the rows. work: (numbers of rows of like length) → something for each.
    """
    alike = by_length(lengths, batch_size)
    with evaluating(model):
        made = processes.divided(work, alike, model) if divide else list(map(work, alike))
    return in_order(alike, made)


def in_order(alike: Sequence[Sequence[int]], found: Sequence[Sequence[T]]) -> list[T]:
    """What was `found` of each row, batch by batch, in the order of the rows' numbers."""
    pairs = [pair for batch in zip(alike, found, strict=True) for pair in zip(*batch, strict=True)]
    return [one for _, one in sorted(pairs, key=lambda pair: pair[0])]


def by_length(lengths: Sequence[int], size: int) -> list[Sequence[int]]:
    """The numbers of rows of these lengths, in batches of like length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]
