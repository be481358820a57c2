"""Two processes on the CPU train what one trains on the same batches, and leave the same files."""

import json
import shutil
from importlib.util import find_spec

import programs
import pytest
import text
import tiny
import torch
from safetensors.torch import load_file, save_file
from training import adapted

from lowrank.adapter_file import read_tensors
from lowrank.errors import ConfigError, MissingExtraError
from lowrank.train.run import processes
from lowrank.train.run.checkpoints import newest_checkpoint, problems
from lowrank.train.run.saving import SavedEmptyError, check_saved
from lowrank.train.run.trainer import evened
from lowrank.train.settings import TrainSettings

WORDS = [
    *("train", "--model", "base", "--model.device", "cpu", "--data", "train.jsonl"),
    *("--data.eval", "test.jsonl", "--max-length", "64", "--lora.r", "4", "--lr", "1e-2"),
    *("--epochs", "2", "--save-steps", "4", "--logging-steps", "2"),
    *("--eval.generate", "2", "--max-new-tokens", "4", "--eval.batch_size", "4"),
]
# accelerate has FSDP for GPUs only, and would train as DDP without a word
FSDP_ON_CPU = """
from accelerate import state
from accelerate.utils import DistributedType
import lowrank.train.run.processes
lowrank.train.run.processes.ON_CPU = True
before = state.AcceleratorState.__init__
def forced(self, *args, fsdp_plugin=None, **kwargs):
    fresh = not state.AcceleratorState._shared_state
    before(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
state.AcceleratorState.__init__ = forced
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    text.save_model(root / "base", layers=1)
    text.write_rows(root / "train.jsonl", *text.pairs(24))
    text.write_rows(
        root / "test.jsonl", *text.pairs(9)
    )  # not a multiple of what two evaluate at once
    return root


@pytest.fixture(scope="module")
def alone(folder):
    words = [*WORDS, "--batch-size", "4", "--output", "one"]
    done = programs.run(["lowrank", *words], folder, begin=programs.TRAINING)
    assert done.returncode == 0, done.stderr
    return folder / "one"


def together(folder, name, *words, before="", timeout=60):
    code = before + programs.TOGETHER
    given = [*WORDS, "--batch-size", "2", "--output", name, *words]
    return programs.run(["python", "-c", code, "2", *given], folder, timeout, programs.TRAINING)


def assert_same_result(one, two, file="adapter_model.safetensors"):
    a, b = (load_file(path / file) for path in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=5e-5)
    logs = [
        [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        for path in (one, two)
    ]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    for ours, theirs in zip(*logs, strict=True):
        for name in ("loss", "eval_loss"):
            assert theirs.get(name, 0.0) == pytest.approx(ours.get(name, 0.0), rel=1e-5)
    records = [json.loads((path / "run.json").read_text()) for path in (one, two)]
    ours, theirs = (record["after"] for record in records)  # over all rows, each once
    assert theirs["answers"] == ours["answers"]
    numbers = {name: value for name, value in ours.items() if isinstance(value, float)}
    assert {name: theirs[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)


def test_ddp(folder, alone):
    done = together(folder, "two")
    assert done.returncode == 0, done.stderr
    assert_same_result(alone, folder / "two")
    assert done.stdout.count("parameters are trained") == 1
    assert done.stderr.count("step 12/12  eval loss") == 1
    last = newest_checkpoint(folder / "two")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in last.iterdir()}
    # as if it had been killed after an earlier checkpoint
    weights = load_file(folder / "two" / "adapter_model.safetensors")
    shutil.rmtree(last)
    again = together(folder, "two", "--resume")
    assert again.returncode == 0, again.stderr
    assert tiny.same_bits(load_file(folder / "two" / "adapter_model.safetensors"), weights)
    assert_same_result(alone, folder / "two")


def test_fsdp(folder, alone):
    done = together(folder, "fsdp", "--train.fsdp", "true", before=FSDP_ON_CPU)
    assert done.returncode == 0, done.stderr
    assert_same_result(alone, folder / "fsdp")
    assert "no gradient" not in done.stderr
    last = newest_checkpoint(folder / "fsdp")
    saved, _ = read_tensors(last)
    assert {tuple(t.shape) for t in saved.values()} == {
        tuple(t.shape) for t in load_file(alone / "adapter_model.safetensors").values()
    }
    assert problems(last) == []
    weights = load_file(folder / "fsdp" / "adapter_model.safetensors")
    shutil.rmtree(last)
    again = together(folder, "fsdp", "--train.fsdp", "true", "--resume", before=FSDP_ON_CPU)
    assert again.returncode == 0, again.stderr
    assert tiny.same_bits(load_file(folder / "fsdp" / "adapter_model.safetensors"), weights)


@pytest.mark.slow
def test_fsdp_of_all_weights(folder):
    words = ["--method", "full"]
    done = programs.run(
        ["lowrank", *WORDS, *words, "--batch-size", "4", "--output", "full"],
        folder,
        begin=programs.TRAINING,
    )
    assert done.returncode == 0, done.stderr
    words += ["--train.fsdp", "true"]
    for more in ([], ["--resume"]):
        done = together(folder, "shared", *words, *more, before=FSDP_ON_CPU)
        assert done.returncode == 0, done.stderr
        assert_same_result(folder / "full", folder / "shared", "model.safetensors")
        shutil.rmtree(newest_checkpoint(folder / "shared"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, folder, alone):
    """A resumed run too: ZeRO-3 then has the adapter whole at first, and in parts from the first saving on."""
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    wanted = {"zero_optimization": {"stage": stage}, **dict.fromkeys(auto, "auto")}
    (folder / f"zero{stage}.json").write_text(json.dumps(wanted))
    before = 'import os\nos.environ["DS_ACCELERATOR"] = "cpu"\n'
    words = ["--train.deepspeed", f"zero{stage}.json"]
    name = f"zero{stage}"
    done = together(folder, name, *words, before=before, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_same_result(alone, folder / name)
    weights = load_file(folder / name / "adapter_model.safetensors")
    shutil.rmtree(newest_checkpoint(folder / name))
    again = together(folder, name, *words, "--resume", before=before)
    assert again.returncode == 0, again.stderr
    assert tiny.same_bits(load_file(folder / name / "adapter_model.safetensors"), weights)
    assert_same_result(alone, folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--train.fsdp", "true"]], ids=["ddp", "fsdp"])
def test_dpo(more, folder):
    """Against its reference, the model with its adapter off, whoever holds which part of it."""
    rows = [{"prompt": f"{i}?", "chosen": "ab"[: 1 + i % 2], "rejected": "XY"} for i in range(12)]
    text.write_rows(folder / "pairs.jsonl", *rows)
    words = ["--task", "dpo", "--data", "pairs.jsonl", "--data.eval", "pairs.jsonl"]
    name = f"dpo{len(more)}"
    done = programs.run(
        ["lowrank", *WORDS, *words, "--batch-size", "4", "--output", f"{name}-one"],
        folder,
        begin=programs.TRAINING,
    )
    assert done.returncode == 0, done.stderr
    done = together(folder, name, *words, *more, before=FSDP_ON_CPU if more else "")
    assert done.returncode == 0, done.stderr
    assert_same_result(folder / f"{name}-one", folder / name)


def test_what_all_find_is_said_once(folder):
    done = together(folder, "none", "--data", "nothing.jsonl")
    assert done.returncode == 2
    assert done.stderr.count("nothing.jsonl") == 1


@pytest.mark.slow
def test_what_one_process_finds_ends_all(folder):
    """NaN in the second process's rows alone: that is what both say, once, with those rows."""
    nan = """
import torch
from lowrank.train.run import callbacks
from lowrank.train.run import processes
plain = callbacks.summed_loss
def broken(logits, labels):
    loss = plain(logits, labels)
    return loss * float("nan") if processes.rank() and torch.is_grad_enabled() else loss
callbacks.summed_loss = broken
"""
    done = together(folder, "nan", before=nan)
    assert done.returncode != 0
    assert done.stderr.count("the loss is nan at step 1 of 12") == 1
    assert "Its rows: train.jsonl:" in done.stderr


def test_evaluation_is_evened_out_by_rows_without_a_target(monkeypatch):
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}] * 5
    assert evened(rows, 4) is rows
    monkeypatch.setenv("WORLD_SIZE", "2")
    even = evened(rows, 2)
    assert even[:5] == rows
    assert [row["labels"] for row in even[5:]] == [[-100, -100]] * 3
    assert evened([{"labels": 1}] * 3, 2)[3] == {"labels": -100}


def test_work_is_divided_where_each_process_holds_the_weights(monkeypatch):
    model, done = torch.nn.Linear(2, 3), []

    def work(number):
        done.append(number)
        return -number

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "everyones", lambda mine: [mine, [-1, -3]])
    assert processes.divided(work, range(5), model) == [0, -1, -2, -3, -4]
    assert done == [0, 2, 4]
    model.weight.ds_id = 0  # as ZeRO-3 marks what it has split up
    assert processes.divided(work, range(5), model) == [0, -1, -2, -3, -4]
    assert done == [0, 2, 4, 0, 1, 2, 3, 4]


def test_an_adapter_that_was_saved_empty_is_found(tmp_path):
    """As ZeRO-3 leaves tensors that nobody gathered: of no entry at all."""
    model = adapted(layers=1)
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: torch.empty(0) for key in load_file(path)}, path)
    with pytest.raises(
        SavedEmptyError, match=r"in 14 tensors:[\s\S]*: \(0,\) instead of \(4, 24\)"
    ):
        check_saved(model, tmp_path)


def test_what_sharing_the_weights_needs(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="torchrun"):
        processes.sharing(TrainSettings(fsdp=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="among GPUs"):
            processes.sharing(TrainSettings(fsdp=True))
    monkeypatch.setattr(processes, "ON_CPU", True)
    assert processes.sharing(TrainSettings(fsdp=True))["fsdp_config"]["version"] == 2
    path = tmp_path / "ds.json"
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install deepspeed"):
        processes.sharing(TrainSettings(deepspeed=str(path)))
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="no file"):
        processes.sharing(TrainSettings(deepspeed=str(path)))
    path.write_text("{}")
    assert processes.sharing(TrainSettings(deepspeed=str(path))) == {"deepspeed": str(path)}
    with pytest.raises(ConfigError, match="choose one"):
        processes.sharing(TrainSettings(deepspeed=str(path), fsdp=True))
