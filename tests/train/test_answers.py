"""Metrics against what other implementations, and the definitions, give."""

from statistics import correlation

import pytest

from lowrank.train.answers import ANSWER_METRICS, rouge_n, squad_em, squad_f1
from lowrank.train.metrics import (
    METRICS,
    OF_ANSWERS,
    entities,
    f1_macro,
    f1_micro,
    pearson,
    spearman,
)


def test_rouge_n():
    # shared: the (1 of 2), cat, mat; of 5 and 4 words
    assert rouge_n("the cat the mat now", "the cat mat dog", 1) == pytest.approx(2 * 3 / 9)
    assert rouge_n("The cat sat.", "the cat stood", 2) == pytest.approx(2 * 1 / 4)
    assert rouge_n("one", "two words", 2) == 0


def test_squad():
    """By SQuAD's script: without case, articles and punctuation; the nearest of several answers."""
    assert squad_em("The Eiffel Tower!", ["eiffel tower", "x"]) == 1
    assert squad_f1("tall Eiffel tower", ["a tower", "Eiffel"]) == pytest.approx(2 * 1 / 4)
    assert (squad_em("", [""]), squad_f1("", [""]), squad_f1("x", [""])) == (1, 1, 0)


def test_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    said, meant = ["the cat sat on a mat", "hello there"], ["the cat sat on the mat", "hello you"]
    assert ANSWER_METRICS["bleu"](said, meant) == sacrebleu.corpus_bleu(said, [meant]).score > 0


def test_f1():
    """Counts by hand: a: 2 right of 2 found and 3 meant; b: 1 of 2 and 1; c: 0 of 0 and 1."""
    meant, said = [["a"], ["a"], ["a"], ["b"], ["c"]], [["a"], ["a"], ["b"], ["b"], []]
    a, b = 2 * 2 / 5, 2 * 1 / 3
    assert f1_macro(meant, said) == pytest.approx((a + b + 0) / 3)
    assert f1_micro(meant, said) == pytest.approx(2 * 3 / (4 + 5))


def test_correlations():
    x, y = [1.0, 2, 3, 5, 5], [2.0, 1, 4, 6, 9]
    assert pearson(x, [2 * v - 7 for v in x]) == pytest.approx(1)
    assert pearson(x, y) == pytest.approx(correlation(x, y))
    assert spearman(x, y) == pytest.approx(pearson([0, 1, 2, 3.5, 3.5], [1, 0, 2, 3, 4]))
    assert pearson([1, 1], [1, 2]) != pearson([1, 1], [1, 2])  # NaN


def test_entities():
    tags = ["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER", "S-PER", "I-PER", "E-PER", "I-PER"]
    expected = ["PER 0 2", "LOC 3 4", "LOC 4 5", "PER 5 6", "PER 6 7", "PER 7 9", "PER 9 10"]
    assert entities(tags) == expected
    assert entities(["O", "O"]) == []


def test_every_answer_metric_has_a_name_on_the_screen():
    assert set(OF_ANSWERS) == set(ANSWER_METRICS)
    assert METRICS["sampled_rouge_l"].title == "ROUGE-L, sampled"
