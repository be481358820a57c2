"""`lowrank merge` and `lowrank verify` as they are called."""

import json
import math

import pytest
import tiny
import torch
from folders import WORDS, InProcess, rewrite, tensors_of, write_adapter_for, write_base

from lowrank import LoraConfig, get_peft_model
from lowrank.cli import main
from lowrank.model_folder import load_model
from lowrank.quantisation import Quantisation
from lowrank.quantising import quantise_model


@pytest.fixture
def folders(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base")
    adapter = write_adapter_for(
        base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj", "down_proj"], scale=0.3
    )
    return base, adapter, tmp_path / "merged"


def call(*words):
    return main([str(word) for word in words])


def test_merge_then_verify(folders, tmp_path, capsys):
    base, adapter, out = folders
    assert call("merge", adapter, out) == 0  # the adapter names its base
    shown = capsys.readouterr().out
    assert "written" in shown
    assert "PASSED" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if str(tmp_path) not in line)

    data = tmp_path / "data.jsonl"
    rows = [{"prompt": " ".join(WORDS[i : i + 3]), "completion": WORDS[i + 4]} for i in range(3)]
    data.write_text("\n".join(map(json.dumps, rows)))
    assert call("verify", base, adapter, out, "--data", data, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    assert result["outputs"]["inputs"] == 3
    assert result["outputs"]["perplexity_merged"] == pytest.approx(
        result["outputs"]["perplexity_adapter"], rel=1e-4
    )


def test_a_wrong_merge_ends_with_1(folders, capsys, monkeypatch):
    monkeypatch.setattr("lowrank.verify._start_probe", InProcess)
    base, adapter, out = folders
    assert call("merge", base, adapter, out, "--no-verify", "--dtype", "float32") == 0
    assert "PASSED" not in capsys.readouterr().out
    W, M = tensors_of(base), tensors_of(out)
    rewrite(out, {name: W[name] + 0.89 * (M[name] - W[name]) for name in M})
    assert call("verify", base, adapter, out, "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is False
    assert "0.890 times the adapter's change" in result["reasons"][0]


def test_a_merge_that_rounds_too_much_ends_with_1(folders, capsys, monkeypatch):
    monkeypatch.setattr("lowrank.verify._start_probe", InProcess)
    _, adapter, out = folders
    assert call("merge", adapter, out, "--dtype", "bfloat16", "--tolerance", "0.0001") == 1
    assert "--dtype float32" in " ".join(capsys.readouterr().out.split())
    assert tensors_of(out)["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "ADAPTER"], "required: OUT"),
        (["merge", "BASE", "OUT"], "holds no adapter"),
        (["merge", "ADAPTER", "ADAPTER", "--overwrite"], "which the merge reads"),
        (["merge", "ADAPTER", "FULL"], "exists. Name another"),
        (["merge", "ADAPTER", "OUT", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["verify", "ADAPTER", "OUT"], "there is no config.json in it"),
        (["verify", "ADAPTER", "BASE", "--tolerance", "7"], "7 is not a share between 0 and 1"),
        (["verify", "ADAPTER", "BASE", "--tolerance", "a"], "a is not a share between 0 and 1"),
        (["verify", "ADAPTER", "BASE", "--data", "OUT"], "no such file"),
        (["merge", "ADAPTER", "OUT", "--data", "none.jsonl"], "no such file"),
        (["merge", "ADAPTER", "OUT", "--no-verify", "--json"], "--no-verify leaves out"),
        (["merge", "BROKEN", "OUT"], "adapter_config.json is not valid JSON"),
        (
            ["merge", "BASE", "UNKNOWN", "OUT"],
            "UNKNOWN/adapter_config.json: unknown key 'lora_alfa'",
        ),
        (["merge", "ADAPTER", "FILE/out"], "FILE"),
        (["merge", "none", "ADAPTER", "OUT"], "there is no such folder here"),
    ],
)
def test_what_cannot_run_ends_with_2_and_a_sentence(folders, words, message, capsys):
    full = folders[2].with_name("full")
    full.mkdir()
    (full / "notes.txt").touch()
    (full.with_name("FILE")).touch()
    config = (folders[1] / "adapter_config.json").read_text()
    for name, text in {
        "BROKEN": "{",
        "UNKNOWN": config.replace('"r":', '"lora_alfa": 1, "r":'),
    }.items():
        full.with_name(name).mkdir()
        (full.with_name(name) / "adapter_config.json").write_text(text)
    names = dict(zip(("BASE", "ADAPTER", "OUT", "FULL"), map(str, (*folders, full)), strict=True))
    for name in ("BROKEN", "UNKNOWN", "FILE"):
        names[name] = str(full.with_name(name))

    def path(word):
        first, slash, rest = word.partition("/")
        return names.get(first, first) + slash + rest

    assert call(*map(path, words)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not folders[2].exists()


def test_an_adapter_trained_in_four_bits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lowrank.verify._start_probe", InProcess)
    base = write_base(tiny.llama(), tmp_path / "base", torch.bfloat16)
    model = load_model(base, "CAUSAL_LM").model
    quantise_model(model, Quantisation("nf4", block_size=64))
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    tiny.randomise(get_peft_model(model, config)).save_pretrained(tmp_path / "adapter")
    words = "merge", base, tmp_path / "adapter", tmp_path / "out"
    assert call(*words) == 0
    shown = capsys.readouterr().out
    assert "onto the dequantised weights" in " ".join(shown.split())
    assert shown.count("dequantised + ΔW ← written") == 1
    assert all(len(line) <= 80 for line in shown.splitlines() if str(tmp_path) not in line)

    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "the old", "completion": "keeper wrote"}\n' * 4)
    assert call(*words, "--overwrite", "--onto", "original", "--json", "--data", data) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["onto"] == "original"
    both = result["candidates"]
    assert both["quantisation"] == "nf4 in blocks of 64 (lowrank)"
    assert both["gain"] == pytest.approx(
        math.log(both["dequantised"]["perplexity_merged"] / both["original"]["perplexity_merged"])
    )
    assert "in training's form" in result["warnings"][-1]
    assert call(*words, "--overwrite", "--no-verify", "--data", data) == 0
    assert "original base" in capsys.readouterr().out
    assert call(*words, "--overwrite", "--no-verify", "--data", data, "--onto", "original") == 2
    assert "the choice that --onto makes" in capsys.readouterr().err
    assert call(*words, "--overwrite", "--trained-on", "int8") == 2
    assert "says that its base was quantised to nf4" in capsys.readouterr().err
