"""Token classification: a tag for each word, as of named entities."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowrank.train.data.batches import collate_padded, totalled
from lowrank.train.data.encode import IGNORE, Encoded
from lowrank.train.data.labels import check_known, label_options, names_of
from lowrank.train.data.problems import DataError
from lowrank.train.data.task_shapes import Tagged
from lowrank.train.evaluate import Answer, Evaluation, spread
from lowrank.train.metrics import accuracy, entities, f1_macro, f1_micro
from lowrank.train.run.trainer import Training
from lowrank.train.settings import Sections
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.heads import fit_head, padded_with


def prepare(
    rows: Sequence[Tagged],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: Mapping[str, Any] | None = None,
) -> Encoded:
    """Words, joined by spaces, as tokens; the first token of each word has its tag as label, the rest none.

    Words beyond `max_length` tokens are cut away and counted. Raises DataError for evaluation rows with tags
    that training has not, and if no word keeps its tag.
    """
    options = label_options(names_of(like) or (tag for row in rows for tag in row.tags))
    check_known([(row.where, row.tags) for row in rows], names_of(options))
    ids = options["label2id"]
    encoded = tokenizer(
        [" ".join(row.words) for row in rows],
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    names = [name for name in encoded if name != "offset_mapping"]
    examples, kept, truncated = [], [], 0
    for i, row in enumerate(rows):
        labels = [IGNORE] * len(encoded["input_ids"][i])
        for at, tag in zip(_firsts(row.words, encoded["offset_mapping"][i]), row.tags, strict=True):
            if at is not None:
                labels[at] = ids[tag]
        example = {**{name: encoded[name][i] for name in names}, "labels": labels}
        if len(labels) > max_length:
            truncated += 1
            start, stop = encoded["offset_mapping"][i][-1]
            end = int(
                start == stop
            )  # what closes every text stays: it stands for none of its characters
            example = {
                name: [*values[: max_length - end], *values[len(values) - end :]]
                for name, values in example.items()
            }
        if any(label != IGNORE for label in example["labels"]):
            examples.append(example)
            kept.append(row)
    if not examples:
        raise DataError(
            f"nothing to learn from: none of the {len(rows)} rows has a word within max_length={max_length}"
        )
    lengths = [len(e["input_ids"]) for e in examples]
    return Encoded(
        examples=examples,
        rows=kept,
        tokens=sum(lengths),
        supervised=sum(label != IGNORE for e in examples for label in e["labels"]),
        longest=max(lengths),
        truncated=truncated,
        dropped=len(rows) - len(kept),
        max_length=max_length,
        model_options=options,
        what=f"{options['num_labels']} tags",
        learnt=[_said(row.words, row.tags) for row in kept],
    )


def _firsts(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Of each of the words, joined by spaces, its first token; offsets: the characters of each token."""
    found: list[int | None] = []
    start, token = 0, 0
    for word in words:
        # a token may begin with the space before; those of length 0 are special
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        here = token < len(offsets) and offsets[token][0] < start + len(word)
        found.append(token if here else None)
        start += len(word) + 1
    return found


def total(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    tagged = labels != IGNORE
    loss = cross_entropy(outputs.logits[tagged].float(), labels[tagged], reduction="sum")
    return loss, tagged.sum()


def train(given: Given) -> Training:
    return fit_head(given, total=total)


def score(model: nn.Module, tokenizer: Any, data: Encoded, settings: Sections) -> Evaluation:
    """F1 of whole entities where tags are B-, I- and O, else of tags; a word that was cut away is O, or a miss."""
    names = names_of(data.model_options)
    missed = "O" if "O" in names else ""
    collate = collate_padded(padded_with(model, tokenizer))

    def read(chosen: Sequence[int], out: Any, labels: Tensor) -> tuple[float, list[list[str]]]:
        tags = [
            [names[k] for k in logits[row != IGNORE].argmax(-1).tolist()]
            for logits, row in zip(out.logits, labels, strict=True)
        ]
        return float(total(out, labels)[0]), tags

    nats, tags = totalled(read, model, data.examples, collate, settings.eval.batch_size)
    found = [
        given + [missed] * (len(row.words) - len(given))
        for row, given in zip(data.rows, tags, strict=True)
    ]
    expected = [row.tags for row in data.rows]
    words = [[tag for tags in side for tag in tags] for side in (expected, found)]
    scores = {}
    if all(tag == "O" or tag[1:2] in ("-", "_") for tag in names):
        scores["entity_f1"] = f1_micro(
            [entities(e) for e in expected], [entities(f) for f in found]
        )
    else:
        scores["f1_macro"] = f1_macro(*([[tag] for tag in side] for side in words))
    scores |= {"token_accuracy": accuracy(*words), "loss": nats / data.supervised}
    answers = [
        Answer(" ".join(r.words), _said(r.words, r.tags), _said(r.words, tags), r.tags == tags)
        for r, tags in spread(zip(data.rows, found, strict=True), settings.eval.generate)
    ]
    return Evaluation(scores, len(data.rows), 0, 0, answers)


def _said(words: Sequence[str], tags: Sequence[str]) -> str:
    """The words whose tag says something, each with it."""
    return ", ".join(f"{w} {t}" for w, t in zip(words, tags, strict=True) if t != "O") or "none"
