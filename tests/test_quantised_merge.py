"""An adapter trained in few bits: what its file names, where it loads, and what is merged, against float64."""

import json

import pytest
import tiny
import torch
import transformers
from folders import InProcess, edit_config, tensors_of, write_base
from safetensors.torch import save_file
from tiny import randomise

from lowrank import LoraConfig, PeftModel, get_peft_model
from lowrank.adapter_file import read_adapter, write_adapter
from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.combine import combine, resize
from lowrank.errors import BaseMismatchError, LowrankError, MergeError, ModelFolderError
from lowrank.kernels.quantisation import rounded
from lowrank.merge import merge_to_folder
from lowrank.model_folder import load_model
from lowrank.quantisation import Quantisation
from lowrank.quantise_folder import quantise_folder
from lowrank.quantising import quantise_model
from lowrank.verify import verify

FORMS = {
    "nf4": Quantisation("nf4", block_size=64),
    "nf4 doubly": Quantisation("nf4", block_size=64, double=True),
    "int8": Quantisation("int8"),
}
TARGETS = ["q_proj", "down_proj"]
SCALING = 5 / 3


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    monkeypatch.setattr("lowrank.verify._start_probe", InProcess)


def quantised(folder, form):
    """The model in `folder` as it is quantised to be trained on; and its weights as they are now."""
    model = load_model(folder, "CAUSAL_LM", dtype=torch.bfloat16).model
    quantise_model(model, FORMS[form])
    held = {
        f"{path}.weight": module.dequantised().double()
        for path, module in model.named_modules()
        if isinstance(module, QuantisedLinear)
    }
    return model, held


def trained(folder, out, form="nf4", targets=TARGETS, **fields):
    """An adapter trained on the quantised model, and that model's weights."""
    model, held = quantised(folder, form)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", **fields)
    randomise(get_peft_model(model, config)).save_pretrained(out)
    return held


@pytest.fixture
def base(tmp_path):
    return write_base(tiny.llama(), tmp_path / "base", torch.bfloat16, tokenizer=False)


@pytest.fixture
def folders(base, tmp_path):
    held = trained(base, tmp_path / "adapter", "nf4 doubly")
    return base, tmp_path / "adapter", tmp_path / "out", held


def delta(adapter, name):
    tensors = read_adapter(adapter).tensors
    key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    if f"{key}A.weight" not in tensors:
        return 0.0
    B, A = tensors[f"{key}B.weight"].double(), tensors[f"{key}A.weight"].double()
    return SCALING * (B @ A)


def test_the_file_names_the_quantisation_of_every_layer(folders):
    _, adapter, _, held = folders
    metadata = read_adapter(adapter).metadata
    (row,) = metadata["quantisation"]
    paths = {name.removesuffix(".weight") for name in held}
    assert set(row.pop("layers")) == paths
    assert row == {"format": "nf4", "backend": "lowrank", "block_size": 64, "double": True}
    assert len(paths) == 14
    sampled = metadata["base"]["weights"]
    assert len(sampled) == 4
    assert all(weight["quantisation"] == row for weight in sampled.values())
    assert "quantised: nf4 in blocks of 64, doubly quantised" in (adapter / "README.md").read_text()


@pytest.mark.parametrize("onto", ["dequantised", "original"])
@pytest.mark.parametrize("form", FORMS)
def test_the_folder_holds_what_float64_says(base, tmp_path, form, onto):
    held = trained(base, tmp_path / "adapter", form)
    result = merge_to_folder(
        base, tmp_path / "adapter", tmp_path / "out", dtype="float32", onto=onto
    )
    W, M = tensors_of(base), tensors_of(tmp_path / "out")
    assert M.keys() == W.keys()
    for name, merged in M.items():
        start = held[name] if onto == "dequantised" and name in held else W[name].double()
        exact = start + delta(tmp_path / "adapter", name)
        torch.testing.assert_close(merged.double(), exact, atol=1e-7, rtol=1e-6)
    assert (result.onto, result.why, result.built) == (onto, "as asked for", None)
    assert result.candidates is None
    found = verify(base, tmp_path / "adapter", tmp_path / "out")
    assert found.passed, found.reasons
    assert found.onto == onto


def test_both_are_measured_where_nobody_chose(folders):
    base, adapter, out, _ = folders
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.IDS.tolist()]
    result = merge_to_folder(base, adapter, out, inputs=rows)
    both = result.candidates
    assert result.onto == both.onto == "dequantised"  # random weights: no loss is surely lower
    assert "which may be chance" in result.why
    assert both.dequantised.relative_difference < 0.02 < 0.05 < both.original.relative_difference
    assert both.dtype == "bfloat16"

    found = verify(base, adapter, out, inputs=rows)
    assert found.passed, found.reasons
    assert found.candidates == both

    # the losses, again, from the folders alone
    def loss(model):
        model = model.float()
        logits = torch.cat([model(input_ids=ids[None]).logits for ids in tiny.IDS]).double()
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tiny.IDS[:, 1:].flatten()
        )

    with torch.no_grad():
        merged = loss(load_model(out, "CAUSAL_LM").model)
        assert both.dequantised.perplexity_merged == pytest.approx(merged.exp().item(), rel=1e-5)
        merge_to_folder(base, adapter, out, onto="original", overwrite=True)
        merged = loss(load_model(out, "CAUSAL_LM").model)
        assert both.original.perplexity_merged == pytest.approx(merged.exp().item(), rel=1e-5)
        original = loss(load_model(base, "CAUSAL_LM").model)
        assert both.original_base == pytest.approx(original.exp().item(), rel=1e-5)
    gain = torch.tensor([both.dequantised.perplexity_merged, both.original.perplexity_merged]).log()
    assert both.gain == pytest.approx((gain[0] - gain[1]).item(), abs=1e-5)
    # a folder that is not what was trained passes, and the certificate shows by how much it differs
    found = verify(base, adapter, out, inputs=rows)
    assert found.passed, found.reasons
    assert found.onto == "original"
    assert found.candidates.original == both.original
    assert "differ from those of training by" in found.warnings[-1]


def test_without_labels_the_nearest_to_training_is_written(folders):
    base, adapter, out, _ = folders
    result = merge_to_folder(base, adapter, out)
    assert result.onto == "dequantised"
    assert "no labelled rows" in result.why
    assert result.candidates.gain is None


def test_a_folder_is_held_against_what_it_says(folders):
    """Another program's merge says nothing: it is the one that it looks like."""
    base, adapter, out, _ = folders
    for onto, other in (("original", "dequantised"), ("dequantised", "original")):
        merge_to_folder(base, adapter, out, onto=onto, overwrite=True)
        tensors = tensors_of(out)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        assert verify(base, adapter, out).onto == onto
        says = {"lowrank.onto": json.dumps({"onto": other})}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt", **says})
        found = verify(base, adapter, out)
        assert not found.passed
        assert "Not as in the base" in found.reasons[-2] + found.reasons[-1]


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2_whose_files_hold_the_matrices_the_other_way(tmp_path, dora):
    base = write_base(tiny.gpt2(), tmp_path / "base", torch.bfloat16, tokenizer=False)
    held = trained(base, tmp_path / "adapter", "nf4", ["c_attn", "c_fc"], use_dora=dora)
    merge_to_folder(
        base, tmp_path / "adapter", tmp_path / "out", dtype="float32", onto="dequantised"
    )
    M, m = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "adapter")
    assert len(held) == 8
    for name, Q in held.items():
        exact = Q + delta(tmp_path / "adapter", name)
        norm = f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector"
        if dora and norm in m:
            exact = m[norm].double()[:, None] * exact / exact.norm(dim=1, keepdim=True)
        torch.testing.assert_close(M[name].double().T, exact, atol=1e-6, rtol=1e-6)
    assert verify(base, tmp_path / "adapter", tmp_path / "out").passed


def test_where_an_adapter_trained_in_four_bits_loads(folders, tmp_path, caplog):
    base, adapter, _, _ = folders

    def load(form, seed=0):
        if seed:
            write_base(tiny.llama(seed=seed), base, torch.bfloat16, tokenizer=False)
        model = quantised(base, form)[0] if form else load_model(base, "CAUSAL_LM").model
        caplog.clear()
        PeftModel.from_pretrained(model, adapter)
        return [message for message in caplog.messages if "was trained on" in message]

    assert load("nf4 doubly") == []
    for form in (None, "nf4"):
        (said,) = load(form)
        assert "doubly quantised" in said
    with pytest.raises(BaseMismatchError, match="quantised to int8 by row"):
        load("int8")
    for form in (None, "nf4 doubly", "int8"):
        with pytest.raises(BaseMismatchError, match="was trained on another base"):
            load(form, seed=1)


def test_an_adapter_of_the_base_in_16_bits_on_four(base, tmp_path, caplog):
    model = load_model(base, "CAUSAL_LM").model
    adapted = randomise(get_peft_model(model, LoraConfig(r=3, target_modules=TARGETS)))
    adapted.save_pretrained(tmp_path / "adapter")
    assert "quantisation" not in read_adapter(tmp_path / "adapter").metadata
    caplog.clear()
    PeftModel.from_pretrained(quantised(base, "nf4")[0], tmp_path / "adapter")
    assert "trained on this base unquantised, and is on it quantised to nf4" in caplog.text


@pytest.mark.parametrize("form", FORMS)
def test_a_base_that_is_stored_quantised(base, tmp_path, form):
    model, held = quantised(base, form)
    get_peft = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    randomise(get_peft).save_pretrained(tmp_path / "adapter")
    quantise_folder(base, tmp_path / "packed", FORMS[form])

    result = merge_to_folder(tmp_path / "packed", tmp_path / "adapter", tmp_path / "out")
    assert (result.onto, result.dtype, result.built) == ("dequantised", "bfloat16", None)
    assert "stored quantised" in result.why
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    M = tensors_of(tmp_path / "out")
    assert M.keys() == tensors_of(base).keys()
    for name, Q in held.items():
        exact = Q + delta(tmp_path / "adapter", name)
        torch.testing.assert_close(M[name].double(), exact, atol=0, rtol=2**-8)
    found = verify(tmp_path / "packed", tmp_path / "adapter", tmp_path / "out")
    assert found.passed, found.reasons
    assert found.candidates is None
    # the same folder against the base that was packed
    found = verify(base, tmp_path / "adapter", tmp_path / "out")
    assert found.passed, found.reasons
    assert found.onto == "dequantised"
    with pytest.raises(MergeError, match="the original weights are not in it"):
        merge_to_folder(tmp_path / "packed", tmp_path / "adapter", tmp_path / "o", onto="original")


def test_what_cannot_be_merged_says_what_to_do(folders, tmp_path):
    base, adapter, out, _ = folders
    with pytest.raises(MergeError, match="onto='quantised' is none of: dequantised, original"):
        merge_to_folder(base, adapter, out, onto="quantised")
    plain = tmp_path / "plain"
    model = load_model(base, "CAUSAL_LM").model
    get_peft_model(
        model, LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM")
    ).save_pretrained(plain)
    with pytest.raises(MergeError, match="does not say that it was trained on a quantised base"):
        merge_to_folder(base, plain, out, onto="original")
    with pytest.raises(MergeError, match="says that its base was quantised to nf4 in blocks of 64"):
        merge_to_folder(base, adapter, out, trained_on=FORMS["int8"])
    edit_config(base, quantization_config={"quant_method": "gptq", "bits": 4})
    said = r"stored quantised \(gptq\)(.|\n)*merge_and_unload"
    with pytest.raises(ModelFolderError, match=said):
        merge_to_folder(base, adapter, out)
    with pytest.raises(ModelFolderError, match=said):
        verify(base, adapter, base)
    assert not out.exists()


def test_layers_that_the_base_does_not_have(folders):
    base, adapter, out, _ = folders
    write_base(tiny.llama(layers=1), base, torch.bfloat16, tokenizer=False)
    with pytest.raises(LowrankError, match=r"model\.layers\.1"):
        merge_to_folder(base, adapter, out, onto="dequantised")


@pytest.mark.parametrize(
    ("bits", "form", "turns"), [(4, "nf4", 1), (8, "int8", 1), (4, "nf4", 3), (8, "int8", 2)]
)
def test_loftq_from_the_files(base, tmp_path, bits, form, turns):
    """Its adapter makes up for the quantisation: at the start Q + ΔW is nearer to W than Q is."""
    model = load_model(base, "CAUSAL_LM", dtype=torch.float32).model
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        init_lora_weights="loftq",
        loftq_config={"loftq_bits": bits, "loftq_iter": turns},
    )
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    start = read_adapter(tmp_path / "adapter").start
    assert bool(start) == (turns > 1)
    in_memory = model.merge_and_unload().state_dict()
    result = merge_to_folder(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert (result.onto, result.built) == ("dequantised", None)
    assert "LoftQ" in result.why
    W, M = tensors_of(base), tensors_of(tmp_path / "out")
    changed = [name for name in W if not torch.equal(W[name].float(), M[name])]
    assert len(changed) == 4
    for name in changed:
        less = 0.0
        if turns > 1:  # the adapter of the turn before, which is the best for what that turn lost
            key = f"base_model.model.{name.removesuffix('weight')}lora_"
            less = 5 / 3 * start[f"{key}B.weight"].double() @ start[f"{key}A.weight"].double()
        Q = rounded((W[name].double() - less).float(), FORMS[form]).double()
        torch.testing.assert_close(M[name], in_memory[name], atol=1e-7, rtol=1e-6)
        exact = Q + delta(tmp_path / "adapter", name)
        torch.testing.assert_close(M[name].double(), exact, atol=1e-7, rtol=1e-6)
        assert (exact - W[name].double()).norm() < 0.95 * (Q - W[name].double()).norm()
    found = verify(base, tmp_path / "adapter", tmp_path / "out")
    assert found.passed, found.reasons
    assert (found.onto, found.candidates) == ("dequantised", None)
    with pytest.raises(MergeError, match="it would count twice"):
        merge_to_folder(base, tmp_path / "adapter", tmp_path / "o", onto="original")


def test_loftq_in_several_turns_needs_what_it_took_out(base, tmp_path):
    model = load_model(base, "CAUSAL_LM", dtype=torch.float32).model
    config = LoraConfig(
        r=3,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        init_lora_weights="loftq",
        loftq_config={"loftq_bits": 4, "loftq_iter": 2},
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "lora_start.safetensors").unlink()  # as older folders are
    with pytest.raises(LowrankError, match="started with LoftQ stands on a quantised base"):
        merge_to_folder(base, tmp_path / "adapter", tmp_path / "out")


def test_a_rounding_that_is_not_ours_is_not_guessed(folders):
    """torchao's, HQQ's, GPTQ's: only the original weights are there to be merged onto, which both commands say."""
    base, adapter, out, _ = folders
    file = read_adapter(adapter)
    for row in file.metadata["quantisation"]:
        row |= {"format": "int8", "backend": "torchao", "block_size": None, "double": False}
    del file.metadata["base"]
    write_adapter(adapter, file)
    with pytest.raises(MergeError, match=r"int8 by row \(torchao\) cannot be made"):
        merge_to_folder(base, adapter, out, onto="dequantised")
    result = merge_to_folder(base, adapter, out)
    assert (result.onto, result.candidates) == ("original", None)
    assert "cannot be made from the original ones here" in result.why
    found = verify(base, adapter, out)
    assert found.passed, found.reasons
    assert "is not measured" in found.warnings[-1]


@pytest.mark.parametrize("form", ["nf4 doubly", "int8"])
def test_trained_on_bitsandbytes_layers(tmp_path, form):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(
        **{**tiny.DECODER, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    )
    base = tmp_path / "base"
    torch.manual_seed(0)
    write_base(transformers.LlamaForCausalLM(config), base, torch.bfloat16, tokenizer=False)
    words = {"load_in_8bit": True}
    if form != "int8":
        words = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(**words),
    )
    held = {}
    for path, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            Q = layer.weight.CB.double() * layer.weight.SCB.double()[:, None] / 127
        elif isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            state.dtype = (
                torch.float32
            )  # in which it computes, and not W's, to which it would round
            Q = bitsandbytes.functional.dequantize_4bit(layer.weight, state).double()
            state.dtype = torch.bfloat16
        else:
            continue
        held[f"{path}.weight"] = Q
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, task_type="CAUSAL_LM")
    randomise(get_peft_model(model, lora)).save_pretrained(tmp_path / "adapter")
    merge_to_folder(
        base, tmp_path / "adapter", tmp_path / "out", dtype="float32", onto="dequantised"
    )
    M = tensors_of(tmp_path / "out")
    assert len(held) == 7
    for name, Q in held.items():
        exact = Q + delta(tmp_path / "adapter", name)
        torch.testing.assert_close(M[name].double(), exact, atol=1e-7, rtol=1e-6)


def test_what_is_combined_or_resized_names_it_too(base, tmp_path, caplog):
    for name, form in (("one", "nf4"), ("two", "nf4"), ("other", "int8")):
        trained(base, tmp_path / name, form)
    one, two, other = (read_adapter(tmp_path / name) for name in ("one", "two", "other"))
    named = one.metadata["quantisation"]
    assert combine([one, two], [0.5, 0.7], "cat").metadata["quantisation"] == named
    assert resize(one, rank=2).metadata["quantisation"] == named
    assert "in several forms" not in caplog.text
    assert "quantisation" not in combine([one, other], [0.5, 0.7], "cat").metadata
    assert "in several forms (adapter 1: nf4 in blocks of 64" in caplog.text
    plain = one._replace(metadata={k: v for k, v in other.metadata.items() if k == "base"})
    assert combine([plain, two], [0.5, 0.7], "cat").metadata["quantisation"] == named


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_files_go_to_peft_and_come_from_it(folders, tmp_path):
    """PEFT loads what names its quantisation; what PEFT wrote is told."""
    import peft

    base, adapter, out, held = folders
    theirs = peft.PeftModel.from_pretrained(load_model(base, "CAUSAL_LM").model, adapter)
    theirs.save_pretrained(tmp_path / "theirs")
    assert not read_adapter(tmp_path / "theirs").metadata
    told = {"trained_on": FORMS["nf4 doubly"], "dtype": "float32"}
    result = merge_to_folder(base, tmp_path / "theirs", out, onto="dequantised", **told)
    assert result.onto == "dequantised"
    M = tensors_of(out)
    for name, Q in held.items():
        exact = Q + delta(adapter, name)
        torch.testing.assert_close(M[name].double(), exact, atol=1e-7, rtol=1e-6)
    found = verify(base, tmp_path / "theirs", out)
    assert found.passed, found.reasons
    assert found.onto == "dequantised"
    assert found.candidates.original.relative_difference > 0.05
