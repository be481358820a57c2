"""One class of several, several, or a number: what is learnt, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import text
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from lowrank import LoraConfig, PeftModel, compat, get_peft_model, read_adapter
from lowrank.cli import main
from lowrank.cli.opening import open_base
from lowrank.errors import ModelFolderError
from lowrank.train.data.problems import DataError
from lowrank.train.data.rows import read_data
from lowrank.train.data.task_shapes import Labelled
from lowrank.train.settings import DataSettings, EvalSettings, TrainSettings
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.heads import padded_with
from lowrank.train.tasks.table import TASKS

TASK = TASKS["sequence-classification"]


def sections(problem_type=None, **train):
    return SimpleNamespace(
        data=DataSettings(problem_type=problem_type),
        train=TrainSettings(**{"batch_size": 4, "learning_rate": 1e-2, **train}),
        eval=EvalSettings(batch_size=3),
    )


def labelled(*labels, texts=None):
    texts = texts or [f"{'ab'[i % 2]}{'x' * (i % 5)}{i}" for i in range(len(labels))]
    return [
        Labelled(t, label, f"f:{i}") for i, (t, label) in enumerate(zip(texts, labels, strict=True))
    ]


def prepared(rows, problem_type=None, like=None, max_length=64):
    settings = sections(problem_type)
    return TASK.prepare(rows, text.byte_tokenizer(), settings, max_length=max_length, like=like)


def classifier(options, **changes):
    torch.manual_seed(5)
    config = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32).config
    config.update({**options, **changes})
    return AutoModelForSequenceClassification.from_config(config)


def test_classes_are_named_in_the_data():
    options = prepared(labelled("late", "early", "late", "never")).model_options
    assert options["id2label"] == {0: "early", 1: "late", 2: "never"}
    assert options["label2id"]["never"] == 2
    numbers = prepared(labelled(*["0", "10", "9", "2", "0"])).model_options
    assert list(numbers["id2label"].values()) == ["0", "2", "9", "10"]
    assert numbers["problem_type"] == "single_label_classification"


def test_a_label_that_training_has_not_seen():
    options = prepared(labelled("late", "early")).model_options
    assert [e["labels"] for e in prepared(labelled("late", "late"), like=options).examples] == [
        1,
        1,
    ]
    with pytest.raises(DataError, match=r"do not have: 'never' \(f:1\); they have early, late"):
        prepared(labelled("late", "never"), like=options)
    with pytest.raises(DataError, match="nothing to tell apart"):
        prepared(labelled("late", "late"))


def test_classes_that_nobody_named_are_numbers():
    like = {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "problem_type": None}
    assert [e["labels"] for e in prepared(labelled("1", "0"), like=like).examples] == [1, 0]


def test_sorts_of_labels():
    several = prepared(labelled(["a", "b"], [], ["c"]))
    assert [e["labels"] for e in several.examples] == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    numbers = prepared(labelled(2.5, "3", -1.0))
    assert [e["labels"] for e in numbers.examples] == [2.5, 3.0, -1.0]
    assert numbers.model_options == {"num_labels": 1, "problem_type": "regression"}
    as_text = prepared(labelled("2", "3"), "regression")  # out of a CSV
    assert [e["labels"] for e in as_text.examples] == [2.0, 3.0]
    with pytest.raises(
        DataError, match=r"a number in every row \(regression\), and at f:1 it is 'x'"
    ):
        prepared(labelled(2.5, "x"))
    with pytest.raises(DataError, match="one name in every row"):
        prepared(labelled("a", ["b"]))


def test_long_texts_are_cut_and_counted():
    data = prepared(labelled("a", "b", texts=["x" * 90, "y" * 9]), max_length=20)
    assert (data.truncated, data.longest, data.supervised) == (1, 20, 2)


def test_padding_changes_nothing_for_a_causal_model_without_pad_token():
    """pad = eos, and rows that end in it: the same class beside longer rows as alone."""
    tokenizer = text.byte_tokenizer(pad=None)
    rows = labelled("a", "b", "a", texts=["one<|end|>", "two and more of it<|end|>", "three"])
    data = TASK.prepare(rows, tokenizer, sections(), max_length=64)
    model = classifier(data.model_options, pad_token_id=None).eval()
    assert padded_with(model, tokenizer) == tokenizer.eos_token_id == model.config.pad_token_id
    together = TASK.evaluate(model, tokenizer, data, sections())
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([e["input_ids"]])).logits[0] for e in data.examples]
    nats = [
        torch.logsumexp(x, 0) - x[e["labels"]] for x, e in zip(alone, data.examples, strict=True)
    ]
    assert together.scores["loss"] == pytest.approx(float(sum(nats) / 3), rel=1e-5)
    assert [a.answer for a in together.answers] == ["ab"[int(x.argmax())] for x in alone]


@pytest.mark.parametrize(
    ("labels", "score"),
    [
        (["up", "down"], "accuracy"),
        ([["up", "odd"], ["down"]], "f1_micro"),
        ([2.0, -1.5], "pearson"),
    ],
)
def test_each_sort_is_learnt_and_its_head_is_saved(labels, score, tmp_path):
    data = prepared(labelled(*(labels[i % 2] for i in range(16))))
    tokenizer, base = text.byte_tokenizer(), classifier(data.model_options)
    start = {name: p.clone() for name, p in base.named_parameters()}
    settings = sections(max_steps=16, eval_steps=8, gradient_accumulation_steps=2, batch_size=3)
    config = LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    before = TASK.evaluate(model, tokenizer, data, settings)
    with compat.standing_in():
        result = TASK.train(Given(model, tokenizer, data, data, tmp_path, settings))
    after = TASK.evaluate(model, tokenizer, data, settings)
    assert before.scores[score] < 0.8 < 0.9 < after.scores[score]
    evals = [line["eval_loss"] for line in result.history if "eval_loss" in line]
    assert evals[-1] == pytest.approx(after.scores["loss"], rel=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    heads = [k for k in read_adapter(tmp_path / "adapter").tensors if "score" in k]
    assert heads == ["base_model.model.score.weight"]
    fresh = classifier(data.model_options)
    assert all(torch.equal(p, start[name]) for name, p in fresh.named_parameters())
    again = TASK.evaluate(
        PeftModel.from_pretrained(fresh, tmp_path / "adapter"), tokenizer, data, settings
    )
    assert again == after


def test_the_first_loss_is_the_mean_over_the_rows_of_both_batches(tmp_path):
    data = prepared(labelled("a", "b", "c", "b", "a"))
    model, settings = (
        classifier(data.model_options),
        sections(max_steps=1, batch_size=3, gradient_accumulation_steps=2, logging_steps=1),
    )
    expected = TASK.evaluate(model, text.byte_tokenizer(), data, settings).scores["loss"]
    result = TASK.train(Given(model, text.byte_tokenizer(), data, None, tmp_path, settings))
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_shapes(tmp_path):
    path = text.write_rows(
        tmp_path / "rows.jsonl",
        {"text": "a", "label": 3, "text_pair": "b"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "l"}]},
        {"prompt": "p", "completion": "c"},
        {"text": "a", "label": True},
        {"text": "a", "label": ["x", 2]},
    )
    rows = read_data([path], takes=Labelled).rows
    assert [row.label for row in rows] == ["3", "l", "c", "true", ["x", "2"]]
    assert (rows[0].pair, rows[1].text) == ("b", "u")
    text.write_rows(path, {"text": "a", "category": "b"}, {"text": "a", "label": {}})
    with pytest.raises(DataError) as caught:
        read_data([path], takes=Labelled)
    assert "data.columns: {category: label}" in str(caught.value)
    assert "`label` should be a name, a list of them, or a number, found an object" in str(
        caught.value
    )


def test_a_run_from_data_to_a_merged_folder(tmp_path, capsys):
    words = ["--data", "embedded:intents", "--data.eval", "embedded:intents"]
    numbers = [
        "--limit",
        "400",
        "--epochs",
        "2",
        "--lr",
        "2e-3",
        "--batch_size",
        "8",
        "--lora.r",
        "8",
    ]
    run = ["train", "--task", "sequence-classification", "--model", "embedded", *words, *numbers]
    assert main([*run, "--output", f"{tmp_path}/run"]) == 0
    assert "accuracy" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["before"]["accuracy"] < 0.2
    assert record["after"]["accuracy"] > 0.3
    report = (tmp_path / "run" / "reports" / "report.html").read_text()
    assert "F1, macro" in report
    assert "20 × 192" in report  # the head, which is saved whole
    assert "nats per token" not in report
    assert main(["evaluate", f"{tmp_path}/run", "--data", "embedded:intents", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "sequence-classification"
    assert found["accuracy"] == record["after"]["accuracy"]
    assert found["answers"] == record["after"]["answers"]
    assert main(["merge", f"{tmp_path}/run", f"{tmp_path}/merged", "--no-verify"]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.label2id["give praise"] == 11
    capsys.readouterr()
    assert main(["evaluate", f"{tmp_path}/merged", "--data", "embedded:intents", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(record["after"]["accuracy"], abs=0.02)


def test_settings_without_meaning_are_refused(capsys):
    words = ["--model", "embedded", "--data", "x", "--task", "sequence-classification", "--packing"]
    assert main(["train", *words]) == 2
    assert "train.packing has no meaning for task sequence-class" in capsys.readouterr().err


def test_plan_has_the_head(capsys):
    assert main(["plan", "embedded", "--task", "sequence-classification", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["modules_to_save"]) == ["score"]


def test_a_pooler_that_would_be_random_is_refused_unless_it_is_trained(tmp_path):
    """A BERT without one, as masked language models are saved: each loading would draw another."""
    tiny.bert(dtype=torch.float32).save_pretrained(tmp_path)
    where = {"dtype": "auto", "device": "cpu", "task_type": "SEQ_CLS"}
    with pytest.raises(ModelFolderError, match=r"bert\.pooler\.dense"):
        open_base(str(tmp_path), **where)
    assert open_base(str(tmp_path), **where, saved=["pooler"], num_labels=3).config.num_labels == 3
