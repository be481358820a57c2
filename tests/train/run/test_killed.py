"""A run of `lowrank train`, killed again and again and resumed, ends bit for bit as one that was left alone.

A kill comes by SIGKILL, either after some time or at one of the moments in which the run touches a file of its
output folder: there it is begun, half written, renamed or about to be deleted.
"""

import json

import programs
import pytest
import text
import tiny
import torch
from safetensors.torch import load_file

from lowrank.train.run.checkpoints import newest_checkpoint, problems

# argv: touches before the end, seconds before the end (0: never), then the words of the command
KILLED = """
import os, sys, threading
touches, seconds, output = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
seen = 0
def touched(event, args):
    global seen
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and output in str(args[0]):
        seen += 1
        if seen == touches:
            os.kill(os.getpid(), 9)
sys.addaudithook(touched)
if seconds:
    threading.Timer(seconds, os.kill, (os.getpid(), 9)).start()
from lowrank.cli import main
code = main(sys.argv[4:])
sys.stdout.flush()
os._exit(code)
"""
COMMON = [
    "--epochs",
    "2",
    "--batch-size",
    "2",
    "--gradient-accumulation-steps",
    "2",
    "--logging-steps",
    "5",
    "--lr",
    "1e-2",
]
ADAPTER = [
    *COMMON,
    *["--lora.r", "4", "--lora_dropout", "0.2", "--max-length", "64", "--eval.generate", "0"],
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    text.save_model(root / "base", layers=1)
    lines = [
        {**pair, "completion": pair["completion"] * (1 + i % 4)}
        for i, pair in enumerate(text.pairs(22))
    ]
    text.write_rows(root / "train.jsonl", *lines)
    return root


def run(base, name, *words, touches=0, seconds=0.0):
    given = ["train", "--model", "base", "--data", "train.jsonl", "--output", name]
    code = ["python", "-c", KILLED, str(touches), str(seconds), f"{name}/"]
    return programs.run([*code, *given, *words], base, begin=programs.TRAINING)


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_end(one, two, weights="adapter_model.safetensors"):
    assert tiny.same_bits(load_file(one / weights), load_file(two / weights))
    assert log(one) == log(two)
    last, other = newest_checkpoint(one), newest_checkpoint(two)
    assert last.name == other.name
    assert tiny.same_bits(load_file(last / weights), load_file(other / weights))
    ours, theirs = (torch.load(path / "optimizer.pt")["state"] for path in (last, other))
    assert ours.keys() == theirs.keys()
    assert all(tiny.same_bits(ours[i], theirs[i]) for i in ours)
    ours, theirs = (
        torch.load(path / "rng_state.pth", weights_only=False) for path in (last, other)
    )
    assert ours["python"] == theirs["python"]
    assert torch.equal(ours["cpu"], theirs["cpu"])


def killed_until_done(base, name, kills, *words):
    """Each of `kills` ends the run once; then it is left to finish. Returns how many kills came in time."""
    died = 0
    for kill in kills:
        done = run(base, name, "--resume", "auto", *words, **kill)
        assert done.returncode in (0, -9), done.stderr
        died += done.returncode == -9
        for path in (base / name).glob("checkpoint-*"):
            assert problems(path) == [], path  # under its own name there is never a half
    done = run(base, name, "--resume", "auto", *words)
    assert done.returncode == 0, done.stderr
    assert not list((base / name).glob(".checkpoint*"))
    return died


def test_killed_at_many_moments(base):
    words = [*ADAPTER, "--save-steps", "4", "--eval", "train.jsonl", "--save-total-limit", "2"]
    assert run(base, "whole", *words).returncode == 0
    kills = [{"touches": 21}, {"touches": 40}, {"touches": 56}, {"seconds": 0.6}]
    assert killed_until_done(base, "killed", kills, *words) >= 3
    assert_same_end(base / "whole", base / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_at_every_seventh_touch(base, method):
    given = ADAPTER if method == "lora" else [*COMMON, "--method", "full", "--max-length", "64"]
    words = [*given, "--save-steps", "3", "--packing", "--eval", "train.jsonl"]
    assert run(base, f"{method}-whole", *words).returncode == 0
    kills = [{"touches": touches} for touches in range(12, 90, 7)]
    assert killed_until_done(base, f"{method}-killed", kills, *words) >= 8
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert_same_end(base / f"{method}-whole", base / f"{method}-killed", name)
