"""dpo, kto, reward and grpo from the command line: what is shown, what is left, and what reopens."""

import gc
import json

import pytest
import text

from lowrank import compat
from lowrank.cli import main
from lowrank.train.tasks.on_trl import trl_class

PAIRS = [
    {"prompt": f"{i} or {i % 5}?", "chosen": f"a{i % 3}", "rejected": f"X{i % 4}"}
    for i in range(18)
]
JUDGED = [
    {"prompt": p["prompt"], "completion": p["chosen" if i % 3 else "rejected"], "label": i % 3 > 0}
    for i, p in enumerate(PAIRS)
]
ANSWERED = [{"prompt": p["prompt"], "completion": "#### 4"} for p in PAIRS]
ROWS = {"dpo": PAIRS, "kto": JUDGED, "reward": PAIRS, "grpo": ANSWERED}
OWN = {
    "dpo": {"beta": 0.3},
    "grpo": {"reward_functions": "[length:3, final_number]", "max_completion_length": 4},
}


@pytest.fixture(scope="module", autouse=True)
def standing_in():
    with compat.standing_in():
        trl_class("grpo", 0)
        gc.freeze()  # else each training goes through all that TRL imports, twice
        yield
        gc.unfreeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return text.save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.filterwarnings("ignore:at every step all answers")
@pytest.mark.parametrize("task", ROWS)
def test_a_task_from_yaml_to_an_adapter_that_reopens(task, model, tmp_path, capsys):
    rows = text.write_rows(tmp_path / "rows.jsonl", *ROWS[task])
    own = "".join(f"  {name}: {value}\n" for name, value in OWN.get(task, {}).items())
    if task in ("dpo", "kto"):
        own += "eval:\n  generate: 2\n  max_new_tokens: 3\n"
    (tmp_path / "run.yaml").write_text(
        f"task: {task}\nmodel:\n  path: {model}\ndata:\n  train: {rows}\n  eval: {rows}\n"
        "train:\n  max_steps: 3\n  learning_rate: 0.01\n  logging_steps: 1\n" + own
    )
    folder = tmp_path / "out"
    assert main(["train", str(tmp_path / "run.yaml"), "--output", str(folder)]) == 0
    shown = capsys.readouterr()
    name, title = ("reward", "mean reward") if task == "grpo" else (None, "preference accuracy")
    assert title in shown.out
    report = (folder / "reports/report.html").read_text()
    assert title in report
    curves = (
        "mean" if task == "grpo" else "margin" if task == "reward" else "chosen, rejected, margin"
    )
    assert f'aria-label="Reward by optimiser steps: {curves}' in report
    assert {"reward": "margin", "grpo": "reward"}.get(task, "margin") in shown.err
    record = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logged = {"reward": "margin", "grpo": "reward"}.get(task, "rewards/margins")
    assert len([line for line in lines if logged in line]) == 3
    capsys.readouterr()
    words = ["evaluate", str(folder), "--data", str(rows), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == task
    for score in (name,) if name else ("preference_accuracy", "reward_margin"):
        assert found[score] == pytest.approx(record["after"][score], abs=1e-5)


def test_a_setting_of_another_task_is_an_error(model, tmp_path, capsys):
    rows = text.write_rows(tmp_path / "rows.jsonl", *PAIRS)
    words = ["train", "--model", model, "--data", str(rows), "--output", str(tmp_path / "out")]
    assert main([*words, "--task", "dpo", "--desirable_weight", "2"]) == 2
    assert "train.desirable_weight is a setting of kto, and train.task is dpo" in (
        capsys.readouterr().err
    )
    assert main([*words, "--beta", "2"]) == 2
    assert "train.beta is a setting of dpo and kto and grpo" in capsys.readouterr().err
    assert main([*words, "--task", "grpo"]) == 2
    assert "trains on prompts" in capsys.readouterr().err
