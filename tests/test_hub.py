"""Pushing to and loading from the Hub, of which a stand-in runs on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, Repository

from lowrank.errors import AdapterFileError, MissingExtraError
from lowrank.hub import adapter_file


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def results(hub, tmp_path_factory):
    """What the client in a process of its own saw; see hub_client.py."""
    only_config = json.dumps({"peft_type": "LORA", "r": 3, "target_modules": ["0"]}).encode()
    for name, files in {
        "me/only-a-readme": {"README.md": b"# nothing"},
        "me/no-weights": {"adapter_config.json": only_config},
        "me/pickle": {"adapter_config.json": only_config, "adapter_model.bin": b"pickle"},
    }.items():
        repository = hub.repositories[name] = Repository(private=False)
        repository.messages.append("by hand")
        repository.files.update(files)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
    }
    nobody = "http://127.0.0.1:9"
    client = Path(__file__).with_name("hub_client.py")
    run = subprocess.run(
        [sys.executable, client, nobody],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert not hub.unknown
    return json.loads(run.stdout)


def test_push_creates_a_private_repository(hub, results):
    repository = hub.repositories["me/adapter"]
    assert repository.private
    oid, url = results["push"]
    assert url == f"{hub.url}/me/adapter"
    assert len(oid) == 40
    assert repository.messages == ["First", "Upload LoRA adapter"]
    assert results["push again, by name alone"] == repository.commit
    assert sorted(repository.files) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "other/adapter_config.json",
        "other/adapter_model.safetensors",
    ]


def test_push_is_public_by_default(hub, results):
    assert results["push in public"] is True
    assert not hub.repositories["me/public"].private


def test_the_model_card_is_pushed(hub, results):
    text = hub.repositories["me/adapter"].files["README.md"].decode()
    assert "library_name: peft" in text
    assert "r=3, lora_alpha=8, on 0, 1" in text


def test_push_without_the_right_is_an_error(hub, results):
    kind, text = results["push without a right"]
    assert kind == "HubError"
    assert "does not know the token (401)" in text
    assert "somebody_else" not in text
    assert "me/forbidden" not in hub.repositories


def test_load_by_id(results):
    assert results["load"] is True
    assert results["load other"] == [[[], []], True]
    assert results["revision"] is True
    assert results["configuration"] == 3
    assert results["read_adapter"] == [
        f"base_model.model.{layer}.lora_{x}.weight" for layer in "01" for x in "AB"
    ]


def test_load_from_the_cache(results):
    assert results["from the cache"] is True
    kind, text = results["not in the cache"]
    assert kind == "AdapterFileError"
    assert "me/elsewhere is no folder here" in text
    assert "cache" in text


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("missing repository", ["me/nothing is no folder here", "hub", "not found"]),
        ("private repository", ["me/adapter", "not found"]),
        ("missing revision", ["me/adapter", "revision", "v7"]),
        ("missing entry", ["me/adapter on the hub has no nope/adapter_config.json"]),
        ("no adapter in it", ["me/only-a-readme on the hub has no adapter_config.json"]),
        ("weights missing", ["me/no-weights", "neither", "adapter_model.bin"]),
        ("pickle", ["pickle", "python -c"]),
        ("server gone", ["me/never-seen is no folder here", "not in the hub's cache either"]),
    ],
)
def test_errors_in_our_words(results, step, words):
    kind, text = results[step]
    assert kind == "AdapterFileError"
    for word in words:
        assert word.lower() in text.lower(), text


def test_a_folder_is_not_looked_for_on_the_hub(tmp_path):
    (tmp_path / "file").write_text("x")
    assert adapter_file(tmp_path, "file") == tmp_path / "file"
    assert adapter_file(tmp_path, "none", required=False) is None
    with pytest.raises(AdapterFileError, match="has no none"):
        adapter_file(tmp_path, "none")


@pytest.mark.parametrize("name", ["/not/there", "a/b/c", "spaces in it", "~/adapter", ""])
def test_what_is_no_hub_id_is_not_asked_for(name):
    with pytest.raises(AdapterFileError, match="no hub id"):
        adapter_file(name, "adapter_config.json")


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match="pip install huggingface_hub"):
        adapter_file("me/adapter", "adapter_config.json")


def test_a_word_without_owner_is_not_asked_of_the_hub():
    """A mistyped folder must not wait for the network's time-outs."""
    with pytest.raises(AdapterFileError, match=r"adaptr is no folder here, and no hub id \(owner"):
        adapter_file("adaptr", "adapter_config.json")
