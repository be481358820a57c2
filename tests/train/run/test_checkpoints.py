import json
import logging

import pytest
import torch
from torch import nn

from lowrank.train.run.checkpoints import (
    RECORD,
    CheckpointError,
    ResumeError,
    check_same_run,
    clean,
    data_digest,
    explained,
    install,
    newest_checkpoint,
    problems,
    rotate,
    seal,
    staging,
    weights_digest,
    whole,
)


def write(output, step, **run):
    folder = staging(output, step) / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "sub" / "weights.bin").write_bytes(bytes(range(step % 250)) * 7)
    seal(folder, run)
    install(folder, output / f"checkpoint-{step}")
    folder.parent.rmdir()
    return output / f"checkpoint-{step}"


def names(output):
    return sorted(path.name for path in output.iterdir())


def test_the_newest_is_the_one_of_most_steps(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
    assert newest_checkpoint(tmp_path).name == "checkpoint-100"
    assert problems(tmp_path / "checkpoint-9") == []


def test_nothing_to_resume_is_an_error(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()  # begun by another program and never finished
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(ResumeError, match="no whole checkpoint in"):
        newest_checkpoint(tmp_path)
    with pytest.raises(ResumeError, match="no checkpoint in"):
        newest_checkpoint(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "has 137 of 140 bytes"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "CRC-32"),
        (lambda path: path.unlink(), "weights.bin is missing"),
        (lambda path: (path.parents[1] / RECORD).unlink(), "written last"),
        (lambda path: (path.parents[1] / RECORD).write_text('{"fil'), "cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over_and_that_is_said(tmp_path, caplog, damage, words):
    write(tmp_path, 10)
    newest = write(tmp_path, 20)
    damage(newest / "sub" / "weights.bin")
    with caplog.at_level(logging.WARNING, logger="lowrank"):
        assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert "checkpoint-20 is passed over" in caplog.text
    assert words in caplog.text
    with pytest.raises(ResumeError, match=r"no whole checkpoint[\s\S]*checkpoint-10"):
        whole(newest)


def test_one_that_is_written_again_replaces_the_old(tmp_path):
    (write(tmp_path, 10) / "trainer_state.json").write_text("damaged")
    write(tmp_path, 10)
    assert problems(tmp_path / "checkpoint-10") == []
    assert names(tmp_path) == ["checkpoint-10"]


@pytest.mark.parametrize(
    ("keep", "spare", "left"),
    [
        (None, None, [10, 20, 30, 40]),
        (2, None, [30, 40]),
        (2, "checkpoint-10", [10, 40]),
        (3, "checkpoint-10", [10, 30, 40]),
        (1, "checkpoint-20", [20, 40]),  # the newest has to stay, to resume from
    ],
)
def test_which_ones_stay(tmp_path, keep, spare, left):
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    rotate(tmp_path, keep, spare and tmp_path / spare)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_what_was_half_written_goes(tmp_path):
    write(tmp_path, 10)
    (staging(tmp_path, 20) / "checkpoint-20").mkdir(parents=True)
    (tmp_path / ".checkpoint-5.old").mkdir()
    (tmp_path / ".checkpoint-notes").mkdir()
    clean(tmp_path)
    assert names(tmp_path) == [".checkpoint-notes", "checkpoint-10"]


def test_an_error_in_writing_names_the_last_good_one(tmp_path):
    write(tmp_path, 10)

    def fail():
        with explained(tmp_path, 20):
            staging(tmp_path, 20).mkdir()
            raise RuntimeError("inline_container.cc: the disk is full")

    with pytest.raises(CheckpointError, match=r"step 20[\s\S]*disk is full[\s\S]*checkpoint-10"):
        fail()
    assert names(tmp_path) == ["checkpoint-10"]


def test_another_run_is_refused_with_every_difference(tmp_path):
    run = {"train.seed": 1, "train.epochs": 2.0, "lora.r": 8, "data.train": "ab", "processes": 2}
    folder = write(tmp_path, 10, **run)
    check_same_run(folder, run)
    check_same_run(folder, {**run, "train.epochs": 5.0, "something new": 3})
    with pytest.raises(ResumeError) as caught:
        check_same_run(folder, {**run, "lora.r": 16, "data.train": "cd"})
    assert "lora.r: 8 there, 16 now" in str(caught.value)
    assert "data.train: 'ab' there" in str(caught.value)
    assert "2 problems" in str(caught.value)


def test_digests_tell_rows_and_weights_apart():
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}]
    assert data_digest(rows) == data_digest(list(rows))
    assert data_digest(rows) != data_digest(rows[::-1])
    assert data_digest(rows) != data_digest([rows[0], {"input_ids": [3], "labels": [4]}])
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model[0].requires_grad_(False)
    before = weights_digest(model)
    with torch.no_grad():
        model[1].weight.add_(1)  # it is trained: another value is no other base
    assert weights_digest(model) == before
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert weights_digest(model) != before
    assert weights_digest(nn.Linear(2, 2, device="meta")) is None
