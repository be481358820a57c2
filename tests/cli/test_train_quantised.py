"""`lowrank train --quantize …`, and what comes after it, on a tiny model."""

import json

import pytest
import text
import tiny
import torch
from safetensors.torch import load_file

from lowrank import read_adapter
from lowrank.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*Enum subclass")
NUMBERS = ["--epochs", "2", "--lr", "1e-2", "--lora.r", "4", "--max_length", "64"]
ANSWERS = ["--eval.generate", "3", "--max_new_tokens", "8"]
WAYS = {
    "nf4, lowrank": ("--quantize", "nf4", "--quantize_backend", "lowrank"),
    "fp4, bitsandbytes": ("--quantize", "fp4", "--double_quant", "false"),
    "int8, lowrank": ("--quantize", "int8"),
    "int8, bitsandbytes": ("--quantize", "int8", "--quantize_backend", "bitsandbytes"),
    "int8, torchao": ("--quantize", "int8", "--quantize_backend", "torchao"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    text.save_model(root / "base")
    text.write_rows(root / "train.jsonl", *text.pairs(24))
    text.write_rows(root / "test.jsonl", *text.pairs(6))
    return root


def train(folder, name, *words):
    given = ["--model", f"{folder}/base", "--data", f"{folder}/train.jsonl"]
    given += ["--data.eval", f"{folder}/test.jsonl", "--output", f"{folder / name}"]
    return main(["train", *given, *NUMBERS, *ANSWERS, *words])


def trained(folder, way):
    """The folder of a run in one of WAYS, which is made if no test before has."""
    run = folder / way
    if not run.exists():
        assert train(folder, way, *WAYS[way]) == 0
    return run


@pytest.mark.parametrize("way", WAYS)
def test_trained_measured_and_measured_again(folder, way, capsys):
    _, backend = way.split(", ")
    if backend != "lowrank":
        pytest.importorskip(backend)
    run = trained(folder, way)
    record = json.loads((run / "run.json").read_text())
    assert record["after"]["loss"] < record["before"]["loss"]
    format = way.partition(",")[0]
    named = record["quantisation"]
    assert (named["format"], named["backend"], named["double"]) == (
        format,
        backend,
        format == "nf4",
    )
    float_bytes = 4 * sum(
        p.numel() for p in tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32).parameters()
    )
    assert 0.6 * float_bytes < record["base_bytes"] < 0.95 * float_bytes  # the rest is embeddings
    assert record["training"]["total_params"] > float_bytes / 4
    checkpoint = {path.name for path in (run / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in checkpoint
    assert not any(name.startswith("model") for name in checkpoint)
    assert {key.split(".lora_")[1] for key in load_file(run / "adapter_model.safetensors")} == {
        "A.weight",
        "B.weight",
    }
    capsys.readouterr()
    words = ["--data", f"{folder}/test.jsonl", "--generate", "3", "--max-new-tokens", "8", "--json"]
    assert main(["evaluate", f"{run}", *words]) == 0  # on the quantised base, unasked
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(record["after"]["loss"], rel=1e-5)
    assert found["answers"] == record["after"]["answers"]
    assert found["quantisation"] == named


def test_the_file_names_it_and_the_report_shows_it(folder):
    run = trained(folder, "nf4, lowrank")
    (named,) = read_adapter(run).metadata["quantisation"]
    assert (named["format"], named["block_size"], named["double"]) == ("nf4", 64, True)
    assert len(named["layers"]) == 14
    page = (run / "reports" / "report.html").read_text()
    assert "nf4 in blocks of 64, doubly quantised (lowrank)" in page


def test_resume_gives_the_adapter_of_the_whole_run(folder):
    words = WAYS["nf4, lowrank"]
    assert train(folder, "parts", *words) == 0
    for path in (folder / "parts" / "checkpoint-6").iterdir():
        path.unlink()
    (folder / "parts" / "checkpoint-6").rmdir()
    (folder / "parts" / "adapter_model.safetensors").unlink()
    assert train(folder, "parts", *words, "--resume") == 0
    runs = (trained(folder, "nf4, lowrank"), folder / "parts")
    one, two = (load_file(run / "adapter_model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_another_back_end_stands_for_the_same_numbers(folder, capsys):
    """Trained on bitsandbytes' 4 bits, evaluated on ours: the weights are the same."""
    pytest.importorskip("bitsandbytes")
    run = trained(folder, "fp4, bitsandbytes")
    record = json.loads((run / "run.json").read_text())
    words = ["--data", f"{folder}/test.jsonl", "--generate", "0", "--json"]
    flags = ["--quantize", "fp4", "--no-double-quant", "--quantize-backend", "lowrank"]
    capsys.readouterr()
    assert main(["evaluate", f"{run}", *words, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(record["after"]["loss"], rel=1e-4)
    assert main(["generate", f"{run}", "1 and 1?", "--max-new-tokens", "5"]) == 0


def test_what_is_stored_quantised_is_opened_as_it_is(folder, capsys):
    from transformers import AutoModelForCausalLM

    from lowrank.quantizer import QuantizationConfig

    pytest.importorskip("bitsandbytes")
    config = QuantizationConfig("nf4", double=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config)
    model.save_pretrained(folder / "stored")
    text.byte_tokenizer().save_pretrained(folder / "stored")
    words = ["--data", f"{folder}/test.jsonl", "--generate", "0", "--json"]
    capsys.readouterr()
    losses = []
    for model in (["stored"], ["base", "--quantize", "nf4"]):
        assert main(["evaluate", f"{folder}/{model[0]}", *model[1:], *words]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert main(["evaluate", f"{folder}/stored", "--quantize", "int8", *words]) == 2
    assert "stored quantised already (bitsandbytes)" in capsys.readouterr().err


def test_a_form_that_does_not_run_here(folder, capsys):
    """GPTQ's kernels are for CUDA, and their package is not installed: what to use instead."""
    text.save_model(folder / "gptq")
    path = folder / "gptq" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    path.write_text(json.dumps(config))
    words = ["--data", f"{folder}/test.jsonl", "--generate", "0"]
    assert main(["evaluate", f"{folder}/gptq", *words]) == 2
    error = capsys.readouterr().err
    assert "is stored quantised (gptq) and cannot be loaded" in error
    assert "Name the base in 16 or 32 bits instead" in error
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device here" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--quantize", "nf5"), "should be none or nf4 or fp4 or int8, found 'nf5'"),
        (
            ("--quantize", "nf4", "--quantize_backend", "torchao"),
            "For nf4: bitsandbytes or lowrank",
        ),
        (("--quantize", "int8", "--double_quant", "true"), "double_quant is for the 4-bit formats"),
        (("--quantize_backend", "lowrank"), "give --model.quantize nf4 too"),
        (("--quantize", "nf4", "--method", "full"), "Choose train.method lora"),
        (("--load_in_4bit",), "Did you mean --model.quantize nf4?"),
        (("--load-in-8bit", "true"), "Did you mean --model.quantize int8?"),
    ],
)
def test_what_cannot_be(folder, words, message, capsys):
    assert train(folder, "never", *words) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "never").exists()


def test_without_bitsandbytes(folder, monkeypatch, capsys):
    import importlib.util

    from lowrank.quantised_loading import quantisation_for

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    assert quantisation_for("nf4").backend == "lowrank"
    assert train(folder, "never", "--quantize", "nf4", "--quantize_backend", "bitsandbytes") == 2
    error = capsys.readouterr().err
    assert "pip install 'lowrank[bnb]'" in error
    assert "nf4 is held by: lowrank" in error


def test_plan_says_what_the_base_costs(folder, capsys):
    words = ["--quantize", "nf4", "--target_modules", "q_proj", "v_proj"]
    assert main(["plan", f"{folder}/base", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    linear = 24 * 24 * 2 + 12 * 24 * 2 + 3 * 24 * 40  # of one layer
    blocks = sum(-(-n // 64) for n in [576, 576, 288, 288, 960, 960, 960])
    nested = 7 * (4 + 4)
    rest = 2 * text.VOCABULARY * 24 + 5 * 24
    buffers = found["base_bytes"] - (2 * (linear // 2 + blocks + nested) + 4 * rest)
    assert 0 <= buffers < 100  # rotary frequencies
    assert found["quantisation"]["format"] == "nf4"
    assert main(["plan", f"{folder}/base", *words]) == 0
    out = capsys.readouterr().out
    assert "as nf4 in blocks of 64, doubly quantised" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []
