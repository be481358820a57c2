"""The commands on a tiny model: what they write, print and refuse."""

import json
from io import StringIO

import pytest
import text
import torch

from lowrank import read_adapter
from lowrank.cli import main

NUMBERS = [
    "--epochs",
    "2",
    "--lr",
    "1e-2",
    "--lora.r",
    "4",
    "--max_length",
    "64",
    "--eval.generate",
    "3",
    "--max_new_tokens",
    "8",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    text.save_model(root / "base")
    text.write_rows(root / "train.jsonl", *text.pairs(24))
    text.write_rows(root / "test.jsonl", *text.pairs(6))
    text.write_rows(root / "skill.jsonl", {"text": "what the base knows"})
    return root


@pytest.fixture(scope="module")
def trained(folder):
    words = ["--data.eval", f"{folder}/test.jsonl", "--base_skill", f"{folder}/skill.jsonl"]
    assert train(folder, "run", *words) == 0
    return folder / "run"


def train(folder, name, *words):
    given = ["--model", f"{folder}/base", "--data", f"{folder}/train.jsonl"]
    return main(["train", *given, "--output", f"{folder / name}", *NUMBERS, *words])


def test_the_output_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "log.jsonl", "run.json"} <= names
    assert {"checkpoint-3", "checkpoint-6"} <= names
    assert "<html" in (trained / "reports" / "report.html").read_text()


def test_run_json(trained, folder):
    record = json.loads((trained / "run.json").read_text())
    settings = {s["name"]: (s["value"], s["source"]) for s in record["settings"]}
    assert settings["lora.r"] == (4, "--lora.r")
    assert settings["train.seed"] == (42, "default")
    assert record["training"]["steps"] == 6
    assert record["data"]["train"]["rows"] == 24
    assert record["after"]["loss"] < record["before"]["loss"]
    assert len(record["after"]["answers"]) == 3
    assert record["skill_before"] > 0
    assert {"torch", "transformers", "python"} <= set(record["versions"])
    assert record["file_bytes"] == (trained / "adapter_model.safetensors").stat().st_size


def test_the_adapter_says_how_it_was_trained_and_names_no_file(trained, folder):
    metadata = read_adapter(trained).metadata
    assert metadata["run"]["train.learning_rate"] == 1e-2
    assert metadata["run"]["data.max_length"] == 64
    assert metadata["base"]["weights"]
    assert str(folder) not in json.dumps(metadata)


def test_evaluate_gives_the_loss_that_training_ended_with(trained, folder, capsys):
    record = json.loads((trained / "run.json").read_text())
    words = ["--data", f"{folder}/test.jsonl", "--generate", "3", "--max-new-tokens", "8", "--json"]
    for model, part in (([f"{folder}/base"], "before"), ([f"{trained}"], "after")):
        assert main(["evaluate", *model, *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(record[part]["loss"], rel=1e-5)
        assert found["answers"] == record[part]["answers"]


def test_evaluate_as_text(trained, folder, capsys):
    assert (
        main(["evaluate", f"{trained}", "--data", f"{folder}/test.jsonl", "--generate", "2"]) == 0
    )
    out = capsys.readouterr().out
    for word in ("loss", "perplexity", "exact match", "asked", "expected"):
        assert word in out
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_generate(trained, folder, capsys, monkeypatch):
    assert (
        main(
            [
                "generate",
                f"{folder}/base",
                "--adapter",
                f"{trained}",
                "1 and 1?",
                "--max-new-tokens",
                "5",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", StringIO("1 and 1?\n"))
    assert main(["generate", f"{trained}", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == said
    monkeypatch.setattr("sys.stdin", StringIO("\n"))
    assert main(["generate", f"{trained}"]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_sampling_by_seed(folder, capsys):
    def said(seed):
        words = ["--temperature", "3", "--seed", str(seed), "--max-new-tokens", "12"]
        assert main(["generate", f"{folder}/base", "hello", *words]) == 0
        return capsys.readouterr().out

    assert said(1) == said(1) != said(2)


def test_what_is_printed(folder, capsys):
    assert train(folder, "printed", "--eval_split", "5") == 0
    out, err = capsys.readouterr()
    assert "--eval_split" not in out  # the full name is shown, whichever was typed
    assert "data.eval_split" in out
    assert "train.lr_scheduler_type=cosine" in out.replace("\N{NO-BREAK SPACE}", " ")
    assert "19 rows" in out
    assert "5 rows" in out
    assert "through the chat template" in out
    assert "perplexity" in out
    assert "eval loss" in err  # progress is not the result
    # a path is printed whole, however long
    assert all(len(line) <= 80 or str(folder) in line for line in out.splitlines()), out


def test_a_folder_that_holds_something_is_not_written_over(trained, folder, capsys):
    (trained / "notes.txt").write_text("mine")
    before = (trained / "run.json").read_text()
    assert train(folder, "run") == 2
    assert "is not empty" in capsys.readouterr().err
    assert (trained / "run.json").read_text() == before
    (trained / "checkpoint-99").mkdir()
    assert train(folder, "run", "--overwrite", "--max_steps", "1") == 0
    assert not (trained / "checkpoint-99").exists()
    assert (trained / "notes.txt").read_text() == "mine"


def test_resume_gives_the_adapter_of_the_whole_run(folder, capsys):
    assert train(folder, "whole") == 0
    assert train(folder, "parts") == 0
    for path in (folder / "parts" / "checkpoint-6").iterdir():
        path.unlink()
    (folder / "parts" / "checkpoint-6").rmdir()
    (folder / "parts" / "adapter_model.safetensors").unlink()
    assert train(folder, "parts", "--resume") == 0
    one, two = (folder / name / "adapter_model.safetensors" for name in ("whole", "parts"))
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert train(folder, "nothing", "--resume") == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_full_fine_tuning_writes_a_model(folder, capsys):
    assert train(folder, "full", "--method", "full") == 0
    assert (folder / "full" / "model.safetensors").is_file()
    assert (folder / "full" / "tokenizer.json").is_file()
    capsys.readouterr()
    assert main(["evaluate", f"{folder}/full", "--data", f"{folder}/test.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"] is None


def test_bad_rows_end_the_run_before_the_model_is_read(folder, capsys):
    lines = [*text.pairs(16), b'{"prompt": "a", "completion": ', {"prompt": "a", "completion": ""}]
    path = text.write_rows(folder / "bad.jsonl", *lines)
    assert (
        main(
            ["train", "--model", f"{folder}/base", "--data", f"{path}", "--output", f"{folder}/bad"]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert f"{path}:17: broken JSON" in err
    assert f"{path}:18: `completion` is empty" in err
    assert not (folder / "bad").exists()


def test_bad_rows_of_training_and_evaluation_come_together(folder, capsys):
    one = text.write_rows(folder / "one.jsonl", *text.pairs(2), b"{")
    two = text.write_rows(folder / "two.jsonl", {"prompt": "a", "chosen": "b"})
    words = ["--model", f"{folder}/base", "--data", f"{one}", "--data.eval", f"{two}"]
    assert main(["train", *words, "--output", f"{folder}/never"]) == 2
    err = capsys.readouterr().err
    assert f"{one}:3: broken JSON" in err
    assert f"{two}:1: column `completion` is missing (prompt-completion)" in err
    text.write_rows(folder / "two.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    words = ["--model", f"{folder}/base", "--data", f"{two}", "--output", f"{folder}/never"]
    assert main(["train", *words]) == 2
    assert "1 of 1 rows are pairs of a better and a worse answer" in capsys.readouterr().err


def test_evaluate_reads_as_training_did(folder, capsys):
    (folder / "table.csv").write_text("q;a;n\n1 and 1?;11;x\n2 and 2?;;x\n")
    words = ["--data", f"{folder}/table.csv", "--separator", ";", "--on-bad-row", "skip", "--json"]
    columns = ["--columns", "{q: prompt, a: completion}", "--prompt-template", "say {{ q }}"]
    assert main(["evaluate", f"{folder}/base", *words, *columns, "--generate", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["answers"][0]["prompt"]) == (1, "say 1 and 1?")
    assert main(["evaluate", f"{folder}/base", *words, "--shape", "tablet"]) == 2
    assert "--shape should be one of messages" in capsys.readouterr().err


def test_continued_pretraining_on_documents_longer_than_a_row(folder, capsys):
    base = text.write_rows(folder / "documents.jsonl", {"text": "one two three " * 20})
    (folder / "text.yaml").write_text(
        f"task: text\nmodel: {{path: {folder}/base}}\ndata: {{train: {base}, eval: {base}}}\n"
    )
    words = ["--output", f"{folder}/text", "--max_length", "32", "--max_steps", "4", "--lr", "1e-2"]
    assert main(["train", f"{folder}/text.yaml", "--packing", *words]) == 0
    record = json.loads((folder / "text" / "run.json").read_text())
    assert record["data"]["train"]["truncated"] == 0
    assert record["data"]["train"]["rows"] == 10  # 281 tokens, of which each piece learns 31
    assert record["after"]["loss"] < record["before"]["loss"]
    capsys.readouterr()
    # cut as in training
    assert main(["evaluate", f"{folder}/text", "--data", f"{base}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "text"
    assert found["loss"] == pytest.approx(record["after"]["loss"], rel=1e-5)


def test_too_long_for_the_model(folder, capsys):
    assert train(folder, "long", "--max_length", "65") == 2
    assert "made for 64 tokens" in capsys.readouterr().err


def test_plan(folder, capsys):
    assert (
        main(["plan", f"{folder}/base", "--lora.r", "3", "--target_modules", "q_proj", "v_proj"])
        == 0
    )
    out = capsys.readouterr().out
    # 2 layers; q (24 × 24) and v (12 × 24) of r=3
    assert f"{2 * 3 * (24 + 24):,}" in out
    assert f"{2 * 3 * (24 + 12):,}" in out
    assert f"{2 * 3 * (24 + 24 + 24 + 12):,} trainable" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_plan_as_json_counts_what_training_trains(folder, capsys):
    words = ["--lora.r", "4", "--modules_to_save", "lm_head"]
    assert main(["plan", f"{folder}/base", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    from transformers import AutoModelForCausalLM

    from lowrank import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoraConfig(
        r=4, lora_alpha=32, target_modules="all-linear", modules_to_save=["lm_head"]
    )
    trainable, total = get_peft_model(base, config).get_nb_trainable_parameters()
    assert (found["trainable_params"], found["total_params"]) == (trainable, total)
    assert found["modules_to_save"] == {"lm_head": text.VOCABULARY * 24}
    assert {t["path"] for t in found["targets"]} >= {"model.layers.1.mlp.down_proj"}


def test_plan_lists_every_problem(folder, capsys):
    words = ["--target_modules", "q_proj", "v_projj", "--modules_to_save", "nope"]
    assert main(["plan", f"{folder}/base", *words]) == 2
    err = capsys.readouterr().err
    assert "v_projj" in err
    assert "v_proj" in err
    assert "nope" in err


def test_an_adapter_without_its_base(folder, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    words = ["--data", f"{folder}/test.jsonl"]
    assert main(["evaluate", f"{tmp_path}", *words]) == 2
    assert "does not name its base" in capsys.readouterr().err
    assert main(["evaluate", f"{folder}/base", "--adapter", f"{folder}/base", *words]) == 2
    assert "holds no adapter" in capsys.readouterr().err
