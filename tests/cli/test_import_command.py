"""`lowrank import`: what it prints and writes, and that plan, preview and train take it."""

import json
import sys
from pathlib import Path

import pytest

from lowrank.cli import main
from lowrank.importing import PROGRAMS

sys.path.insert(0, str(Path(__file__).parents[1] / "importing"))

import configurations

# a CPU and two steps: float32, no quantisation, little to evaluate
SMALL = ["--model.dtype", "float32", "--quantize", "none", "--eval.generate", "0"]
SMALL += ["--max_length", "64", "--max-steps", "2", "--gradient_accumulation_steps", "1"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_translated_runs(program, tmp_path, capsys):
    out = tmp_path / "run.yaml"
    words = ["import", str(configurations.write(tmp_path, program)), "--model", "embedded"]
    assert main([*words, "--output", str(out)]) == 0
    assert f"{PROGRAMS[program].title}'s" in capsys.readouterr().out
    assert main(["plan", str(out)]) == 0
    assert main(["preview", str(out), "--rows", "1"]) == 0
    assert main(["train", str(out), *SMALL, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_printed_as_a_file_that_says_where_all_comes_from(tmp_path, capsys):
    path = configurations.write(tmp_path, "axolotl")
    assert main(["import", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "  r: 8                        # lora_r, line 19\n" in out
    assert "#   axolotl.yaml:36: lora_dropuot: 0.1: not a key of Axolotl's that is known." in out
    assert "Did you mean 'lora_dropout'" in out
    assert "3 keys that may change the result: datasets.0.shards, neftune_noise_alpha" in err


def test_strict(tmp_path, capsys):
    assert main(["import", str(configurations.write(tmp_path, "axolotl")), "--strict"]) == 1
    assert main(["import", str(configurations.write(tmp_path, "trl")), "--strict"]) == 0
    assert "may change the result" in capsys.readouterr().err


def test_as_json(tmp_path, capsys):
    assert main(["import", str(configurations.write(tmp_path, "llama-factory")), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["settings"]["lora.lora_alpha"] == {"value": 8, "source": "lora_rank, line 8"}
    assert {row["key"] for row in found["not_translated"]} >= {"plot_loss", "use_galore"}
    assert "hf_private" not in out


def test_nothing_is_overwritten(tmp_path, capsys):
    path, out = configurations.write(tmp_path, "trl"), tmp_path / "run.yaml"
    out.write_text("mine")
    assert main(["import", str(path), "--output", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["import", str(path), "--output", str(out), "--overwrite"]) == 0
    assert out.read_text().startswith("# trl.yaml")


def test_settings_that_do_not_go_together(tmp_path, capsys):
    path = tmp_path / "odd.yaml"
    path.write_text(
        "base_model: a/b\nadapter: lora\nlora_r: 4\nmicro_batch_size: 1\npeft_layer_replication: 3\n"
    )
    assert main(["import", str(path)]) == 0
    assert "peft_layer_replication" in capsys.readouterr().err
    path.write_text(
        "base_model: a/b\nadapter: lora\nlora_r: 4\nmicro_batch_size: 1\npeft_init_lora_weights: odd\n"
    )
    assert main(["import", str(path)]) == 2
    assert "do not go together" in capsys.readouterr().err


PREFERENCES = {
    "llama-factory": "stage: dpo\nmodel_name_or_path: a/b\nfinetuning_type: lora\nlora_rank: 4\npref_beta: 0.3\n"
    "pref_loss: ipo\nkto_chosen_weight: 2.0\ndeepspeed: zero2.json\n",
    "axolotl": "base_model: a/b\nadapter: lora\nlora_r: 4\nlora_alpha: 8\nmicro_batch_size: 2\nrl: grpo\n"
    "trl: {beta: 0.01, num_generations: 4, reward_funcs: [rewards.close], use_vllm: true}\n",
    "trl": "model_name_or_path: a/b\nuse_peft: true\ndataset_name: c/d\nbeta: 0.2\nloss_type: [hinge]\n"
    "desirable_weight: 1.5\nreport_to: [tensorboard]\n",
}
WANTED = {
    "llama-factory": {"task": "dpo", "beta": 0.3, "loss_type": "ipo", "deepspeed": "zero2.json"},
    "axolotl": {"task": "grpo", "beta": 0.01, "num_generations": 4, "reward_functions": ["rewards.py:close"]},
    "trl": {"task": "kto", "beta": 0.2, "desirable_weight": 1.5, "loss_type": "hinge", "report_to": ["tensorboard"]},
}  # fmt: skip


@pytest.mark.parametrize("program", PREFERENCES)
def test_preferences_and_rewards(program, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(PREFERENCES[program])
    assert main(["import", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    got = {n.removeprefix("train."): s["value"] for n, s in found["settings"].items()}
    assert {name: got[name] for name in WANTED[program]} == WANTED[program]
    if program == "llama-factory":
        (row,) = [row for row in found["not_translated"] if row["key"] == "kto_chosen_weight"]
        assert "has no meaning where dpo is trained" in row["why"]
        assert row["matters"] is False
