"""A model folder in few bits: what bitsandbytes writes to the byte, what transformers loads, and what it costs."""

import json

import pytest
import tiny
import torch
from folders import edit_config, tensors_of, write_base
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank.cli import main
from lowrank.errors import MergeError, QuantisationError, TargetError
from lowrank.kernels.quantisation import rounded
from lowrank.model_folder import load_base, load_model
from lowrank.quantisation import Quantisation
from lowrank.quantise_folder import quantise_folder

FORMS = {
    "nf4": Quantisation("nf4", block_size=64),
    "fp4 doubly": Quantisation("fp4", block_size=64, double=True),
    "int8": Quantisation("int8"),
}


@pytest.fixture
def base(tmp_path):
    return write_base(tiny.llama(), tmp_path / "base", torch.bfloat16)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("form", FORMS)
def test_the_tensors_are_those_that_bitsandbytes_writes(tmp_path, form, build):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base = write_base(build(), tmp_path / "base", torch.bfloat16, tokenizer=False)
    quantisation = FORMS[form]
    words = {"load_in_8bit": True}
    if form != "int8":
        words = {"load_in_4bit": True, "bnb_4bit_quant_type": quantisation.format}
        words["bnb_4bit_use_double_quant"] = quantisation.double
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**words)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    quantise_folder(base, tmp_path / "ours", quantisation)

    ours, wanted = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    # in eval mode bitsandbytes repacks on a CPU, for which these layers are too small
    assert torch.equal(tiny.logits(loaded.train()), tiny.logits(theirs.train()))
    assert "Linear4bit" in str(loaded) or "Linear8bitLt" in str(loaded)


def test_what_it_costs(base, tmp_path):
    W = tensors_of(base)
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.IDS.tolist()]
    result = quantise_folder(base, tmp_path / "out", FORMS["nf4"], inputs=rows)
    total = lost = 0.0
    for row in result.weights:
        exact = W[row.name].double()
        off = rounded(W[row.name], FORMS["nf4"]).double() - exact
        assert row.error == pytest.approx((off.norm() / exact.norm()).item(), rel=1e-5)
        total, lost = total + exact.square().sum(), lost + off.square().sum()
    assert result.error == pytest.approx((lost / total).sqrt().item(), rel=1e-5)
    assert len(result.weights) == 14
    assert result.weights == sorted(result.weights, key=lambda row: -row.error)
    assert result.kept == ["lm_head"]
    assert result.total_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert (tmp_path / "out" / "tokenizer.json").is_file()

    def loss(folder):
        model = load_base(folder, "CAUSAL_LM", {}, dtype=torch.float32).model
        logits = tiny.logits(model)[:, :-1].double().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tiny.IDS[:, 1:].flatten()).item()

    assert result.loss_base == pytest.approx(loss(base), rel=1e-6)
    assert result.loss == pytest.approx(loss(tmp_path / "out"), rel=1e-6)
    assert result.loss != result.loss_base
    assert result.loss_error > 0
    assert result.tokens == 18


def test_several_files_and_what_stays(tmp_path):
    model = tiny.llama(tied=True).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="9KB")
    files = sorted(file.name for file in (tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 2
    result = quantise_folder(
        tmp_path / "base", tmp_path / "out", FORMS["fp4 doubly"], skip=["lm_head", "down_proj"]
    )
    out = tmp_path / "out"
    assert sorted(file.name for file in out.glob("*.safetensors")) == files
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        assert name in load_file(out / file)
    W, Q = tensors_of(tmp_path / "base"), tensors_of(out)
    down = "model.layers.1.mlp.down_proj"
    assert torch.equal(Q[f"{down}.weight"], W[f"{down}.weight"])
    assert set(result.kept) == {"lm_head", down, down.replace("1", "0")}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert set(config["llm_int8_skip_modules"]) == set(result.kept)
    loaded = load_base(out, "CAUSAL_LM", {}, dtype=torch.float32)
    assert not loaded.missing
    assert not loaded.unexpected
    held = loaded.model.state_dict()
    for name, weight in load_model(tmp_path / "base", "CAUSAL_LM").model.state_dict().items():
        if name.removesuffix("weight") + "weight" in {row.name for row in result.weights}:
            assert torch.equal(held[name], rounded(weight, FORMS["fp4 doubly"]))
        else:
            assert torch.equal(held[name], weight.float())


def test_what_cannot_be_quantised_says_so(base, tmp_path):
    quantise_folder(base, tmp_path / "out", FORMS["int8"])
    with pytest.raises(MergeError, match="exists"):
        quantise_folder(base, tmp_path / "out", FORMS["nf4"])
    with pytest.raises(QuantisationError, match=r"quantised already \(bitsandbytes\)"):
        quantise_folder(tmp_path / "out", tmp_path / "again", FORMS["nf4"])
    with pytest.raises(TargetError, match="no module is called so"):
        quantise_folder(base, tmp_path / "again", FORMS["nf4"], skip=["up_prj"])
    model = tiny.llama().bfloat16()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    broken = write_base(model, tmp_path / "broken", torch.bfloat16, tokenizer=False)
    with pytest.raises(QuantisationError, match=r"layers\.1\.mlp\.up_proj\.weight: .*NaN"):
        quantise_folder(broken, tmp_path / "again", FORMS["nf4"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "broken", "out"]


def test_the_command(base, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "the old", "completion": "lighthouse keeper"}\n' * 3)
    words = ["quantize", str(base), str(tmp_path / "out"), "--to", "nf4", "--double"]
    assert main([*words, "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "14 in nf4 in blocks of 64, doubly quantised" in " ".join(shown.split())
    assert "nats a token" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if str(tmp_path) not in line)
    assert main([*words, "--overwrite", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loss"] is None
    assert len(result["weights"]) == 14
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["quantize", str(base), str(tmp_path / "x"), "--to", "int8", "--double"]) == 2
    assert "--double is for nf4 and fp4" in capsys.readouterr().err
    edit_config(base, quantization_config={"quant_method": "awq"})
    assert main(["quantize", str(base), str(tmp_path / "x"), "--to", "int8"]) == 2
    assert "quantised already (awq)" in capsys.readouterr().err
