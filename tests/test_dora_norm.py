"""DoRA's norm: as exact from a 16-bit W as from its float32 copy, and never out of date where it is remembered."""

import copy

import pytest
import tiny
import torch
from models import Net
from torch import nn

import lowrank.dora_norm
from lowrank import LoraConfig, PeftModel, get_peft_model
from lowrank.lora import Lora, merged_weight_norm, row_squares

OUT, IN, R = 48, 160, 5


def exact_norm(W, A, B, scaling):
    return (W.double() + scaling * B.double() @ A.double()).norm(dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cancelled", [0.0, 0.5, 0.9])
def test_the_norm_of_a_16_bit_weight_is_exact_also_where_the_change_removes_most_of_it(
    dtype, cancelled
):
    torch.manual_seed(0)
    U, V = torch.randn(OUT, R), torch.randn(R, IN)
    W = (U @ V * 0.02).to(dtype)  # of rank R, so that a change can take it away
    A, B = V * 0.02, -cancelled * U + 0.01 * torch.randn(OUT, R)
    exact = exact_norm(W, A, B, 0.75 / 0.75)
    found = merged_weight_norm(W, Lora(A, B, 1.0)).double()
    assert ((found - exact) / exact).abs().max() < 1e-3
    with_squares = merged_weight_norm(W, Lora(A, B, 1.0), row_squares(W))
    assert torch.equal(with_squares.double(), found)


def test_autocast_does_not_round_the_norm():
    torch.manual_seed(0)
    W, A, B = torch.randn(OUT, IN), torch.randn(R, IN), torch.randn(OUT, R)
    with torch.autocast("cpu", torch.bfloat16):
        found = merged_weight_norm(W, Lora(A, B, 0.5))
    torch.testing.assert_close(found.double(), exact_norm(W, A, B, 0.5), rtol=1e-6, atol=0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net(layers=1).eval()


CONFIG = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up"], "use_dora": True}


@pytest.fixture
def frozen(tmp_path) -> PeftModel:
    """An adapter loaded for inference: the norm is kept."""
    model = tiny.randomise(get_peft_model(net(), LoraConfig(**CONFIG)))
    model.save_pretrained(tmp_path)
    return PeftModel.from_pretrained(net(), tmp_path)


def output(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 4, 9, 3]]))


def by_hand(model):
    layer_scaling = model.base_model.model.layers[0].q_proj.scaling["default"]
    from lowrank import get_peft_model_state_dict

    base = copy.deepcopy(model).unload()
    merged = tiny.merged_by_hand(base, get_peft_model_state_dict(model), float(layer_scaling))
    return merged(torch.tensor([[1, 4, 9, 3]])).float()


def test_a_frozen_adapters_norm_is_worked_out_once(frozen, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(1)
        return merged_weight_norm(*arguments)

    monkeypatch.setattr(lowrank.dora_norm, "merged_weight_norm", counted)
    first = output(frozen)
    assert len(calls) == 2  # one for each layer
    assert torch.equal(output(frozen), first)
    assert len(calls) == 2
    torch.testing.assert_close(first, by_hand(frozen))
    frozen.set_adapter("default")  # now it trains
    output(frozen)
    output(frozen)
    assert len(calls) == 6


def _add(parameter):
    with torch.no_grad():
        parameter.add_(0.1)


def _replace(layer, name):
    setattr(layer, name, nn.Parameter(getattr(layer, name) * 1.5, requires_grad=False))


CHANGES = {
    "A in place": lambda layer: _add(layer.lora_A["default"].weight),
    "B in place": lambda layer: _add(layer.lora_B["default"].weight),
    "B's data replaced": lambda layer: setattr(
        layer.lora_B["default"].weight, "data", layer.lora_B["default"].weight.data * 2
    ),
    "A replaced": lambda layer: _replace(layer.lora_A["default"], "weight"),
    "W in place": lambda layer: _add(layer.base_layer.weight),
    "W replaced": lambda layer: _replace(layer.base_layer, "weight"),
    "W's data replaced": lambda layer: setattr(
        layer.base_layer.weight, "data", layer.base_layer.weight.data * 2
    ),
    "magnitude in place": lambda layer: _add(layer.lora_magnitude_vector["default"].weight),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_remembered_follows_every_change(frozen, change):
    before = output(frozen)
    change(frozen.base_model.model.layers[0].q_proj)
    after = output(frozen)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, by_hand(frozen))


def test_it_follows_scaling_dtype_merging_and_copies(frozen):
    output(frozen)
    for layer in (frozen.base_model.model.layers[0].q_proj, frozen.base_model.model.layers[0].up):
        layer.set_scale("default", 0.5)
    scaled = output(frozen)
    torch.testing.assert_close(scaled, by_hand(frozen))
    frozen.merge_adapter()
    torch.testing.assert_close(output(frozen), scaled)
    frozen.unmerge_adapter()
    assert torch.equal(output(frozen), scaled)
    again = copy.deepcopy(frozen)
    _add(again.base_model.model.layers[0].q_proj.lora_A["default"].weight)
    torch.testing.assert_close(output(again), by_hand(again))
    assert torch.equal(output(frozen), scaled)
    torch.testing.assert_close(
        output(frozen.double()), by_hand(frozen).double(), rtol=1e-4, atol=1e-6
    )


def test_what_trains_may_be_written_to_behind_torchs_back(frozen):
    frozen.set_adapter("default")
    output(frozen)
    frozen.base_model.model.layers[0].q_proj.lora_B["default"].weight.data.mul_(3)
    torch.testing.assert_close(output(frozen), by_hand(frozen))


def test_what_inference_mode_worked_out_can_be_trained_on(frozen):
    with torch.inference_mode():
        frozen(torch.tensor([[1, 4]]))
    layer = frozen.base_model.model.layers[0].q_proj
    layer.lora_magnitude_vector["default"].weight.requires_grad_(True)
    frozen(torch.tensor([[1, 4]])).sum().backward()
    assert layer.lora_magnitude_vector["default"].weight.grad.any()
