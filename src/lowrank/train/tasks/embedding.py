"""Sentence embeddings: texts that belong together come to lie near each other.

A text's embedding is the mean of its tokens' last hidden states, to length 1, as sentence-transformers has it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lowrank.train.data.batches import Example, collate_padded
from lowrank.train.data.encode import Encoded, pad_id
from lowrank.train.data.problems import DataError
from lowrank.train.data.task_shapes import Related
from lowrank.train.evaluate import Answer, Evaluation, device_of, of_each, spread
from lowrank.train.metrics import mean, pearson, spearman
from lowrank.train.run.trainer import Training
from lowrank.train.settings import Sections
from lowrank.train.tasks.given import Given

SCALE = 20.0  # of cosines before a softmax: 1/temperature, as in sentence-transformers
PARTS = ("anchor", "positive", "negative")


def prepare(
    rows: Sequence[Related],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: Mapping[str, Any] | None = None,
) -> Encoded:
    """The tokens of the texts of each row, each cut at `max_length`.

    Raises DataError where some rows have a score, or a negative, and some have none.
    """
    for name in ("score", "negative"):
        lacking = [row.where for row in rows if getattr(row, name) is None]
        if 0 < len(lacking) < len(rows):
            raise DataError(
                f"{len(lacking)} of {len(rows)} rows have no `{name}`, the first: {lacking[0]}; the others have one"
            )
    parts = [name for name in PARTS if getattr(rows[0], name) is not None]
    texts = tokenizer([getattr(row, name) for name in parts for row in rows], verbose=False)[
        "input_ids"
    ]
    truncated = {i % len(rows) for i, ids in enumerate(texts) if len(ids) > max_length}
    if truncated:
        texts = tokenizer(
            [getattr(row, name) for name in parts for row in rows],
            truncation=True,
            max_length=max_length,
        )["input_ids"]
    groups: dict[str, int] = {}
    examples: list[Example] = []
    for i, row in enumerate(rows):
        ids = {name: texts[k * len(rows) + i] for k, name in enumerate(parts)}
        # equal positives are no negatives of each other
        label = groups.setdefault(row.positive, len(groups)) if row.score is None else row.score
        examples.append({"input_ids": ids.pop("anchor"), **ids, "labels": label})
    return Encoded(
        examples=examples,
        rows=list(rows),
        tokens=sum(map(len, texts)),
        supervised=len(rows),
        longest=max(map(len, texts)),
        truncated=len(truncated),
        dropped=0,
        max_length=max_length,
        what="pairs with scores" if rows[0].score is not None else " + ".join(parts),
        learnt=[
            row.positive if row.score is None else f"{row.positive} ({row.score:g})" for row in rows
        ],
    )


def embed(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(texts, width), of length 1."""
    states = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"][..., None].to(states.dtype)
    return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def in_batch(anchors: Tensor, others: Tensor, groups: Tensor) -> Tensor:
    """The summed loss of telling each anchor's positive from the other rows', and from all negatives.

    −log softmax of the scaled cosines (van den Oord et al. 2018, eq. 4; Henderson et al. 2017). anchors (rows,
    width), others (rows, or twice as many with negatives, width); groups (rows): rows whose positives are one text.
    """
    cosines = SCALE * anchors @ others.T
    rows = torch.arange(len(anchors), device=cosines.device)
    same = (groups[:, None] == groups[None]) & (rows[:, None] != rows[None])
    hidden = torch.zeros_like(cosines, dtype=torch.bool)
    hidden[:, : len(anchors)] = same
    return cross_entropy(cosines.masked_fill(hidden, -torch.inf), rows, reduction="sum")


def ordered(first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
    """The loss of cosines in another order than the scores: CoSENT (Su 2022), whatever the scores' scale."""
    cosines = SCALE * (first * second).sum(-1)
    wrong = (cosines[:, None] - cosines[None]).masked_fill(
        scores[:, None] >= scores[None], -torch.inf
    )
    zero = torch.zeros(1, device=cosines.device)
    return torch.logsumexp(torch.cat([zero, wrong.flatten()]), 0) * len(first)


def batch_of(pad: int) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """A collator: all anchors, then all positives, then all negatives, as rows of one batch."""
    padded = collate_padded(pad)

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        names = [name for name in ("input_ids", *PARTS) if name in examples[0]]
        batch = padded([{"input_ids": e[name]} for name in names for e in examples])
        return {**batch, "labels": torch.tensor([e["labels"] for e in examples])}

    return collate


def train(given: Given) -> Training:
    """In-batch negatives, or the scores' order: a larger train.batch_size is a harder, better task."""
    from transformers import Trainer

    class Contrastive(Trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Tensor],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            labels = inputs.pop("labels")
            found = embed(model, inputs)
            anchors, others = found[: len(labels)], found[len(labels) :]
            loss = ordered if labels.is_floating_point() else in_batch
            count = len(labels) if num_items_in_batch is None else num_items_in_batch
            mean = loss(anchors, others, labels) / count
            return (mean, {"embeddings": found}) if return_outputs else mean

    return given.fit(
        trainer_class=Contrastive,
        data_collator=batch_of(pad_id(given.tokenizer)),
        arguments={"label_names": ["labels"]},
    )


def score(model: nn.Module, tokenizer: Any, data: Encoded, settings: Sections) -> Evaluation:
    """Of pairs: how often the nearest of all rows' positives and negatives is the own (recall@1), and MRR.

    Of pairs with scores: the rank correlation of cosines and scores.
    """
    size, pad = settings.eval.batch_size, pad_id(tokenizer)

    def embedded(name: str) -> Tensor:
        return embed_all(model, [e[name] for e in data.examples], pad, size)

    anchors, positives = embedded("input_ids"), embedded("positive")
    shown = settings.eval.generate
    if data.rows[0].score is not None:
        cosines = (anchors * positives).sum(-1).tolist()
        wanted = [row.score for row in data.rows]
        scores = {"spearman": spearman(wanted, cosines), "pearson": pearson(wanted, cosines)}
        answers = [
            Answer(f"{row.anchor}\n{row.positive}", f"{row.score:g}", f"{cosine:.3f}", None)
            for row, cosine in spread(zip(data.rows, cosines, strict=True), shown)
        ]
        return Evaluation(scores, len(data.rows), 0, 0, answers)
    texts = {row.positive: positives[i] for i, row in enumerate(data.rows)}
    if "negative" in data.examples[0]:
        negatives = embedded("negative")
        texts |= {
            row.negative: negatives[i]
            for i, row in enumerate(data.rows)
            if row.negative not in texts
        }
    names = list(texts)
    at = {name: k for k, name in enumerate(names)}
    near = anchors @ torch.stack(list(texts.values())).T  # (rows, texts)
    own = torch.tensor([at[row.positive] for row in data.rows], device=near.device)
    ranks = (near > near.gather(1, own[:, None])).sum(1) + 1
    scores = {
        "recall_at_1": mean((ranks == 1).float().tolist()),
        "mrr": mean((1 / ranks).tolist()),
    }
    nearest = [names[k] for k in near.argmax(1).tolist()]
    answers = [
        Answer(row.anchor, row.positive, text, row.positive == text)
        for row, text in spread(zip(data.rows, nearest, strict=True), shown)
    ]
    return Evaluation(scores, len(data.rows), 0, 0, answers)


def embed_all(model: nn.Module, ids: Sequence[list[int]], pad: int, batch_size: int) -> Tensor:
    """The embeddings of texts given as token ids, in their order: (texts, width), float32."""
    collate, device = collate_padded(pad), device_of(model)

    def vectors(chosen: Sequence[int]) -> Sequence[Tensor]:
        batch = collate([{"input_ids": ids[i]} for i in chosen])
        found = embed(model, {name: tensor.to(device) for name, tensor in batch.items()})
        return list(found.cpu())

    return torch.stack(of_each(vectors, list(map(len, ids)), batch_size, model)).to(device)
