"""`lowrank preview`: what it shows of data, and what of it is marked."""

import json

import pytest
import text

from lowrank.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("preview")
    text.save_model(root / "base")
    text.write_rows(root / "rows.jsonl", *text.pairs(9), {"prompt": "x" * 90, "completion": "y"})
    return root


def preview(folder, what, *words):
    return main(["preview", f"{folder / what}", "--model", f"{folder}/base", *words])


def test_what_is_shown(folder, capsys):
    assert preview(folder, "rows.jsonl", "--rows", "2", "--skip", "1") == 0
    out = capsys.readouterr().out
    assert "prompt-completion (prompt, completion)" in out
    assert "9 rows" in out
    assert "dropped 1" in out
    assert " ".join(out.split()).count("tokens learnt, ") == 2
    # by position: the end of the prompt is not marked, the same token after the answer is
    assert "<|user|>1 and 1?<|end|>\n   <|assistant|>⟦11<|end|>⟧" in out
    assert f"{folder}/rows.jsonl:2" in out.replace("\n", "")


def test_settings_of_a_run(folder, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model:\n  path: {folder}/base\ndata:\n  train: {folder}/rows.jsonl\n  loss_on: all\n"
        "  prompt_template: 'Q {{ prompt }}'\n"
    )
    assert main(["preview", f"{config}", "--rows", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shapes"] == {"prompt-completion": 10}
    whole = "<|user|>Q 0 and 0?<|end|>\n<|assistant|>00<|end|>"
    assert found["rows"][0]["parts"] == [[whole, True]]


def test_both_answers_of_a_preference(folder, capsys):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    text.write_rows(folder / "pairs.jsonl", pair)
    text.write_rows(folder / "judged.jsonl", {"prompt": "a", "completion": "b", "label": False})
    assert preview(folder, "pairs.jsonl", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["row"].rpartition(", ")[2] for row in rows] == ["chosen", "rejected"]
    assert [row["parts"][-1] for row in rows] == [["b<|end|>", True], ["c<|end|>", True]]
    assert preview(folder, "judged.jsonl") == 0
    assert "jsonl:1, bad" in " ".join(capsys.readouterr().out.split())


def test_bad_rows_are_named_or_counted(folder, capsys):
    text.write_rows(folder / "bad.jsonl", *text.pairs(2), b"{", {"question": "a", "answer": "b"})
    assert preview(folder, "bad.jsonl") == 2
    err = capsys.readouterr().err
    assert "bad.jsonl:3: broken JSON" in err
    assert "bad.jsonl:4: no shape has these columns" in err
    assert preview(folder, "bad.jsonl", "--on_bad_row", "skip") == 0
    assert "skipped 2 bad lines (2 good)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("dpo", {"prompt": "Say", "chosen": "yes", "rejected": "no"}, ["chosen", "⟦no"]),
        ("kto", {"prompt": "Say", "completion": "yes", "label": True}, ["good", "⟦yes"]),
        ("grpo", {"prompt": "Say", "completion": "yes"}, ["Say"]),
    ],
)
def test_rows_of_preference_and_reinforcement(task, row, words, folder, tmp_path, capsys):
    rows = text.write_rows(tmp_path / "rows.jsonl", row)
    config = tmp_path / "run.yaml"
    reward = "train: {reward_functions: exact_match}" if task == "grpo" else ""
    config.write_text(
        f"task: {task}\nmodel: {{path: {folder}/base}}\ndata: {{train: {rows}}}\n{reward}\n"
    )
    assert main(["preview", str(config)]) == 0
    out = capsys.readouterr().out
    for word in words:
        assert word in out
