"""Pushing the result of a run to the hub, of which a stand-in runs on loopback; see push_client.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import READ_TOKEN, TOKEN, Hub
from huggingface_hub import ModelCard

from lowrank.card import put_card
from lowrank.push import _may_write


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("push")


@pytest.fixture(scope="module")
def results(hub, folder):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(folder / "hf_home"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    client = Path(__file__).with_name("push_client.py")
    run = subprocess.run(
        [sys.executable, client, folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert not hub.unknown
    return {**json.loads(run.stdout), "printed": run.stdout + run.stderr}


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("no token", ["there is no token", "hf auth login", "HF_TOKEN"]),
        ("unknown token", ["does not know the token (401)", "settings/tokens"]),
        ("reading token", ["may read and not write to me/none", "hf auth login"]),
        ("somebody else's", ["may not write to them's", "me, my-org"]),
        ("no name", ["'a/b/c' is no name on the hub"]),
    ],
)
def test_what_would_be_refused_is_known_before_training(results, step, words):
    status, out, err = results[step]
    assert status == 2
    assert "step" not in out  # nothing was trained
    for word in words:
        assert word in err
    assert results["nothing was begun"]


def test_a_run_is_pushed_with_its_card_and_plot(results, hub):
    status, out, err = results["pushed"]
    assert status == 0, err
    assert f"{hub.url}/me/first" in out
    repository = hub.repositories["me/first"]
    assert repository.private
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png"} == set(
        repository.files
    )
    assert repository.files["loss.png"].startswith(b"\x89PNG")


def test_the_card_of_a_run(results, hub, folder):
    card = ModelCard(hub.repositories["me/third"].files["README.md"].decode())
    data = card.data.to_dict()
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "unknown"
    assert data["tags"] == ["lora", "lowrank", "sft"]
    assert "base_model" not in data  # a folder here
    record = json.loads((folder / "third" / "run.json").read_text())
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found["loss"] == pytest.approx(record["after"]["loss"], abs=1e-6)
    assert {r.dataset_name for r in card.data.eval_results} == {"rows.jsonl"}
    assert "`base`, trained with lowrank on rows.jsonl" in card.text
    assert f"| loss | {record['before']['loss']:.3f} | {record['after']['loss']:.3f} |" in card.text
    assert "| `train.epochs` | 1 |" in card.text
    assert "| `lora.r` | 16 |" in card.text
    assert "![loss by optimiser steps](loss.png)" in card.text
    assert "AutoPeftModelForCausalLM" in card.text
    for private in (str(folder), "private place"):
        assert private not in card.content


def test_a_dropped_connection_and_a_busy_server_are_tried_again(results, hub):
    status, _, err = results["tried again"]
    assert status == 0, err
    assert not hub.repositories["my-org/second"].private
    assert "adapter_model.safetensors" in hub.repositories["my-org/second"].files
    assert sum(request.startswith("PUT lfs") for request in hub.requests) > 3


def test_a_result_that_could_not_be_pushed_is_there(results):
    status, out, err = results["never"]
    assert status == 1
    assert "shows more" in out
    assert "the hub could not be reached or did not answer, 4 times" in err
    assert "the result is whole in" in err
    assert "To push it later: lowrank push" in err
    assert {"adapter_model.safetensors", "run.json", "README.md", "loss.png"} <= set(
        results["files of the third"]
    )


def test_pushing_later(results, hub):
    status, _, err = results["refused while pushing"]
    assert status == 2
    assert "may not write to me/third (403)" in err
    assert results["pushed later"][0] == 0
    assert "adapter_model.safetensors" in hub.repositories["me/third"].files
    assert hub.repositories["me/third"].private
    assert results["nothing there"][0] == 2
    assert "holds no adapter and no model" in results["nothing there"][2]


def test_a_folder_without_a_card_gets_one(results, hub):
    assert results["without a card"][0] == 0
    assert not hub.repositories["me/bare"].private
    assert b"# LoRA adapter" in hub.repositories["me/bare"].files["README.md"]


def test_a_card_of_a_person_stays(results, hub):
    assert results["a person's card"][0] == 0
    assert hub.repositories["me/first"].files["README.md"] == b"By a person.\n"


def test_tokens_are_nowhere(results, hub, folder):
    tokens = [token.encode() for token in (TOKEN, READ_TOKEN, "hf_of_nobody")]
    pushed = [data for r in hub.repositories.values() for data in r.files.values()]
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for content in [*pushed, *files, results["printed"].encode()]:
        for token in tokens:
            assert token not in content


def test_a_card_is_replaced_as_long_as_nobody_touched_it(tmp_path):
    assert put_card(tmp_path, "first\n")
    assert not put_card(tmp_path, "second\n")
    assert put_card(tmp_path, "second\n", replace=True)
    path = tmp_path / "README.md"
    assert path.read_text().startswith("second\n")
    path.write_text(path.read_text().replace("second", "mine"))
    assert not put_card(tmp_path, "third\n", replace=True)
    assert path.read_text().startswith("mine\n")


@pytest.mark.parametrize(
    ("access", "allowed"),
    [
        ({}, True),
        ({"role": "write"}, True),
        ({"role": "read"}, False),
        ({"role": "fineGrained", "fineGrained": {"scoped": []}}, False),
        (
            {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "me"}, "permissions": ["repo.write"]}]}},
            True,
        ),
        (
            {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "me/other"}, "permissions": ["repo.write"]}]}},
            False,
        ),
    ],
)  # fmt: skip
def test_roles_of_tokens(access, allowed):
    assert _may_write(access, "me/adapter") is allowed
