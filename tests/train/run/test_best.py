"""The best state of a run: found, kept, and where the run stops for want of a better one."""

import json

import pytest
import text
import tiny
import torch
from safetensors.torch import load_file

from lowrank import LoraConfig, compat, get_peft_model
from lowrank.cli import main
from lowrank.train.data.encode import encode
from lowrank.train.data.rows import Row
from lowrank.train.run.best import BestError, check_best
from lowrank.train.settings import TrainSettings
from lowrank.train.tasks.sft import train_sft

TOKENIZER = text.byte_tokenizer()
TRAIN = encode([Row("say", "aaaa", "f:1"), Row("say", "aaab", "f:2")], TOKENIZER, max_length=64)
# what is learnt of the others makes these likelier at first, and then less likely
OTHER = encode([Row("say", "aabc", "g:1")], TOKENIZER, max_length=64)
STEPS = {
    "learning_rate": 2e-2,
    "batch_size": 2,
    "lr_scheduler_type": "constant",
    "logging_steps": 99,
}


def run(folder, **settings):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32), config)
    with compat.standing_in():
        result = train_sft(
            model, TOKENIZER, TRAIN, OTHER, folder, TrainSettings(**STEPS, **settings)
        )
    losses = {line["step"]: line["eval_loss"] for line in result.history if "eval_loss" in line}
    return model, result, losses


def test_early_stopping_keeps_the_best_state(tmp_path):
    model, result, losses = run(
        tmp_path, max_steps=80, eval_steps=5, early_stopping_patience=2, save_total_limit=1
    )
    best = min(losses, key=losses.get)
    assert result.steps == max(losses) == best + 10 < 80
    assert (result.best.step, result.best.metric) == (best, "loss")
    assert result.best.value == pytest.approx(losses[best])
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    live = dict(model.named_parameters())
    for key, tensor in saved.items():
        assert torch.equal(tensor, live[key.replace(".weight", ".default.weight")]), key


def test_what_does_not_go_together_is_said():
    with pytest.raises(BestError, match=r"give data\.eval"):
        check_best(TrainSettings(early_stopping_patience=1), False)
    with pytest.raises(BestError, match="Set both alike"):
        check_best(TrainSettings(load_best_model_at_end=True, save_steps=4), True)
    with pytest.raises(BestError, match="nothing looks at it"):
        check_best(TrainSettings(metric_for_best_model="loss"), True)
    wrong = TrainSettings(load_best_model_at_end=True, metric_for_best_model="accurracy")
    with pytest.raises(BestError, match="Did you mean 'accuracy'"):
        check_best(wrong, True)
    with pytest.raises(BestError, match="is none of loss, rouge_l, which"):
        check_best(wrong, True, {"rouge_l": 0.5})
    check_best(TrainSettings(save_steps=4), False)


def test_the_best_by_a_metric_of_the_task_in_a_run(tmp_path, capsys):
    text.save_model(tmp_path / "base")
    rows = [{"text": f"{'ab'[i % 2]}{i}", "label": ("up", "down")[i % 2]} for i in range(16)]
    path = text.write_rows(tmp_path / "rows.jsonl", *rows)
    words = ["--task", "sequence-classification", "--model", f"{tmp_path}/base"]
    words += ["--data", f"{path}", "--data.eval", f"{path}", "--output", f"{tmp_path}/run"]
    words += ["--lr", "2e-2", "--max_steps", "12", "--eval_steps", "3", "--lora.r", "4"]
    best = ["--load_best_model_at_end", "--metric_for_best_model", "accuracy"]
    assert main(["train", *words, *best]) == 0
    out, err = capsys.readouterr()
    assert "accuracy" in err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    kept = record["training"]["best"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}
    assert list(scores) == [3, 6, 9, 12]
    assert kept["value"] == max(scores.values()) == record["after"]["accuracy"]
    assert kept["step"] == next(step for step, value in scores.items() if value == kept["value"])
    assert f"step {kept['step']} (the best)" in out
    report = (tmp_path / "run" / "reports" / "report.html").read_text()
    assert f"Saved is step {kept['step']}, the best by accuracy" in report
