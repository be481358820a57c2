"""docs/differences-from-peft.md, entry by entry: ours is the formula, PEFT's is not."""

import copy

import peft
import pytest
import torch
from torch import nn

import lowrank

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


def adapted(library, net, **options):
    """`net` (a copy) with an adapter of numbers that both libraries get alike; float64."""
    net = copy.deepcopy(net)
    config = library.LoraConfig(r=3, lora_alpha=5, **options)
    model = library.get_peft_model(net, config, autocast_adapter_dtype=False)
    return filled(model)


def filled(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                new = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3
                p.copy_(new.abs() + 0.5 if "magnitude" in name else new)
    return model.eval()


def off(found, expected):
    """How far two tensors are from one another, as a share of the second; infinity for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).norm() / expected.norm()).item()


def dense(layer, x, delta):
    """`layer` with W + ΔW as its weight."""
    layer = copy.deepcopy(layer)
    layer.weight = nn.Parameter(layer.weight + delta.reshape(layer.weight.shape))
    return layer(x)


def factors(model, name="default"):
    at = f".{name}.weight"
    A = next(p for n, p in model.named_parameters() if n.endswith(f"lora_A{at}"))
    B = next(p for n, p in model.named_parameters() if n.endswith(f"lora_B{at}"))
    return A.detach(), B.detach()


CONVOLUTIONS = {
    "dilation": (nn.Conv2d(3, 4, 3, dilation=2), (2, 3, 9, 8)),
    "circular padding": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 5)),
}


@pytest.mark.parametrize("what", CONVOLUTIONS)
def test_convolutions(what):
    layer, shape = CONVOLUTIONS[what]
    net = nn.Sequential(layer).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    errors = {}
    for library in (lowrank, peft):
        model = adapted(library, net, target_modules=["0"])
        A, B = factors(model)
        truth = dense(net[0], x, 5 / 3 * B.flatten(1) @ A.flatten(1))
        try:
            errors[library] = off(model(x), truth)
        except RuntimeError:
            errors[library] = float("inf")
    assert errors[lowrank] < 1e-12
    assert errors[peft] > 0.01


def test_merging_a_3d_convolution_of_one_row():
    net = nn.Sequential(nn.Conv3d(3, 4, (1, 1, 3))).double().eval()
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    errors = {}
    for library in (lowrank, peft):
        model = adapted(library, net, target_modules=["0"])
        before = model(x)
        try:
            model.merge_adapter()
            errors[library] = off(model(x), before)
        except RuntimeError:
            errors[library] = float("inf")
    assert errors[lowrank] < 1e-12
    assert errors[peft] > 0.01


def test_dropout_of_an_embedding():
    net = nn.Sequential(nn.Embedding(11, 5)).double()
    x = torch.arange(11)[None]
    acts = {}
    for library in (lowrank, peft):
        model = adapted(library, net, target_modules=["0"], lora_dropout=0.5).train()
        whole = model.eval()(x)
        acts[library] = off(model.train()(x), whole) > 0.01
    assert acts == {lowrank: True, peft: False}


def test_several_dora_adapters_add_up():
    net = nn.Sequential(nn.Linear(7, 5)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    errors = {}
    for library in (lowrank, peft):
        model = adapted(library, net, target_modules=["0"], use_dora=True)
        config = library.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True)
        model.add_adapter("other", config, autocast_adapter_dtype=False)
        model.set_adapter("other")
        filled(model, 2)
        alone = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            alone[name] = model(x) - net(x)
        model.base_model.set_adapter(["default", "other"])
        errors[library] = off(model(x) - net(x), alone["default"] + alone["other"])
    assert errors[lowrank] < 1e-12
    assert errors[peft] > 0.01


def test_both_projections_of_attention():
    """in_proj and out_proj are adapted once each."""
    net = nn.Sequential()
    net.attention = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    x = torch.randn(2, 4, 12, dtype=torch.float64)

    def run(model):
        attention = model.base_model.model.attention
        return attention(x, x, x, need_weights=False)[0]

    errors = {}
    for library in (lowrank, peft):
        model = adapted(library, net, target_modules=["attention", "out_proj"])
        tensors = {
            key.removeprefix("base_model.model.").replace(".base_layer.", "."): t
            for key, t in library.get_peft_model_state_dict(model).items()
        }
        truth = copy.deepcopy(net)
        with torch.no_grad():
            for path, weight in (
                ("attention", truth.attention.in_proj_weight),
                ("attention.out_proj", truth.attention.out_proj.weight),
            ):
                A, B = (tensors.get(f"{path}.lora_{x}.weight") for x in "AB")
                if A is not None:
                    weight += 5 / 3 * B @ A
            expected = truth.attention(x, x, x, need_weights=False)[0]
            errors[library] = off(run(model), expected), len(tensors)
    assert errors[lowrank][0] < 1e-12
    assert errors[lowrank][1] == 4
    assert errors[peft][0] > 0.01


def test_a_failed_mixed_batch_leaves_the_active_adapter():
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).double()
    x = torch.randn(2, 7, dtype=torch.float64)
    same = {}
    for library in (lowrank, peft):
        model = adapted(library, net, target_modules=["0"], modules_to_save=["1"])
        config = library.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
        model.add_adapter("other", config)
        before = model(x)

        def fail(*args):
            raise KeyError("in the middle")

        hook = model.base_model.model[1].register_forward_hook(fail)
        with pytest.raises(KeyError):
            model(x, adapter_names=["other", "__base__"])
        hook.remove()
        same[library] = off(model(x), before) < 1e-12
    assert same == {lowrank: True, peft: False}


def test_olora_on_a_transposed_linear_starts_at_the_base():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(5, 7))
    x = torch.randn(4, 7)
    errors = {}
    for library in (lowrank, peft):
        config = library.LoraConfig(
            r=3, target_modules=["0"], init_lora_weights="olora", fan_in_fan_out=True
        )
        try:
            errors[library] = off(library.get_peft_model(copy.deepcopy(net), config)(x), net(x))
        except RuntimeError:
            errors[library] = float("inf")
    assert errors[lowrank] < 1e-5
    assert errors[peft] > 0.01
