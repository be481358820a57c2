"""What is seen of a layer's inputs, and that the model is left as it was."""

import pytest
import tiny
import torch
from models import ConvNet, Net
from torch import nn

from lowrank import LoraConfig, get_peft_model
from lowrank.calibration.observe import SharedInputs, planned, undisturbed, watching
from lowrank.errors import InitDataError


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_modes_adapters_and_random_numbers_come_back(training, fails):
    model = get_peft_model(tiny.llama(), LoraConfig(r=3, init_lora_weights=False))
    model.train()
    model.base_model.model.model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    base = model.get_base_model()
    before, state = tiny.logits(model), torch.get_rng_state()
    try:
        with undisturbed(base, training):
            assert base.training == training
            torch.rand(3)
            with_adapter, without = tiny.logits(base), before
            assert not torch.allclose(with_adapter, without)
            if fails:
                raise KeyError("x")
    except KeyError:
        assert fails
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tiny.logits(model), before)


def test_adapters_that_were_disabled_stay_so():
    model = get_peft_model(tiny.llama(), LoraConfig(r=3, init_lora_weights=False))
    with model.disable_adapter():
        before = tiny.logits(model)
        with undisturbed(model, False):
            pass
        assert torch.equal(tiny.logits(model), before)
    assert not torch.allclose(tiny.logits(model), before)


def test_hooks_are_gone_also_after_an_error():
    model = Net()
    places = planned(model, LoraConfig(target_modules=["q_proj", "down"]))
    with watching(places, lambda path, inputs: None):
        assert hooks(model) == 6
    assert hooks(model) == 0

    def run():
        with watching(places, lambda path, inputs: None):
            model(torch.rand(2))

    with pytest.raises(RuntimeError):
        run()
    assert hooks(model) == 0


def seen(model, config, run):
    found = {}
    places = planned(model, config)
    with torch.no_grad(), watching(places, lambda path, inputs: found.update({path: inputs[0]})):
        run(model)
    return places, found


def test_a_linear_layer_meets_its_input():
    model = Net().double()
    tokens = torch.tensor([[1, 5, 7], [0, 3, 10]])
    _, found = seen(model, LoraConfig(target_modules=["q_proj"]), lambda m: m(tokens))
    assert list(found) == [f"layers.{i}.q_proj" for i in range(3)]
    assert torch.equal(found["layers.0.q_proj"], model.embed(tokens))


def test_an_input_given_by_keyword_is_seen():
    model = nn.Sequential(nn.Linear(3, 2))
    x = torch.rand(4, 3)
    _, found = seen(model, LoraConfig(target_modules=["0"]), lambda m: m[0](input=x))
    assert found["0"] is x


def test_a_convolution_meets_patches():
    """W flattened times the patches, plus the bias, is the layer's output: for any stride, padding and group."""
    model = ConvNet().double()
    x = torch.randn(2, 3, 11, 9, dtype=torch.float64)
    outputs = {}
    for name in ("conv1", "conv2"):
        module = getattr(model, name)
        module.register_forward_hook(lambda m, a, y, name=name: outputs.update({name: y}))
    places, found = seen(model, LoraConfig(target_modules=["conv1", "conv2"]), lambda m: m(x))
    for name, patches in found.items():
        module = getattr(model, name)
        W = module.weight.flatten(1).view(module.groups, -1, places[name].in_)
        y = torch.einsum("bhwgi,goi->bhwgo", patches, W).flatten(3) + module.bias
        torch.testing.assert_close(y.movedim(-1, 1), outputs[name])


def test_layers_with_the_very_same_input_share_it():
    model = tiny.llama()
    places = planned(model, LoraConfig(target_modules="all-linear"))
    shared = SharedInputs(places)
    looked_at = []

    def see(path, inputs):
        if shared.is_new(path, inputs[0]):
            looked_at.append(path)

    with torch.no_grad(), watching(places, see):
        model(input_ids=tiny.IDS)
        model(input_ids=tiny.IDS)
    ending = [path.rpartition(".")[2] for path in looked_at]
    assert ending == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 4
    layer = "model.layers.1."
    assert shared.leader[f"{layer}self_attn.v_proj"] == f"{layer}self_attn.q_proj"
    assert shared.leader[f"{layer}mlp.up_proj"] == f"{layer}mlp.gate_proj"


def test_an_input_that_was_changed_in_between_is_another():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    shared = SharedInputs(planned(model, LoraConfig(target_modules=["0", "1", "2"])))
    x = torch.rand(2, 3)
    assert shared.is_new("0", x)
    assert not shared.is_new("1", x)
    x.add_(1)
    assert shared.is_new("2", x)
    with pytest.raises(InitDataError, match="1 had the input of 0 at first"):
        shared.is_new("1", x.clone())
