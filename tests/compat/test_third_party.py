"""Unmodified transformers and TRL, in a process of their own where `import peft` is lowrank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("third_party.py")
PARTS = ["trainer", "mixin", "whole", "sft", "qlora", "dpo", "reward"]
OURS = ["switched"]  # with PEFT an error: Adapter second not found in {'first'}


def run(folder, *words, parts=PARTS):
    path = os.pathsep.join([str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *words, str(PROGRAM), str(folder), *parts],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("FOUND ")[2])


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    found = run(tmp_path_factory.mktemp("ours"), "-m", "lowrank.compat", parts=PARTS + OURS)
    assert found["class"] == "lowrank.peft"
    return found


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    found = run(tmp_path_factory.mktemp("theirs"))
    assert found["class"] == "peft.peft_model"
    return found


def falls(losses):
    return len(losses) == 3 and losses[-1] < losses[0]


def test_trainer_trains_evaluates_and_resumes(ours):
    found = ours["trainer"]
    assert falls(found["losses"])
    assert falls(found["eval"])  # absent for a model that the Trainer does not recognise
    assert found["resumed"] == found["losses"]
    assert found["adapter files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert len(found["keys"]) == 2 * 2 * 3


def test_the_adapter_methods_of_transformers_models(ours):
    found = ours["mixin"]
    assert found["first"] != found["plain"]
    assert found["second"] not in (found["plain"], found["first"])
    assert found["disabled is plain"]
    assert found["back is first"]
    assert found["active"] == ["second"]
    assert found["left"] == [["first"], ["first"]]
    assert found["loaded"] == found["first"] == found["loaded again"]
    assert found["trainable"] > 0
    assert found["said"].startswith("abc")


def test_dora_and_whole_modules_through_transformers_own_loading(ours):
    found = ours["whole"]
    assert found["before"] == found["loaded"] == found["with PeftModel"]


def test_two_adapters_that_save_the_same_module(ours):
    found = ours["switched"]
    assert found["first again"] == found["enabled"] == found["first"] != found["second"]
    assert found["disabled"] == ours["mixin"]["plain"]


def test_sft_trainer(ours):
    assert falls(ours["sft"]["losses"])
    assert len(ours["sft"]["keys"]["adapter_model.safetensors"]) == 2 * 2 * 3


def test_sft_trainer_on_a_base_in_four_bits(ours):
    pytest.importorskip("bitsandbytes")
    assert falls(ours["qlora"]["losses"])
    assert ours["qlora"]["losses"] != ours["sft"]["losses"]
    assert ours["qlora"]["keys"] == ours["sft"]["keys"]


def test_dpo_trainer(ours):
    found = ours["dpo"]
    assert falls(found["new"])
    assert falls(found["there"])
    # the reference is a copy of the adapter, so that the first loss is log 2
    assert found["there"][0] == pytest.approx(0.693147, abs=1e-6)
    assert found["new"][0] != pytest.approx(0.693147, abs=1e-6)
    assert found["adapters"] == ["default", "ref"]


def test_reward_trainer_saves_the_score_head(ours):
    keys = ours["reward"]["keys"]["adapter_model.safetensors"]
    assert "base_model.model.score.weight" in keys


@pytest.mark.slow
@pytest.mark.interop
@pytest.mark.parametrize("part", PARTS)
def test_the_numbers_and_files_are_those_of_peft(ours, theirs, part):
    """Where PEFT is right: transformers and PEFT lose DoRA's magnitudes when they load one another's."""
    for what, value in theirs[part].items():
        if (part, what) == ("whole", "loaded"):
            assert value != pytest.approx(theirs[part]["before"], rel=1e-3)
        elif isinstance(value, list) and isinstance(value[0], float):
            assert ours[part][what] == pytest.approx(value, rel=1e-5, abs=1e-6)
        else:
            assert ours[part][what] == value
