from itertools import pairwise
from types import SimpleNamespace

import pytest
import text

from lowrank.train.data.encode import IGNORE
from lowrank.train.data.problems import DataError
from lowrank.train.data.rows import Row
from lowrank.train.settings import DataSettings
from lowrank.train.tasks.table import TASKS

ROWS = [Row(None, "abcdefgh" * 5, "f:1"), Row(None, "xyz", "f:2"), Row("ask", "answer", "f:3")]


def prepared(rows, max_length):
    settings = SimpleNamespace(data=DataSettings(chat_template=False))
    return TASKS["text"].prepare(rows, text.byte_tokenizer(), settings, max_length=max_length)


def test_every_token_of_a_document_is_learnt_once_and_none_is_cut_away():
    whole = prepared(ROWS, 1000)
    assert len(whole.examples) == 3
    for length in (2, 7, 40, 41):
        cut = prepared(ROWS, length)
        assert cut.longest <= length
        for row, example in zip(ROWS, whole.examples, strict=True):
            pieces = [e for r, e in zip(cut.rows, cut.examples, strict=True) if r is row]
            learnt = [label for piece in pieces for label in piece["labels"] if label != IGNORE]
            assert learnt == example["input_ids"][1:], length
            for before, after in pairwise(pieces):
                assert after["input_ids"][0] == before["input_ids"][-1]
        assert (cut.supervised, cut.truncated, cut.dropped) == (whole.supervised, 0, 0)


def test_one_token_predicts_nothing():
    with pytest.raises(DataError, match="2 at least"):
        prepared(ROWS, 1)
