"""The numbers that tasks are measured by: how each is written, and which way is better."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Counts = dict[str, tuple[int, int, int]]


# what a metric is taken over: formats of an Evaluation's counts
ROWS = "{rows} evaluation rows"
ANSWERS = "answers to {answered} evaluation rows"
TOKENS = "{tokens} tokens of {rows} evaluation rows"
GREEDY = "greedy " + ANSWERS
SAMPLED = "as in training: " + ANSWERS


class MetricKind(NamedTuple):
    title: str
    format: str = ".3f"
    higher_is_better: bool = True
    over: str = ROWS


# by their names in run.json
METRICS = {
    "accuracy": MetricKind("accuracy", ".1%"),
    "f1_macro": MetricKind("F1, macro"),
    "f1_micro": MetricKind("F1, micro"),
    "pearson": MetricKind("Pearson's r"),
    "spearman": MetricKind("Spearman's ρ"),
    "entity_f1": MetricKind("F1 of entities"),
    "token_accuracy": MetricKind("accuracy, of words", ".1%"),
    "recall_at_1": MetricKind("recall@1", ".1%"),
    "mrr": MetricKind("MRR"),
    "exact_match": MetricKind("exact match", ".1%", over=ANSWERS),
    "rouge_l": MetricKind("ROUGE-L", over=ANSWERS),
    "rouge_1": MetricKind("ROUGE-1", over=ANSWERS),
    "rouge_2": MetricKind("ROUGE-2", over=ANSWERS),
    "bleu": MetricKind("BLEU", ".1f", over=ANSWERS),
    "squad_em": MetricKind("exact match (SQuAD)", ".1%"),
    "squad_f1": MetricKind("F1 (SQuAD)"),
    "loss": MetricKind("loss", higher_is_better=False, over=TOKENS),
    "perplexity": MetricKind("perplexity", higher_is_better=False, over=TOKENS),
    "preference_accuracy": MetricKind("preference accuracy", ".1%"),
    "reward_margin": MetricKind("reward margin"),
    "chosen_loss": MetricKind("loss on the better answers", higher_is_better=False),
    "reward": MetricKind("mean reward", over=GREEDY),
    "sampled_reward": MetricKind("mean reward, sampled", over=SAMPLED),
}
# names of those in answers.ANSWER_METRICS
OF_ANSWERS = ("exact_match", "rouge_l", "rouge_1", "rouge_2", "bleu", "squad_em", "squad_f1")
METRICS |= {
    f"sampled_{name}": METRICS[name]._replace(title=f"{METRICS[name].title}, sampled")
    for name in OF_ANSWERS
}


def accuracy(expected: Sequence[Any], found: Sequence[Any]) -> float:
    return mean([float(a == b) for a, b in zip(expected, found, strict=True)])


def f1_macro(expected: Sequence[Iterable[str]], found: Sequence[Iterable[str]]) -> float:
    """The mean of each label's F1, over the labels that are expected or found somewhere.

    Both: for each row its labels. As scikit-learn's f1_score(average="macro").
    """
    counts = _counts(expected, found)
    return mean([_f1(*count) for count in counts.values()])


def f1_micro(expected: Sequence[Iterable[str]], found: Sequence[Iterable[str]]) -> float:
    """F1 over all labels of all rows together."""
    counts = _counts(expected, found).values()
    return _f1(*(sum(column) for column in zip(*counts, strict=True))) if counts else 0.0


def _counts(expected: Sequence[Iterable[str]], found: Sequence[Iterable[str]]) -> Counts:
    """Label → how often it is right, found, expected."""
    counts: Counts = {}
    for wanted, given in zip(expected, found, strict=True):
        a, b = set(wanted), set(given)
        for label in a | b:
            right, many, meant = counts.get(label, (0, 0, 0))
            counts[label] = (right + (label in a & b), many + (label in b), meant + (label in a))
    return counts


def _f1(right: int, found: int, expected: int) -> float:
    """2·P·R / (P + R) with P = right/found and R = right/expected; 0 where nothing is right."""
    return 2 * right / (found + expected) if found + expected else 0.0


def entities(tags: Sequence[str]) -> list[str]:
    """The entities that tags name, "PER 0 2" from the first to past the last word.

    An entity begins at B (or S, U), and at I where no entity of that type goes on; it ends with E, L, S or U, as
    CoNLL's evaluation script reads tags.
    """
    found: list[list[Any]] = []
    open_type = None
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-" if tag[1:2] == "-" else "_")
        if tag == "O":
            open_type = None
            continue
        if prefix in "BSU" or kind != open_type:
            found.append([kind, i, i + 1])
        else:
            found[-1][2] = i + 1
        open_type = None if prefix in "ELSU" else kind
    return [f"{kind} {start} {end}" for kind, start, end in found]


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation; NaN where one of them is constant."""
    mx, my = mean(x), mean(y)
    over = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    under = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    return over / under if under else math.nan


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of the ranks; equal values share the mean of theirs."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end - 1) / 2
        start = end
    return ranks


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
