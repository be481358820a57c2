"""`lowrank quickstart`, cut short: every step, in the processes that a user would start."""

import json
import subprocess
import sys

import pytest

from lowrank.cli.quickstart import QuickstartError, _check, make_folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    words = [sys.executable, "-m", "lowrank.cli", "quickstart", "--max-steps", "6"]
    return folder, subprocess.run(words, cwd=folder, capture_output=True, text=True)


def test_it_ends_with_the_table(done):
    process = done[1]
    # 6 steps change little: whether bfloat16 can hold that little is the verification's to say
    assert process.returncode in (0, 1), process.stderr
    assert process.stderr == ""
    for words in (
        "108,544 trainable of 2,076,352 parameters",
        "PASSED" if process.returncode == 0 else "FAILED",
        "exact match",
        "base's own skill (loss)",
        "full fine-tuning",
        "training time",
        "peak memory",
    ):
        assert words in process.stdout
    assert [line for line in process.stdout.splitlines() if len(line) > 80] == []


def test_it_leaves_everything_in_one_folder(done):
    folder = done[0] / "quickstart"
    assert (folder / "lora" / "adapter_model.safetensors").is_file()
    assert (folder / "full" / "model.safetensors").is_file()
    assert (folder / "merged" / "tokenizer.json").is_file()
    assert "<html" in (folder / "report.html").read_text()
    runs = [json.loads((folder / name / "run.json").read_text()) for name in ("lora", "full")]
    assert runs[0]["training"]["steps"] == runs[1]["training"]["steps"] == 6
    assert runs[0]["data"] == runs[1]["data"]
    assert runs[0]["before"] == runs[1]["before"]
    assert runs[0]["training"]["trainable_params"] == 108_544


def test_an_earlier_quickstart_is_never_written_over_unasked(tmp_path):
    first = make_folder(tmp_path / "quickstart", overwrite=False, max_steps=None)
    (first / "mine").write_text("")
    (first / "lora").mkdir()
    assert first == tmp_path / "quickstart"
    assert make_folder(first, overwrite=False, max_steps=None).name == "quickstart-2"
    assert make_folder(first, overwrite=False, max_steps=None).name == "quickstart-3"
    assert make_folder(first, overwrite=True, max_steps=None) == first
    assert (first / "mine").exists()
    assert not (first / "lora").exists()


def test_a_training_that_fails_is_shown(tmp_path):
    (tmp_path / "lora.txt").write_text("first\nthe reason\n")
    with pytest.raises(QuickstartError, match="status 2:\nfirst\nthe reason"):
        _check(tmp_path, "lora", 2)
    _check(tmp_path, "lora", 0)
