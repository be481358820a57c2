"""Runs that are cut short, by an error, a signal or a full disk, and go on."""

import dataclasses
import resource
import signal

import pytest
import text
import tiny
import torch
from training import FAST, ROWS, adapted, fit
from transformers import TrainerCallback

from lowrank.train.data.encode import encode
from lowrank.train.run.callbacks import read_log
from lowrank.train.run.checkpoints import CheckpointError, ResumeError, newest_checkpoint, problems
from lowrank.train.run.resuming import row_order
from lowrank.train.run.stopping import Stopped

STEPPED = dataclasses.replace(FAST, save_steps=2, gradient_accumulation_steps=2)


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


class Cut(Exception):
    pass


def cut():
    raise Cut


@pytest.fixture(scope="module")
def tokenizer():
    return text.byte_tokenizer()


@pytest.fixture(scope="module")
def data(tokenizer):
    return encode(ROWS, tokenizer, max_length=64), encode(ROWS[:9], tokenizer, max_length=64)


def dropping(**options):
    """Dropout, so that a random state that is not restored shows."""
    return adapted(layers=1, lora_dropout=0.3, **options)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def losses(folder):
    lines = read_log(folder / "log.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def cut_and_resumed(build, tokenizer, data, folder, settings, step):
    with pytest.raises(Cut):
        fit(build(), tokenizer, data, folder, settings, callbacks=[At(step, cut)])
    model = build()
    result = fit(model, tokenizer, data, folder, settings, resume_from=newest_checkpoint(folder))
    return model, result


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"save_steps": None},
        {"eval_steps": 3, "group_by_length": False},
        {
            "packing": True,
            "batch_size": 1,
            "loraplus_lr_ratio": 4.0,
            "gradient_checkpointing": True,
        },
    ],
    ids=["steps", "epochs", "evaluated", "packed"],
)
def test_cut_in_the_second_epoch(tokenizer, data, tmp_path, changed):
    settings = dataclasses.replace(STEPPED, **changed)
    whole = dropping()
    result = fit(whole, tokenizer, data, tmp_path / "whole", settings)
    model, again = cut_and_resumed(dropping, tokenizer, data, tmp_path / "cut", settings, 6)
    assert same(whole, model)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert again.train_loss == result.train_loss
    assert again.steps == result.steps


def test_every_weight_goes_on_too(tokenizer, data, tmp_path):
    def build():
        return tiny.llama(
            vocab=text.VOCABULARY, layers=1, dtype=torch.float32, attention_dropout=0.2
        )

    whole = build()
    fit(whole, tokenizer, data, tmp_path / "whole", STEPPED)
    model, _ = cut_and_resumed(build, tokenizer, data, tmp_path / "cut", STEPPED, 6)
    assert same(whole, model)


def test_a_finished_run_is_not_trained_on(tokenizer, data, tmp_path):
    """Killed between its last checkpoint and its end: in the middle of an epoch, too."""
    settings = dataclasses.replace(STEPPED, max_steps=4)
    whole, model = dropping(), dropping()
    before = fit(whole, tokenizer, data, tmp_path, settings)
    result = fit(
        model, tokenizer, data, tmp_path, settings, resume_from=newest_checkpoint(tmp_path)
    )
    assert result.steps == 4
    assert result.train_loss == before.train_loss
    assert same(whole, model)


def test_a_run_may_become_longer_but_no_other(tokenizer, data, tmp_path):
    settings = dataclasses.replace(STEPPED, max_steps=4)
    fit(dropping(), tokenizer, data, tmp_path, settings)
    last = newest_checkpoint(tmp_path)
    longer = dataclasses.replace(settings, max_steps=6, save_steps=3, logging_steps=1)
    result = fit(dropping(), tokenizer, data, tmp_path, longer, resume_from=last)
    assert [line["step"] for line in result.history if "loss" in line][-2:] == [5, 6]
    assert newest_checkpoint(tmp_path).name == "checkpoint-6"
    other = dataclasses.replace(settings, learning_rate=3e-3, batch_size=2)
    rows = (encode(ROWS[1:], tokenizer, max_length=64), data[1])
    with pytest.raises(ResumeError) as caught:
        fit(dropping(), tokenizer, rows, tmp_path, other, resume_from=last)
    for words in ("train.learning_rate: 0.01 there, 0.003 now", "train.batch_size", "data: "):
        assert words in str(caught.value)
    with pytest.raises(ResumeError, match=r"default\.lora_alpha: 8 there, 9 now"):
        fit(dropping(lora_alpha=9), tokenizer, data, tmp_path, settings, resume_from=last)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 0), ("SIGINT", 130), ("SIGUSR1", 0)])
def test_a_signal_saves_after_the_step(tokenizer, data, tmp_path, name, status, capfd):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    stop = At(4, lambda: signal.raise_signal(number))
    with pytest.raises(Stopped, match=f"{name}: stopped after step 4 of 6") as caught:
        fit(dropping(), tokenizer, data, tmp_path, STEPPED, callbacks=[stop])
    assert caught.value.status == status
    assert caught.value.checkpoint == newest_checkpoint(tmp_path)
    assert f"{name}: saving a checkpoint after this step" in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_stopped_at_any_step_it_ends_as_if_left_alone(tokenizer, data, tmp_path):
    whole, model = dropping(), dropping()
    fit(whole, tokenizer, data, tmp_path / "whole", STEPPED)
    for step in (1, 3, 5):  # none is one at which the run saves by itself
        stop = At(step, lambda: signal.raise_signal(signal.SIGTERM))
        found = list((tmp_path / "cut").glob("checkpoint-*"))
        resume = newest_checkpoint(tmp_path / "cut") if found else None
        with pytest.raises(Stopped):
            fit(
                dropping(),
                tokenizer,
                data,
                tmp_path / "cut",
                STEPPED,
                callbacks=[stop],
                resume_from=resume,
            )
    resume = newest_checkpoint(tmp_path / "cut")
    assert resume.name == "checkpoint-5"
    fit(model, tokenizer, data, tmp_path / "cut", STEPPED, resume_from=resume)
    assert same(whole, model)


def test_a_second_interrupt_stops_at_once(tokenizer, data, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(dropping(), tokenizer, data, tmp_path, STEPPED, callbacks=[At(4, twice)])
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_full_disk_leaves_the_last_good_one(tokenizer, data, tmp_path):
    """No file may grow to what the optimiser's state takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        size = (tmp_path / "checkpoint-2" / "optimizer.pt").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 999, hard))

    try:
        with pytest.raises(CheckpointError, match=r"step 4 could[\s\S]*good one is checkpoint-2"):
            fit(dropping(), tokenizer, data, tmp_path, STEPPED, callbacks=[At(3, fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = [path.name for path in tmp_path.iterdir()]
    assert sorted(left) == ["checkpoint-2", "log.jsonl"]
    assert problems(tmp_path / "checkpoint-2") == []


def test_the_order_of_rows():
    lengths = [3, 9, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3]
    given = {"count": 25, "batch": 3, "seed": 1}
    for epoch in range(3):
        order = row_order(**given, lengths=lengths, epoch=epoch)
        assert sorted(order) == list(range(25))
        assert lengths[order[0]] == 9
        waste = sum(
            max(lengths[r] for r in order[i : i + 3]) * 3
            - sum(lengths[r] for r in order[i : i + 3])
            for i in range(0, 24, 3)
        )
        assert waste < 0.5 * sum(lengths)
    plain = [row_order(**given, lengths=None, epoch=epoch) for epoch in (0, 1, 0)]
    assert plain[0] == plain[2] != plain[1]
    assert row_order(**{**given, "seed": 2}, lengths=None, epoch=0) != plain[0]
