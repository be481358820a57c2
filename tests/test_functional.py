"""Adapters in models that no PeftModel is around."""

import math
from functools import partial

import pytest
import tiny
import torch
from torch import nn

from lowrank import LoraConfig, functional, get_peft_model, inject_adapter_in_model
from lowrank.errors import AdapterNameError, MergeError, TargetError
from lowrank.layer import LoraLayer
from lowrank.wrappers import adapter_parameters

CONFIG = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}


def two():
    model = tiny.llama()
    for name, more in (("a", {"modules_to_save": ["lm_head"]}), ("b", {"use_dora": True})):
        inject_adapter_in_model(LoraConfig(**CONFIG, **more), model, name)
    for seed, name in enumerate("ab"):
        functional.set_adapter(model, name)
        tiny.randomise(model, seed)
    return model


def trainable(model):
    return {
        name
        for name in "ab"
        if all(p.requires_grad for key, p in adapter_parameters(model) if f".{name}" in key)
    }


def test_set_adapter_makes_them_act_and_trainable():
    model = two()
    alone = {}
    for name in "ab":
        functional.set_adapter(model, name)
        alone[name] = tiny.logits(model)
        assert trainable(model) == {name}
    functional.set_adapter(model, ["a", "b"], inference_mode=True)
    assert trainable(model) == set()
    assert not torch.allclose(tiny.logits(model), alone["b"])
    functional.set_adapter(model, "a")
    assert torch.equal(tiny.logits(model), alone["a"])
    with pytest.raises(AdapterNameError, match="no adapter named 'c'; there are: a, b"):
        functional.set_adapter(model, "c")


def test_delete_adapter_returns_what_is_active_now():
    model = two()
    functional.set_adapter(model, ["a", "b"])
    assert functional.delete_adapter(model, "a", prefix="lora_") == ["b"]
    assert functional.delete_adapter(model, "b") is None
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


@pytest.mark.parametrize("learns", [True, False])
def test_deleting_the_active_adapter_activates_the_first_that_is_left(learns):
    model = two()
    functional.set_adapter(model, "a")
    expected = tiny.logits(model)
    functional.set_adapter(model, "b", inference_mode=not learns)
    assert functional.delete_adapter(model, "b") == ["a"]
    assert torch.equal(tiny.logits(model), expected)
    assert ("a" in trainable(model)) == learns


def test_a_merged_adapter_is_not_deleted():
    model = two()
    next(m for m in model.modules() if isinstance(m, LoraLayer)).merge(adapter_names=["b"])
    with pytest.raises(MergeError, match="unmerge_adapter"):
        functional.delete_adapter(model, "b")


def test_set_requires_grad():
    model = two()
    functional.set_requires_grad(model, ["a", "b"])
    assert trainable(model) == {"a", "b"}
    functional.set_requires_grad(model, "a", False)
    assert trainable(model) == {"b"}


def test_cast_adapter_dtype_changes_one_adapter():
    model = two().to(torch.bfloat16)
    functional.cast_adapter_dtype(model, "a", autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    functional.cast_adapter_dtype(model, "a")
    wide = {key for key, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {key for key, _ in adapter_parameters(model) if ".lora_" in key and ".a." in key}


def test_cast_mixed_precision_params():
    model = two()
    functional.cast_mixed_precision_params(model, torch.float16)
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.float16)


@pytest.mark.parametrize("multiplier", [0, 0.25, -2])
def test_rescaled_adapters_are_the_formula(multiplier):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(7, 5)).double()
    base = net[0]
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=["0"]), net)
    tiny.randomise(net)
    A, B = net[0].lora_A["default"].weight, net[0].lora_B["default"].weight
    x = torch.randn(4, 7, dtype=torch.float64)
    before = net(x)
    with functional.rescale_adapter_scale(net, multiplier):
        expected = x @ (base.weight + multiplier * 5 / 3 * B @ A).T + base.bias
        torch.testing.assert_close(net(x), expected)
    assert torch.equal(net(x), before)
    with pytest.raises(KeyError), functional.rescale_adapter_scale(net, multiplier):
        raise KeyError
    assert torch.equal(net(x), before)


def test_what_cannot_be_rescaled():
    with (
        pytest.raises(TargetError, match="no adapters"),
        functional.rescale_adapter_scale(nn.Linear(2, 2), 1),
    ):
        pass
    with (
        pytest.raises(TypeError, match="must be a number"),
        functional.rescale_adapter_scale(two(), "1"),
    ):
        pass


@pytest.mark.parametrize("active", [True, False])
def test_the_input_is_never_cast(active):
    """A float64 input of a float32 layer: the base complains, whoever casts inputs or not."""
    net = nn.Sequential(nn.Linear(7, 5))
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["0"]), net)
    seen = []
    net[0].base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with functional.disable_input_dtype_casting(net, active):
        net.to(torch.bfloat16)(torch.ones(2, 7, dtype=torch.bfloat16))
    assert seen == [torch.bfloat16]


def test_get_submodules():
    model = tiny.llama()
    parent, module, name = functional.get_submodules(model, "model.layers.1.mlp.up_proj")
    assert (parent, module, name) == (model.model.layers[1].mlp, parent.up_proj, "up_proj")
    assert functional.get_submodules(model, "lm_head")[0] is model


def test_fsdp_wraps_blocks_and_trainable_leaves(monkeypatch):
    model = get_peft_model(tiny.llama(), LoraConfig(**CONFIG))

    def wrapped():
        policy = partial(functional.fsdp_auto_wrap_policy(model), recurse=False, nonwrapped_numel=0)
        return [name for name, m in model.named_modules() if policy(module=m)]

    leaves = [f"{key}.weight" for key in wrapped() if ".lora_" in key]
    blocks = {key for key in wrapped() if ".lora_" not in key}
    assert leaves == [key for key, _ in adapter_parameters(model)]
    assert blocks == {f"base_model.model.model.layers.{i}" for i in (0, 1)}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    assert {key for key in wrapped() if ".lora_" not in key} == {f"{block}.mlp" for block in blocks}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMPL")
    with pytest.raises(TargetError, match="LlamaMLP"):
        wrapped()
    assert math.isfinite(tiny.logits(model).sum())
