"""`QuantisedLinear` against W in float64, in backward and in files; and its files against bitsandbytes' layers."""

import copy
import importlib.util
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import LoraConfig
from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.errors import QuantisationError
from lowrank.kernels.quantised_linear import (
    quantised_linear,
    quantised_linear_reference,
    quantised_lora,
    quantised_lora_reference,
)
from lowrank.quantisation import Quantisation

FORMATS = {
    "nf4": Quantisation("nf4", block_size=64),
    "nf4 double": Quantisation("nf4", block_size=64, double=True),
    "fp4 in 128": Quantisation("fp4", block_size=128),
    "int8": Quantisation("int8"),
}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


def linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(65, 33, bias=bias)


def quantised(name, **options):
    return QuantisedLinear.from_linear(linear(), FORMATS[name], **options)


def off(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORMATS)
def test_forward_and_gradients_are_those_of_the_rounded_weight(name, dtype):
    layer = quantised(name)
    W, bias = layer.dequantised().double(), layer.bias.detach().double()
    assert 0 < off(W, linear().weight.double()) < (0.01 if name == "int8" else 0.2)
    x = torch.randn(2, 3, 65).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    assert off(y, x.double() @ W.T + bias) < TOLERANCE[dtype]
    g = torch.randn(y.shape).to(dtype)
    (y * g).sum().backward()
    assert off(x.grad, g.double() @ W) < 2 * TOLERANCE[dtype]
    assert off(layer.bias.grad, g.double().sum((0, 1))) < 2 * TOLERANCE[dtype]
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_backward_keeps_what_is_packed_and_no_more():
    layer = quantised("nf4 double")
    x = torch.randn(7, 65, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = quantised_linear(x, layer.packed, layer.quantisation, 33, None)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in layer.packed}
    torch.testing.assert_close(
        y, quantised_linear_reference(x, layer.packed, layer.quantisation, 33, None)
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(65,), (7, 65), (2, 3, 65)], ids=str)
def test_with_an_adapter_in_it_the_gradients_are_those_of_the_plain_steps(shape, dtype):
    layer = quantised("nf4 double")
    torch.manual_seed(0)
    start = [torch.randn(s).to(dtype) for s in (shape, (33,), (4, 65), (33, 4))]
    g = torch.randn(*shape[:-1], 33).to(dtype)
    results = []
    for function, to in ((quantised_lora, dtype), (quantised_lora_reference, torch.float64)):
        x, bias, A, B = leaves = [t.detach().to(to).requires_grad_() for t in start]
        y = function(x, layer.packed, layer.quantisation, bias, A, B, 1.7)
        assert y.dtype == to
        results.append([y, *torch.autograd.grad(y, leaves, g.to(to))])
    for found, expected in zip(*results, strict=True):
        assert off(found, expected) < 3 * TOLERANCE[dtype]


def test_a_layer_with_hooks_or_dropout_is_called():
    """One product for base and adapter leaves the base layer out; whoever hooks it must not notice."""
    model = lowrank.get_peft_model(
        nn.Sequential(quantised("nf4")),
        LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    ).eval()
    x, seen = torch.randn(7, 65), []
    expected = model(x)
    layer = model.base_model.model[0].base_layer
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), expected)
    hook.remove()
    torch.testing.assert_close(model(input=x), expected)
    assert seen == [1]
    forward = layer.forward
    layer.forward = lambda x: seen.append(2) or forward(x)
    torch.testing.assert_close(model(x), expected)
    assert seen == [1, 2]


def test_the_product_has_the_dtype_asked_for_and_x_gets_its_own_back():
    x = torch.randn(7, 65)
    in_bfloat16 = quantised("nf4", compute_dtype=torch.bfloat16)
    exact = x.bfloat16().double() @ in_bfloat16.dequantised(torch.bfloat16).double().T
    y = in_bfloat16(x) - in_bfloat16.bias
    assert y.dtype == torch.float32
    assert 2.0**-12 < off(y, exact) < 2.0**-7
    with torch.autocast("cpu", torch.bfloat16):
        assert quantised("nf4")(x).dtype == torch.bfloat16


def test_checkpointed_it_gives_the_same_gradient():
    layer = quantised("nf4")
    x = torch.randn(7, 65, requires_grad=True)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.13's own
def test_compiled_it_is_one_graph():
    layer = quantised("nf4 double")
    x = torch.randn(7, 65, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(layer(x).sum(), x)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", FORMATS)
def test_copies_are_the_same_numbers(name, copied):
    layer = quantised(name)
    other = copied(layer)
    assert torch.equal(other.dequantised(), layer.dequantised())
    assert other.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("name", FORMATS)
def test_a_cast_leaves_the_scales_alone(name):
    layer = quantised(name)
    before = layer.dequantised()
    assert layer.half().bias.dtype == torch.float16
    assert torch.equal(layer.dequantised(), before)


@pytest.mark.parametrize("name", FORMATS)
def test_saved_and_loaded(name):
    layer = quantised(name)
    state = layer.state_dict()
    other = QuantisedLinear(65, 33, quantisation=FORMATS[name])
    weight = other.weight
    assert not other.dequantised().any()
    other.load_state_dict(state)
    assert other.weight is weight
    assert torch.equal(other.dequantised(), layer.dequantised())
    on_meta = QuantisedLinear(65, 33, quantisation=FORMATS[name], device="meta")
    on_meta.load_state_dict(state, assign=True)
    assert torch.equal(on_meta.dequantised(), layer.dequantised())
    assert torch.equal(on_meta.bias, layer.bias)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_in_floating_point_is_quantised_as_it_is_loaded(name):
    other = QuantisedLinear(65, 33, quantisation=FORMATS[name])
    other.load_state_dict(linear().state_dict())
    assert torch.equal(other.dequantised(), quantised(name).dequantised())


def test_what_does_not_fit_is_said():
    layer = quantised("nf4 double")
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="nf4 in blocks of 64, doubly quantised, the layer is"):
        quantised("nf4").load_state_dict(state)
    short = {name: tensor for name, tensor in state.items() if "absmax" not in name}
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight.absmax"'):
        layer.load_state_dict(short)
    with pytest.raises(RuntimeError, match=r"weight: the file has \(1056, 1\)"):
        layer.load_state_dict(
            QuantisedLinear.from_linear(nn.Linear(64, 33), FORMATS["nf4 double"]).state_dict()
        )
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"lora_A"'):
        layer.load_state_dict({**state, "lora_A": torch.zeros(1)})
    with pytest.raises(QuantisationError, match="holds nf4, fp4, int8 of backend 'lowrank'"):
        QuantisedLinear(65, 33, quantisation=Quantisation("int4"))
    with pytest.raises(QuantisationError, match=r"of \(33, 64\) for a layer of .* = \(33, 65\)"):
        layer.quantise(torch.zeros(33, 64))


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize("name", FORMATS)
def test_its_files_are_bitsandbytes(name):
    import bitsandbytes as bnb

    quantisation, ours = FORMATS[name], quantised(name).state_dict()
    if name == "int8":
        layer = bnb.nn.Linear8bitLt(65, 33, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            65, 33, quant_type=quantisation.format, compress_statistics=quantisation.double
        )
        layer.weight.blocksize = quantisation.block_size
    layer.load_state_dict(linear().state_dict())
    theirs = layer.to("cpu").state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if "quant_state" not in key:  # JSON, of the same length whatever the order
            assert torch.equal(ours[key], tensor), key
    other = QuantisedLinear(65, 33, quantisation=quantisation)
    other.load_state_dict(theirs)
    assert torch.equal(other.dequantised(), quantised(name).dequantised())
    if name != "int8":
        stats = {k.removeprefix("weight."): t for k, t in ours.items() if "weight." in k}
        weight = bnb.nn.Params4bit.from_prequantized(ours["weight"], stats, device="cpu")
        absmax = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(absmax, other.dequantised())
