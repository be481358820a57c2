"""How right generated answers are: text beside the expected text."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from lowrank.errors import MissingExtraError
from lowrank.train.metrics import mean


def exact_match(answer: str, expected: str) -> bool:
    """Equal apart from white space at the ends and its amount between words."""
    return answer.split() == expected.split()


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L, F1: harmonic mean of LCS/|answer| and LCS/|expected| in words (Lin 2004, §3.1, β = 1).

    Words are runs of letters and digits in lower case, as in the rouge-score package, without its
    restriction to ASCII and without stemming.
    """
    a, b = _words(answer), _words(expected)
    if not a or not b:
        return float(a == b)
    lcs = longest_common_subsequence(a, b)
    return 2 * lcs / (len(a) + len(b))


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_n(answer: str, expected: str, n: int) -> float:
    """ROUGE-N, F1: shared n-grams of words, each as often as both have it (Lin 2004, §2)."""
    a, b = (
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for words in (_words(answer), _words(expected))
    )
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def squad_words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as SQuAD's evaluation script compares them."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def squad_em(answer: str, expected: Sequence[str]) -> float:
    """1 if it is one of the expected answers."""
    return float(any(squad_words(answer) == squad_words(one) for one in expected))


def squad_f1(answer: str, expected: Sequence[str]) -> float:
    """F1 of the words shared with the nearest of the expected answers (Rajpurkar et al. 2016, §6.1)."""
    return max(_shared(squad_words(answer), squad_words(one)) for one in expected)


def _shared(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def bleu(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Corpus BLEU from 0 to 100, as sacrebleu computes it by default (Post 2018)."""
    try:
        import sacrebleu
    except ImportError:
        raise MissingExtraError(
            "BLEU needs sacrebleu: pip install 'lowrank[metrics]', or name other eval.metrics."
        ) from None
    return sacrebleu.corpus_bleu(list(answers), [list(expected)]).score


Metric = Callable[[Sequence[str], Sequence[str]], float]


def over_rows(metric: Callable[[str, str], float | bool]) -> Metric:
    """The mean over all rows of a metric of one."""
    return lambda answers, expected: mean(
        [float(metric(a, e)) for a, e in zip(answers, expected, strict=True)]
    )


# (answers, expected) -> a number; by their names in eval.metrics
ANSWER_METRICS: dict[str, Metric] = {
    "exact_match": over_rows(exact_match),
    "rouge_l": over_rows(rouge_l),
    "rouge_1": over_rows(lambda a, e: rouge_n(a, e, 1)),
    "rouge_2": over_rows(lambda a, e: rouge_n(a, e, 2)),
    "bleu": bleu,
    "squad_em": over_rows(lambda a, e: squad_em(a, [e])),
    "squad_f1": over_rows(lambda a, e: squad_f1(a, [e])),
}
