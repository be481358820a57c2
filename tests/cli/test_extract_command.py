"""`lowrank extract` as it is called."""

import json

import pytest
import tiny
import torch
from folders import rewrite, tensors_of, write_base

from lowrank.cli import main


@pytest.fixture
def folders(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    tuned = write_base(tiny.llama(), tmp_path / "tuned", tokenizer=False)
    tensors = tensors_of(tuned)
    torch.manual_seed(0)
    for name in tensors:
        if "q_proj" in name or "model.norm" in name:
            tensors[name] = tensors[name] + torch.randn(tensors[name].shape) * 0.1
    rewrite(tuned, tensors)
    return base, tuned, tmp_path / "adapter"


def call(*words):
    return main([str(word) for word in words])


def test_extract(folders, capsys):
    assert call("extract", *folders, "--rank", 2) == 0
    shown = capsys.readouterr().out
    assert "2 layers, rank 2" in shown
    assert "model.norm.weight" in shown
    assert "not captured" in shown
    assert call("extract", *folders, "--rank", 2, "--save-rest", "--overwrite", "--json") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["rank"] == 2
    assert [row["r"] for row in result["layers"]] == [2, 2]
    assert 0 < result["error"] < 1
    assert "held whole" in printed.err
    assert "base_model.model.model.norm.weight" in tensors_of(folders[2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments --rank --energy is required"),
        (["--energy", "2"], "at most 1"),
        (["--rank", "2", "--target-modules", "q_prj"], "q_proj"),
    ],
)
def test_what_cannot_be_done_ends_with_2(folders, words, message, capsys):
    assert call("extract", *folders, *words) == 2
    assert message in capsys.readouterr().err
    assert not folders[2].exists()
