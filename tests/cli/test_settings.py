from typing import Annotated, Literal

import pytest

from lowrank.cli.settings import SettingsError, known_settings, resolve, short_names
from lowrank.cli.values import FlagValue, Wrong, check_value
from lowrank.train.settings import POSITIVE

REQUIRED = ("model.path", "data.train")
GIVEN = {"model.path": "m", "data.train": ["d.jsonl"]}


@pytest.fixture
def config(tmp_path):
    def written(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return written


def test_flags_win_over_the_file_and_the_file_over_defaults(config):
    path = config(
        "model:\n  path: here\ntrain:\n  epochs: 2\n  learning_rate: 1e-4\nlora:\n  r: 3\n"
    )
    settings = resolve(path, {"train.epochs": "5", "data.train": ["a.jsonl", "b.jsonl"]}, REQUIRED)
    assert settings["model.path"] == "here"
    assert settings.train.epochs == 5
    assert settings.train.learning_rate == 1e-4  # YAML alone would read a string
    assert settings.lora["r"] == 3
    assert settings.data.train == ["a.jsonl", "b.jsonl"]
    assert settings.origin["model.path"] == "run.yaml:2"
    assert settings.origin["train.learning_rate"] == "run.yaml:5"
    assert settings.origin["train.epochs"] == "--train.epochs"
    assert settings.origin["train.seed"] == "default"
    listed = {name: (value, origin) for name, value, origin in settings.listing()}
    assert listed["train.epochs"] == (5, "--train.epochs")
    assert set(listed) == set(known_settings())


WRONG = {
    "train:\n  lerning_rate: 1": "run.yaml:2: unknown key train.lerning_rate. Did you mean 'train.learning_rate'",
    "train:\n  num_train_epochs: 1": "unknown key train.num_train_epochs. Did you mean 'train.epochs'?",
    "train:\n  lora_dropout: 1": "unknown key train.lora_dropout. Did you mean 'lora.lora_dropout'?",
    "trian:\n  epochs: 1\n  seed: 2": "run.yaml:2: unknown section 'trian'. Did you mean 'train'?",
    "train: 3": "run.yaml:1: section 'train' should hold settings, found 3.",
    "train:\n  epochs: many": "run.yaml:2: train.epochs should be a number, found 'many'",
    "train:\n  epochs: true": "train.epochs should be a number, found True",
    "train:\n  epochs: .nan": "train.epochs should be a number, found nan",
    "train:\n  batch_size: 2.5": "train.batch_size should be a whole number, found 2.5",
    "train:\n  batch_size: 0": "train.batch_size should be 1 or more, found 0",
    "train:\n  warmup_ratio: 1": "train.warmup_ratio should be from 0 to below 1, found 1",
    "train:\n  method: lorra": "should be lora or full, found 'lorra'. Did you mean 'lora'?",
    "task: rm": "run.yaml:1: train.task should be one of sft",
    "task: pretrain": ", found pretrain. Did you mean 'text'?",
    "task: SFT": "Did you mean 'sft'?",
    "task: text\ntrain:\n  task: sft": "run.yaml:3: train.task was set at run.yaml:1",
    "tsk: text": "unknown section 'tsk'. Did you mean 'task'?",
    "data:\n  chat_template: sometimes": "should be true or false, found 'sometimes'",
    "data:\n  train: {a: 1}": "data.train should be a list or text or null, found {'a': 1}",
    "lora:\n  r: 0": "section lora: r=0 must be a whole number of at least 1.",
    "lora:\n  use_qalora: true": "section lora: use_qalora=True: QALoRA",
    "lora:\n  inference_mode: true": "unknown key lora.inference_mode",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_said_with_its_place(config, text):
    flags = {k: v for k, v in GIVEN.items() if k not in text}
    with pytest.raises(SettingsError) as caught:
        resolve(config(text), flags, ())
    assert WRONG[text] in str(caught.value)
    assert "problems" not in str(caught.value)  # it is the only one


def test_all_problems_come_at_once(config):
    path = config("train:\n  epochs: -1\n  lerning_rate: 1\nlora:\n  lora_alpha: x\n")
    with pytest.raises(SettingsError) as caught:
        resolve(path, {"train.seed": "none"}, REQUIRED)
    text = str(caught.value)
    assert text.startswith("6 problems:")
    for part in (
        "train.epochs",
        "lerning_rate",
        "lora_alpha",
        "--train.seed",
        "model.path is missing",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epochs: 1\n  epochs: 2\n", "run.yaml:3: train.epochs was set at run.yaml:2"),
        ("train: [\n", "not YAML"),
        ("- a\n", "expected sections such as"),
    ],
)
def test_a_file_that_is_no_settings(config, text, message):
    with pytest.raises(SettingsError, match=message):
        resolve(config(text), GIVEN, REQUIRED)


def test_a_missing_file(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.yaml: no such file"):
        resolve(tmp_path / "none.yaml", GIVEN, REQUIRED)


def test_empty_sections_are_all_defaults(config):
    settings = resolve(config("train:\nlora:\n"), GIVEN, REQUIRED)
    assert settings.train.epochs == 3
    assert settings.lora["target_modules"] == "all-linear"


@pytest.mark.parametrize(
    ("words", "annotation", "value"),
    [
        ("1e-4", float, 1e-4),
        ("3", float, 3),
        ("1e3", int, 1000),
        ("null", int | None, None),
        ("2024", str, "2024"),
        ("true", bool, True),
        ("all-linear", list[str] | str | None, "all-linear"),
        (["all-linear"], list[str] | str | None, "all-linear"),
        (["lm_head"], list[str] | None, ["lm_head"]),
        (["[a, b]"], list[str] | str | None, ["a", "b"]),
        (["a", "b"], list[str] | str | None, ["a", "b"]),
        (["1", "2"], list[int] | int | None, [1, 2]),
        (r".*\.(q|v)_proj", list[str] | str, r".*\.(q|v)_proj"),
        ("{a: 2}", dict[str, int], {"a": 2}),
        ("gaussian", bool | str, "gaussian"),
        ("false", bool | str, False),
    ],
)
def test_words_of_flags(words, annotation, value):
    found = check_value(FlagValue(words), annotation)
    assert found == value
    assert type(found) is type(value)


def test_bounds_and_choices_of_flags():
    with pytest.raises(Wrong, match="above 0, found -1"):
        check_value(FlagValue("-1"), Annotated[float, "help", POSITIVE])
    with pytest.raises(Wrong, match="a or b, found 'c'"):
        check_value(FlagValue("c"), Literal["a", "b"])


def test_task_stands_at_the_top_or_under_train(config):
    for words in ("task: text\n", "train:\n  task: text\n"):
        settings = resolve(config(words), GIVEN, REQUIRED)
        assert settings.train.task == "text"
    assert resolve(None, {**GIVEN, "train.task": "text"}, REQUIRED).train.task == "text"
    assert settings.lora["task_type"] == "CAUSAL_LM"


def test_short_names_are_clear():
    short = short_names(known_settings())
    assert short["lr"] == "train.learning_rate"
    assert short["epochs"] == "train.epochs"
    assert short["batch_size"] == "train.batch_size"  # and not the evaluation's
    assert short["r"] == "lora.r"
    assert all(name in known_settings() for name in short.values())
