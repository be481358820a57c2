"""Telling one base model from another by a few of its entries."""

import base64
import json

import pytest
import torch
from tiny import llama, randomise
from torch import nn

from lowrank import LoraConfig, get_peft_model
from lowrank.errors import BaseMismatchError
from lowrank.fingerprint import (
    check_base,
    check_samples,
    differences,
    fingerprint,
    of_samples,
    sample_of,
)
from lowrank.kernels.quantisation import rounded
from lowrank.quantisation import Quantisation

NAMES = ["q_proj", "v_proj", "up_proj"]


def of(base, name="default", **options):
    config = LoraConfig(**{"r": 3, "target_modules": NAMES, **options})
    return fingerprint(get_peft_model(base, config, name), name)


def test_it_is_the_shape_and_32_entries_in_bfloat16():
    base = llama(layers=1)
    W = base.model.layers[0].self_attn.v_proj.weight.detach().clone()
    found = of(base)
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["model_type"] == "llama"
    assert set(found["weights"]) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.up_proj",
    }
    weight = found["weights"]["model.layers.0.self_attn.v_proj"]
    assert weight["shape"] == [12, 24]
    sample = torch.frombuffer(bytearray(base64.b64decode(weight["sample"])), dtype=torch.bfloat16)
    rows = [k * 12 // 32 for k in range(32)]
    columns = [(k * 7919 + 13) % 24 for k in range(32)]
    assert torch.equal(sample, W[rows, columns].bfloat16())
    assert len(set(zip(rows, columns, strict=True))) == 32
    json.dumps(found)


def test_adapters_and_merges_do_not_change_it():
    base = llama(layers=1)
    model = randomise(get_peft_model(base, LoraConfig(r=3, target_modules=NAMES)))
    before = fingerprint(model, "default")
    assert before == of(llama(layers=1))
    assert before == fingerprint(model.get_base_model(), "default")
    model.merge_adapter()
    assert fingerprint(model, "default") == before
    model.add_adapter("other", LoraConfig(r=2, target_modules=["down_proj"]))
    assert fingerprint(model, "default") == before
    assert set(fingerprint(model, "other")["weights"]) == {"model.layers.0.mlp.down_proj"}


def test_nothing_on_the_meta_device():
    with torch.device("meta"):
        assert of(llama(layers=1)) == {}


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype(saved, loaded):
    weights = llama(layers=1, dtype=torch.float32)
    first = of(weights.to(saved))
    second = of(llama(layers=1, dtype=torch.float32).to(saved).to(loaded))
    assert differences(first, second) == []
    assert differences(second, first) == []


def tiny_entries():
    """A base some of whose entries float16 cannot hold exactly: every large model has a few."""
    base = llama(layers=1, dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 2:
                parameter[:, ::12] = torch.randn_like(parameter[:, ::12]) * 1e-7
    return base


def test_entries_too_small_for_float16():
    assert differences(of(tiny_entries()), of(tiny_entries().half())) == []
    assert differences(of(tiny_entries().half()), of(tiny_entries())) == []


def test_another_base_of_the_same_shape():
    found = differences(of(llama(layers=1)), of(llama(layers=1, seed=1)))
    assert len(found) == 3
    assert all("of 32 sampled entries differ" in line for line in found)


def test_one_weight_that_differs():
    base = llama(layers=2)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    found = differences(of(llama(layers=2)), of(base))
    assert len(found) == 1
    assert found[0].startswith("model.layers.1.mlp.up_proj: 32 of 32")


def test_a_base_that_was_trained_a_little_further():
    base = llama(layers=2)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.01)
    assert differences(of(llama(layers=2)), of(base))


def test_many_entries_off_by_one_last_place_are_another_base():
    first, second = of(llama(layers=2)), of(llama(layers=2))
    for weight in second["weights"].values():
        data = torch.frombuffer(bytearray(base64.b64decode(weight["sample"])), dtype=torch.int16)
        weight["sample"] = base64.b64encode((data + 1).numpy().tobytes()).decode()
    found = differences(first, second)
    assert len(found) == 1
    assert "slightly different" in found[0]


def test_another_shape():
    class Wide(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(width, 5)

    found = differences(
        of(Wide(7), target_modules=["linear"]), of(Wide(8), target_modules=["linear"])
    )
    assert found == ["linear: trained on (out, in) = (5, 7), here (5, 8)"]


def test_weights_that_are_not_in_both_are_left_to_the_comparison_of_tensors():
    first = of(llama(layers=1), target_modules=["q_proj"])
    second = of(llama(layers=1, seed=1), target_modules=["v_proj"])
    assert differences(first, second) == []


def test_a_weight_smaller_than_the_sample():
    base = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()
    first = of(base, target_modules=["0", "1"])
    torch.manual_seed(5)
    second = of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double(), target_modules=["0", "1"])
    assert differences(first, first) == []
    assert len(differences(first, second)) == 2


def test_nan_in_both_is_the_same_and_in_one_is_not():
    bases = [llama(layers=1) for _ in range(3)]
    for base in bases[:2]:
        base.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
    first, second, third = map(of, bases)
    assert differences(first, second) == []
    for found in (differences(third, first), differences(first, third)):
        assert len(found) == 1
        assert "up_proj: 32 of 32" in found[0]


FORMS = {
    "16 bits": None,
    "nf4": Quantisation("nf4", "bitsandbytes", 64),
    "nf4 doubly": Quantisation("nf4", "lowrank", 64, True),
    "fp4": Quantisation("fp4", "bitsandbytes", 64),
    "int8": Quantisation("int8", "bitsandbytes"),
}
PAIRS = [(one, two) for one in FORMS for two in FORMS if one != two]


def in_form(W, form, dtype=torch.bfloat16):
    """The fingerprint of one weight, of dtype, in that form: what the quantised one stands for is W nearly."""
    quantisation = FORMS[form]
    W = W.to(dtype)
    held = W if quantisation is None else rounded(W, quantisation).to(dtype)
    return {"architecture": "X", "weights": of_samples({"w": sample_of(held, quantisation)})}


def weights(seed, spread=1.0):
    """Rows of very different sizes, which is hardest for scales that are rounded themselves."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.02 * (spread * torch.randn(71, 1, generator=generator)).exp()
    return torch.randn(71, 130, generator=generator) * sizes


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_the_same_base_in_another_form_and_never_another_base(one, two):
    for seed in range(20):
        W = weights(seed)
        then, now = in_form(W, one), in_form(W, two, torch.float16)
        assert differences(then, now) == []
        assert differences(in_form(W, one, torch.float32), now) == []
        # of the 32 entries of a wrong weight at least four cannot be what they would have to be
        (line,) = differences(then, in_form(weights(seed + 1000), two))
        assert "not the same weight rounded" in line
        assert int(line.split()[1]) >= 4


@pytest.mark.parametrize("form", ["nf4", "nf4 doubly", "int8"])
def test_a_base_trained_a_little_further_is_seen_through_the_rounding(form):
    """2% of noise, as between a base and its chat model: not in every weight, but in most."""
    seen = 0
    for seed in range(10):
        W = weights(seed, spread=0.2)
        noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed + 50))
        further = W + 0.02 * W.std(dim=1, keepdim=True) * noise
        assert differences(in_form(W, form), in_form(W, "16 bits")) == []
        seen += bool(differences(in_form(W, form), in_form(further, "16 bits")))
    assert seen >= 5


def test_what_is_kept_of_a_quantised_weight():
    W = weights(3)
    W[9, 40] = 5.0  # of entry 4's block the largest: its flat place is 9·130 + 53
    (row,) = in_form(W, "nf4", torch.float32)["weights"].values()
    scales = torch.frombuffer(bytearray(base64.b64decode(row["scales"])), dtype=torch.float32)
    assert row["quantisation"] == {
        "format": "nf4",
        "backend": "bitsandbytes",
        "block_size": 64,
        "double": False,
    }
    flat = W.flatten()
    for k, scale in enumerate(scales):
        place = (k * 71 // 32) * 130 + (k * 7919 + 13) % 130
        block = flat[place // 64 * 64 : place // 64 * 64 + 64]
        assert scale == pytest.approx(block.abs().max().item(), rel=1e-6)
    assert "scale_error" not in row
    assert 0 < in_form(W, "nf4 doubly")["weights"]["w"]["scale_error"] < 0.05
    json.dumps(row)


def test_adapters_say_which_quantised_base_they_want(caplog):
    """Another quantisation is an error; 16 bits where it was 4, and the reverse, one line in the log."""
    layer = nn.Linear(130, 71, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weights(0))
    base = nn.Sequential(layer)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))

    def saved(form):
        found = in_form(layer.weight.detach(), form, torch.float32)["weights"]["w"]
        return {"architecture": "X", "weights": {"0": found}}

    for form in ("16 bits", "nf4"):
        caplog.clear()
        check_base(model, "default", saved(form), (), "runs/a")
        assert len(caplog.messages) == (form != "16 bits")
    assert (
        "quantised to nf4 in blocks of 64 (bitsandbytes), and is on it unquantised" in caplog.text
    )
    samples = {"0": sample_of(rounded(layer.weight, FORMS["nf4"]), FORMS["nf4"])}
    check_samples(saved("nf4"), samples, "runs/a", "here", "there")
    check_samples(saved("nf4 doubly"), {"0": samples["0"]}, "a", "here", None)
    with pytest.raises(BaseMismatchError, match="quantised to int8 by row") as error:
        check_samples(saved("int8"), samples, "runs/a", "here", "there")
    assert "Load the base as it was for training, or unquantised" in str(error.value)
    other = sample_of(rounded(weights(1), FORMS["nf4"]), FORMS["nf4"])
    with pytest.raises(BaseMismatchError, match="was trained on another base"):
        check_samples(saved("int8"), {"0": other}, "runs/a", "here", "there")
