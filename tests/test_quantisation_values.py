"""`Quantisation` in files, in words, and what it refuses."""

import json

import pytest

from lowrank.errors import ConfigError
from lowrank.quantisation import Quantisation


@pytest.mark.parametrize(
    "quantisation",
    [
        Quantisation("nf4", "bitsandbytes", 64, double=True),
        Quantisation("int8", "lowrank"),
        Quantisation("int4", "gptq", 128),
    ],
)
def test_json_keeps_every_field(quantisation):
    text = json.dumps(quantisation.to_json())
    assert Quantisation.from_json(json.loads(text)) == quantisation
    assert Quantisation.from_json({**json.loads(text), "of_a_later_version": 1}) == quantisation


def test_it_says_in_words_what_it_is():
    assert str(Quantisation("nf4", "bitsandbytes", 64, True)) == (
        "nf4 in blocks of 64, doubly quantised (bitsandbytes)"
    )
    assert str(Quantisation("int8")) == "int8 by row (lowrank)"


def test_blocks_are_of_64_unless_said():
    assert Quantisation("nf4") == Quantisation("nf4", block_size=64)
    assert Quantisation("fp4", block_size=128).block_size == 128
    assert Quantisation("int8").block_size is None


def test_the_backend_does_not_decide_the_numbers():
    ours, theirs = Quantisation("nf4", "lowrank", 64), Quantisation("nf4", "bitsandbytes", 64)
    assert ours != theirs
    assert ours.rounding == theirs.rounding
    assert ours.rounding != Quantisation("nf4", "lowrank", 128).rounding


def test_the_bits_of_an_entry():
    assert [Quantisation(f).bits for f in ("nf4", "fp4", "int8", "int4", "int3")] == [4, 4, 8, 4, 3]


def test_names_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"format is one of nf4, .*not 'nf5'. Did you mean 'nf4'"):
        Quantisation("nf5")
    with pytest.raises(ConfigError, match=r"backend is one of .*Did you mean 'bitsandbytes'"):
        Quantisation("nf4", "bitsandbyte")
    with pytest.raises(ConfigError, match="name its format"):
        Quantisation.from_json({"backend": "hqq"})
