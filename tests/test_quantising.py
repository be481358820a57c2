"""`quantise_model`: which layers, what it leaves, and that the model then computes with the rounded weights."""

import copy

import pytest
import tiny
import torch
from torch import nn

import lowrank
from lowrank import LoraConfig, Quantisation, quantise_model
from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.errors import TargetError
from lowrank.kernels.quantisation import rounded
from lowrank.quantising import quantisable

NF4 = Quantisation("nf4", block_size=64, double=True)
KEPT = {
    "llama": ["lm_head"],
    "gpt2": ["lm_head"],
    "t5": [
        *(f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)),
        *(f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(2)),
        "lm_head",
    ],
    "bert": ["cls.predictions.decoder"],
}


def linear_layers(model):
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]


@pytest.mark.parametrize("name", KEPT)
def test_the_model_computes_with_the_rounded_weights(name):
    model = getattr(tiny, name)(dtype=torch.float32)
    by_hand = copy.deepcopy(model)
    paths = quantise_model(model, NF4)
    assert linear_layers(model) == KEPT[name]
    assert sorted(paths + KEPT[name]) == sorted(linear_layers(by_hand))
    for path in paths:
        weight = by_hand.get_submodule(path).weight
        transposed = name == "gpt2"
        W = rounded(weight.T if transposed else weight, NF4)
        weight.data = (W.T if transposed else W).contiguous()
    torch.testing.assert_close(tiny.logits(model), tiny.logits(by_hand), atol=1e-4, rtol=1e-4)


def test_an_adapter_on_it_is_the_adapter_on_the_rounded_model(tmp_path):
    model = tiny.llama(dtype=torch.float32)
    by_hand = copy.deepcopy(model)
    for path in quantise_model(model, NF4):
        weight = by_hand.get_submodule(path).weight
        weight.data = rounded(weight, NF4)
    adapted = tiny.randomise(lowrank.get_peft_model(model, LoraConfig(target_modules="all-linear")))
    adapted.eval().save_pretrained(tmp_path)
    same = lowrank.PeftModel.from_pretrained(by_hand, tmp_path)
    torch.testing.assert_close(tiny.logits(adapted), tiny.logits(same), atol=1e-4, rtol=1e-4)
    assert adapted.get_nb_trainable_parameters() == tiny_count(same, adapted)


def tiny_count(same, adapted):
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in same.parameters())


def test_what_is_named_is_skipped_instead():
    model = tiny.llama(dtype=torch.float32)
    paths = quantise_model(model, NF4, skip=["layers.0", "o_proj"], compute_dtype=torch.bfloat16)
    assert isinstance(model.lm_head, QuantisedLinear)
    assert model.lm_head.compute_dtype == torch.bfloat16
    assert not any(".0." in path or path.endswith("o_proj") for path in paths)
    assert len(paths) == 6 + 1
    assert quantise_model(model, NF4, skip=["layers.0", "o_proj"]) == []
    with pytest.raises(TargetError, match=r"skip names 'oproj'.*Did you mean 'o_proj'"):
        quantisable(model, ["oproj"])


def test_on_the_meta_device_and_then_loaded():
    model = tiny.llama(dtype=torch.float32)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert quantise_model(empty, NF4) == quantisable(model)
    quantise_model(model, NF4)
    empty.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(
        empty.model.layers[0].mlp.up_proj.dequantised(),
        model.model.layers[0].mlp.up_proj.dequantised(),
    )


def test_layers_whose_weight_another_module_takes_are_left():
    attention = nn.TransformerEncoderLayer(64, 2)
    assert quantisable(attention) == []
    assert quantisable(nn.Sequential(nn.Linear(4, 5), nn.Conv2d(3, 4, 1), nn.Embedding(3, 4))) == [
        "0"
    ]
