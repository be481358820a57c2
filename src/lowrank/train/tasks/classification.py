"""Sequence classification: one class of several, several at once, or a number."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lowrank.train.data.batches import collate_padded, totalled
from lowrank.train.data.encode import Encoded
from lowrank.train.data.labels import check_known, label_options, names_of
from lowrank.train.data.problems import DataError
from lowrank.train.data.task_shapes import Label, Labelled
from lowrank.train.evaluate import Answer, Evaluation, spread
from lowrank.train.metrics import accuracy, f1_macro, f1_micro, pearson, spearman
from lowrank.train.run.trainer import Training
from lowrank.train.settings import Sections
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.heads import fit_head, padded_with


class Problem(NamedTuple):
    """One sort of label."""

    words: str
    holds: Callable[[Label], bool]
    target: Callable[[Label, list[str]], Any]  # what is learnt, of a label and the classes
    total: Callable[[Tensor, Tensor], Tensor]  # logits, targets → the summed loss
    label: Callable[[Tensor, list[str]], Label]  # of one row's logits
    scores: Callable[[list[Any], list[Any]], dict[str, float]]  # expected, found


def _scores_of_one(expected: list[str], found: list[str]) -> dict[str, float]:
    apart = ([[a] for a in expected], [[b] for b in found])
    return {"accuracy": accuracy(expected, found), "f1_macro": f1_macro(*apart)}


def _scores_of_several(expected: list[list[str]], found: list[list[str]]) -> dict[str, float]:
    """Accuracy: of the rows all of whose labels are right."""
    return {
        "f1_micro": f1_micro(expected, found),
        "f1_macro": f1_macro(expected, found),
        "accuracy": accuracy([set(e) for e in expected], [set(f) for f in found]),
    }


def _scores_of_numbers(expected: list[float], found: list[float]) -> dict[str, float]:
    return {"spearman": spearman(expected, found), "pearson": pearson(expected, found)}


# by transformers' names for config.problem_type
PROBLEMS = {
    "single_label_classification": Problem(
        "one name",
        lambda label: isinstance(label, str),
        lambda label, names: names.index(str(label)),
        lambda logits, labels: cross_entropy(logits.float(), labels, reduction="sum"),
        lambda logits, names: names[int(logits.argmax())],
        _scores_of_one,
    ),
    "multi_label_classification": Problem(
        "a list of names",
        lambda label: isinstance(label, list),
        lambda label, names: [float(name in label) for name in names],  # type: ignore[operator]
        lambda logits, labels: binary_cross_entropy_with_logits(
            logits.float(), labels.float(), reduction="sum"
        ),
        lambda logits, names: [n for n, x in zip(names, logits.tolist(), strict=True) if x > 0],
        _scores_of_several,
    ),
    "regression": Problem(
        "a number",
        lambda label: isinstance(label, float),
        lambda label, names: float(label),  # type: ignore[arg-type]
        lambda logits, labels: mse_loss(logits.float()[:, 0], labels.float(), reduction="sum"),
        lambda logits, names: float(logits[0]),
        _scores_of_numbers,
    ),
}


def prepare(
    rows: Sequence[Labelled],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: Mapping[str, Any] | None = None,
) -> Encoded:
    """Texts as tokens, cut at `max_length`, and labels as numbers.

    The classes are the names found in the training rows, in their order where they are numbers, else by
    alphabet. Raises DataError for evaluation rows with others, and for labels of more than one sort.
    """
    rows, kind = _of_one_sort(rows, settings.data.problem_type or (like or {}).get("problem_type"))
    names = names_of(like)
    options: dict[str, Any] = {"num_labels": 1}
    if kind != "regression":
        named = [(row.where, _names(row.label)) for row in rows]
        options = label_options(names or (name for _, labels in named for name in labels))
        names = names or names_of(options)
        check_known(named, names)
        if len(names) < 2:
            raise DataError(f"all rows have one label, {names}: there is nothing to tell apart")
    texts: list[Any] = [[row.text for row in rows]]
    if any(row.pair for row in rows):
        texts.append([row.pair or "" for row in rows])
    tokens = partial(tokenizer, *texts, return_attention_mask=False, verbose=False)
    encoded = tokens()
    truncated = sum(len(ids) > max_length for ids in encoded["input_ids"])
    if truncated:
        encoded = tokens(truncation=True, max_length=max_length)
    target = PROBLEMS[kind].target
    examples = [
        {**{key: encoded[key][i] for key in encoded}, "labels": target(row.label, names)}
        for i, row in enumerate(rows)
    ]
    lengths = [len(e["input_ids"]) for e in examples]
    return Encoded(
        examples=examples,
        rows=list(rows),
        tokens=sum(lengths),
        supervised=len(examples) * (len(names) if kind == "multi_label_classification" else 1),
        longest=max(lengths),
        truncated=truncated,
        dropped=0,
        max_length=max_length,
        model_options={**options, "problem_type": kind},
        what=f"{len(names)} classes" if names else "a number to learn",
        learnt=[said(row.label) for row in rows],
    )


def train(given: Given) -> Training:
    summed = PROBLEMS[given.train.model_options["problem_type"]].total

    def total(outputs: Any, labels: Tensor) -> tuple[Tensor, int]:
        return summed(outputs.logits, labels), labels.numel()

    return fit_head(given, total=total)


def score(model: nn.Module, tokenizer: Any, data: Encoded, settings: Sections) -> Evaluation:
    """Accuracy and F1, or correlations; the loss in nats, or squared, a row (and class, of several at once)."""
    kind, names = PROBLEMS[data.model_options["problem_type"]], names_of(data.model_options)
    collate = collate_padded(padded_with(model, tokenizer))

    def read(chosen: Sequence[int], out: Any, labels: Tensor) -> tuple[float, list[Label]]:
        answers = [kind.label(logits, names) for logits in out.logits]
        return float(kind.total(out.logits, labels)), answers

    loss, found = totalled(read, model, data.examples, collate, settings.eval.batch_size)
    expected = [row.label for row in data.rows]
    answers = [
        Answer(
            "\n".join(filter(None, (row.text, row.pair))),
            said(row.label),
            said(label),
            None if isinstance(row.label, float) else _names(row.label) == _names(label),
        )
        for row, label in zip(data.rows, found, strict=True)
    ]
    scores = {**kind.scores(expected, found), "loss": loss / data.supervised}
    return Evaluation(scores, len(data.rows), 0, 0, spread(answers, settings.eval.generate))


def said(label: Label) -> str:
    if isinstance(label, float):
        return f"{label:.4g}"
    return ", ".join(_names(label)) or "none"


def _names(label: Label) -> list[str]:
    return sorted(label) if isinstance(label, list) else [str(label)]


def _of_one_sort(rows: Sequence[Labelled], kind: str | None) -> tuple[Sequence[Labelled], str]:
    """The rows with labels of one sort: of `kind`, or of the sort that the first one is of."""
    if kind == "regression":  # a CSV has no numbers, and 3 may be one
        rows = [row._replace(label=_number(row)) for row in rows]
    if kind == "multi_label_classification":
        rows = [
            row._replace(label=[row.label] if isinstance(row.label, str) else row.label)
            for row in rows
        ]
    if kind is None and any(isinstance(row.label, float) for row in rows):
        return _of_one_sort(rows, "regression")
    kind = kind or next(name for name, p in PROBLEMS.items() if p.holds(rows[0].label))
    other = [row for row in rows if not PROBLEMS[kind].holds(row.label)]
    if other:
        raise DataError(
            f"labels should be {PROBLEMS[kind].words} in every row ({kind}), and at {other[0].where} "
            f"it is {other[0].label!r}.\nSay what they are with data.problem_type: {', '.join(PROBLEMS)}."
        )
    return rows, kind


def _number(row: Labelled) -> Label:
    try:
        return float(row.label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return row.label
