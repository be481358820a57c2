import dataclasses
import os
import sys
from types import ModuleType

import pytest
import text
from training import FAST, ROWS, adapted, fit

from lowrank.cli import main
from lowrank.errors import MissingExtraError
from lowrank.train.data.encode import encode
from lowrank.train.run import trackers as module
from lowrank.train.run.callbacks import read_log
from lowrank.train.run.trackers import trackers, variables


def test_tensorboard_holds_what_the_log_holds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tokenizer = text.byte_tokenizer()
    data = (encode(ROWS, tokenizer, max_length=64), encode(ROWS[:9], tokenizer, max_length=64))
    settings = dataclasses.replace(FAST, max_steps=7, report_to="tensorboard")
    result = fit(adapted(layers=1), tokenizer, data, tmp_path, settings)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        logged = {line["step"]: line[name] for line in result.history if name in line}
        assert {e.step: e.value for e in found.Scalars(tag)} == pytest.approx(logged)
    assert read_log(tmp_path / "log.jsonl") == result.history  # whatever else is asked for
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [
        ("wandb", "WANDB_MODE", "offline"),
        ("wandb", "WANDB_DIR", "{folder}"),
        ("mlflow", "MLFLOW_TRACKING_URI", "sqlite:///{folder}/mlflow.db"),
        ("trackio", "TRACKIO_DIR", "{folder}/trackio"),
    ],
)
def test_none_needs_a_login_and_what_the_user_set_holds(
    tmp_path, monkeypatch, name, variable, value
):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv(variable, raising=False)
    with variables([name], tmp_path):
        assert os.environ[variable] == value.format(folder=tmp_path)
    assert variable not in os.environ
    monkeypatch.setenv(variable, "mine")
    with variables([name], tmp_path):
        assert os.environ[variable] == "mine"


@pytest.mark.parametrize("login", ["key", "netrc"])
def test_with_a_login_weights_and_biases_is_online(tmp_path, monkeypatch, login):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password x" if login == "netrc" else "")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if login == "key":
        monkeypatch.setenv("WANDB_API_KEY", "k")
    with variables(["wandb"], tmp_path):
        assert "WANDB_MODE" not in os.environ


def test_what_is_missing_is_said_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install wandb[\s\S]*pip install mlflow"):
        trackers(["wandb", "mlflow"])
    words = ["train", "--model", f"{tmp_path}/none", "--data", f"{tmp_path}/none.jsonl"]
    assert main([*words, "--report-to", "trackio", "--output", f"{tmp_path}/out"]) == 2
    assert "pip install trackio" in capsys.readouterr().err
    assert main([*words, "--report-to", "tensorbord"]) == 2
    assert "should be of tensorboard, wandb" in capsys.readouterr().err


def test_an_integration_gets_the_figures(tmp_path, monkeypatch):
    """A stand-in for trackio: what transformers calls, and that the run's end is told."""
    logged, ended = [], []

    class Config(dict):
        def update(self, values, allow_val_change=False):
            dict.update(self, values)

    class Current:
        def get(self):
            return None

    fake = ModuleType("trackio")
    fake.__spec__ = object()
    fake.__version__ = "1.0.0"
    fake.init = lambda **options: logged.append({k: options[k] for k in ("project", "name")})
    fake.log = lambda values, **_: logged.append(values)
    fake.finish = lambda: ended.append(True)
    fake.config, fake.context_vars = Config(), ModuleType("context_vars")
    fake.context_vars.current_space_id = Current()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    tokenizer = text.byte_tokenizer()
    data = (encode(ROWS[:8], tokenizer, max_length=64), None)
    settings = dataclasses.replace(FAST, max_steps=2, report_to=["trackio"])
    result = fit(adapted(layers=1), tokenizer, data, tmp_path, settings)
    assert logged[0] == {"project": "lowrank", "name": tmp_path.name}
    losses = [line["train/loss"] for line in logged if "train/loss" in line]
    assert losses == [line["loss"] for line in result.history if "loss" in line]
    assert ended == [True]
