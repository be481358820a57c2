"""`ModulesToSaveWrapper`: whole copies of a module, one for each adapter."""

import copy

import pytest
import torch
from models import AttentionNet, Net
from torch import nn

from lowrank.config import LoraConfig
from lowrank.errors import AdapterNameError
from lowrank.inject import eject, inject
from lowrank.saved_module import ModulesToSaveWrapper
from lowrank.targets import plan
from lowrank.wrappers import wrappers


def wrapped(*names: str) -> ModulesToSaveWrapper:
    wrapper = ModulesToSaveWrapper(nn.Linear(7, 5))
    for name in names:
        wrapper.add_adapter(name)
        with torch.no_grad():
            for parameter in wrapper.modules_to_save[name].parameters():
                parameter.add_(torch.randn_like(parameter))
    return wrapper


def test_the_copy_of_the_active_adapter_runs():
    wrapper, x = wrapped("a", "b"), torch.randn(2, 7)
    original = copy.deepcopy(wrapper.original_module)
    assert torch.equal(wrapper(x), original(x))
    for name in ("a", "b"):
        wrapper.set_adapter(name)
        copied = wrapper.modules_to_save[name]
        torch.testing.assert_close(wrapper(x), x @ copied.weight.T + copied.bias)
        assert not torch.allclose(wrapper(x), original(x))
        assert wrapper.weight is copied.weight
    wrapper.enable_adapters(False)
    assert torch.equal(wrapper(x), original(x))
    assert wrapper.weight is wrapper.original_module.weight
    wrapper.enable_adapters(True)
    wrapper.set_adapter("of other layers")
    assert torch.equal(wrapper(x), original(x))


def test_only_the_active_copy_is_trained():
    wrapper = wrapped("a", "b")
    assert not any(p.requires_grad for p in wrapper.parameters())
    wrapper.set_adapter("b")
    trained = [key for key, p in wrapper.named_parameters() if p.requires_grad]
    assert trained == ["modules_to_save.b.weight", "modules_to_save.b.bias"]
    wrapper.set_adapter("b", inference_mode=True)
    assert not any(p.requires_grad for p in wrapper.parameters())


def test_two_whole_modules_do_not_add_up():
    wrapper = wrapped("a", "b")
    with pytest.raises(AdapterNameError, match="only one of them can be active"):
        wrapper.set_adapter(["a", "b"])


def test_a_deleted_copy_runs_no_more():
    wrapper, x = wrapped("a"), torch.randn(2, 7)
    wrapper.set_adapter("a")
    wrapper.delete_adapter("a")
    wrapper.delete_adapter("a")
    assert torch.equal(wrapper(x), wrapper.original_module(x))
    assert wrapper.active_adapters == []


def test_attributes_are_those_of_the_module_that_runs():
    wrapper = wrapped("a")
    assert wrapper.in_features == 7
    with pytest.raises(AttributeError, match="no_such"):
        _ = wrapper.no_such


@pytest.mark.parametrize("saved", [["self_attn"], ["linear1", "norm1"], ["out_proj"], ["head"]])
def test_torchs_fused_encoder_layer_runs_the_copies(saved):
    """In eval mode it reads private attributes of its attention, and the weights of all its parts."""
    net = AttentionNet(layers=1)
    net.layers[0].self_attn.num_heads = 2  # the fused path wants an even number
    net.layers[0].self_attn.head_dim = 6
    config = LoraConfig(target_modules=["head" if saved != ["head"] else "linear2"])
    found = [path for path, _ in net.named_modules() if path.split(".")[-1] in saved]
    inject(net, plan(net, config), "a", saved=found)
    for _, wrapper in wrappers(net):
        wrapper.set_adapter("a")
        if isinstance(wrapper, ModulesToSaveWrapper):
            with torch.no_grad():
                for parameter in wrapper.modules_to_save["a"].parameters():
                    parameter.add_(torch.randn_like(parameter) / 4)
    x = torch.randn(2, 5, 12)
    expected = net.train()(x)
    torch.testing.assert_close(net.eval()(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_shares_nothing_with_the_original():
    net = Net(layers=1)
    net.head.weight = nn.Parameter(net.embed.weight[:5].detach().clone())
    before = net.head.weight.clone()
    inject(net, plan(net, LoraConfig(target_modules=["up"])), "a", saved=["head"])
    with torch.no_grad():
        net.head.modules_to_save["a"].weight.zero_()
    assert torch.equal(net.head.original_module.weight, before)
    for _, wrapper in wrappers(net):
        wrapper.set_adapter("a")
    eject(net)
    assert not net.head.weight.any()
    assert isinstance(net.head, nn.Linear)
