"""Properties of one layer over shape, r, alpha, dtype, kind and method."""

import copy
from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank.config import LoraConfig
from lowrank.errors import TargetError
from lowrank.inject import inject
from lowrank.layer import LoraLayer
from lowrank.targets import plan
from lowrank.wrappers import adapter_parameters, lora_layers

# ‖merged − unmerged‖ / ‖unmerged‖: the merged weight is rounded too
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}
METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rslora+dora": {"use_rslora": True, "use_dora": True},
    "lora_bias": {"lora_bias": True},
}

sizes = st.integers(1, 9)


class Built(NamedTuple):
    layer: nn.Module
    x: Tensor


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.tanh(self.weight), self.bias)


@st.composite
def linear(draw, cls=nn.Linear) -> Built:
    in_, out = draw(sizes), draw(sizes)
    layer = cls(in_, out, bias=draw(st.booleans()))
    leading = draw(st.lists(st.integers(1, 4), max_size=3))
    return Built(layer, torch.randn(*leading, in_))


@st.composite
def gpt2_conv1d(draw) -> Built:
    in_, out = draw(sizes), draw(sizes)
    return Built(Conv1D(out, in_), torch.randn(2, 3, in_))


@st.composite
def embedding(draw) -> Built:
    num, width = draw(sizes), draw(sizes)
    padding_idx = draw(st.none() | st.integers(0, num - 1))
    return Built(nn.Embedding(num, width, padding_idx), torch.randint(num, (2, 3)))


@st.composite
def convolution(draw) -> Built:
    n = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    in_, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    per_axis = {
        name: tuple(draw(st.integers(low, high)) for _ in range(n))
        for name, low, high in (
            ("kernel_size", 1, 3),
            ("stride", 1, 2),
            ("padding", 0, 2),
            ("dilation", 1, 2),
        )
    }
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if n == 3 and mode == "reflect":
        mode = "zeros"
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1](
        in_, out, groups=groups, bias=draw(st.booleans()), padding_mode=mode, **per_axis
    )
    batch = [draw(st.integers(1, 3))] if draw(st.booleans()) else []
    return Built(layer, torch.randn(*batch, in_, *[draw(st.integers(5, 7)) for _ in range(n)]))


class Attend(nn.MultiheadAttention):
    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


@st.composite
def attention(draw) -> Built:
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(1, 3))
    layer = Attend(width, heads, bias=draw(st.booleans()), batch_first=draw(st.booleans()))
    return Built(layer, torch.randn(2, 3, width) / 2)


kinds = st.one_of(
    linear(), linear(OwnForward), gpt2_conv1d(), embedding(), convolution(), attention()
)


def adapted(
    built: Built, fields: dict, dtype: torch.dtype, names=("a",), moved=True
) -> tuple[LoraLayer, Tensor]:
    """The layer in `dtype` with adapters, and its input. Examples that plan refuses are passed over."""
    model = nn.ModuleDict({"layer": copy.deepcopy(built.layer).to(dtype)})
    config = LoraConfig(target_modules=["layer"], **fields)
    try:
        targets = plan(model, config)
    except TargetError:
        reject()
    for name in names:
        inject(model, targets, name, init=config.init_lora_weights)
    if moved:
        for key, parameter in adapter_parameters(model):
            with torch.no_grad():
                if "magnitude" in key:
                    parameter *= 0.6 + torch.rand_like(parameter)
                else:
                    parameter.copy_(torch.randn_like(parameter) / 2)
    [(_, layer)] = lora_layers(model)
    layer.set_adapter(names)
    x = built.x.to(dtype) if built.x.is_floating_point() else built.x
    return layer, x


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).clone().view(torch.uint8).numpy().tobytes()


def near(found: Tensor, expected: Tensor, dtype: torch.dtype, scale: Tensor) -> bool:
    """Within the dtype's tolerance of the larger of `expected` and `scale`: a sum can cancel to nothing."""
    size = max(expected.double().norm().item(), scale.double().norm().item())
    return (found.double() - expected.double()).norm().item() <= TOLERANCE[dtype] * size + 1e-30


everything = given(
    built=kinds,
    r=st.integers(1, 11),
    alpha=st.integers(1, 9) | st.floats(0.25, 4),
    method=st.sampled_from(list(METHODS)),
    dtype=st.sampled_from(list(TOLERANCE)),
)


@everything
@settings(max_examples=200)
@torch.no_grad()
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(built, r, alpha, method, dtype):
    layer, x = adapted(built, {"r": r, "lora_alpha": alpha, **METHODS[method]}, dtype)
    base = layer.base_layer
    assume(not (method == "lora_bias" and getattr(base, layer.kind.bias, None) is None))
    stored = {name: bits(p) for name, p in base.named_parameters()}
    y = layer(x)
    layer.merge()
    merged = layer(x)
    change = layer.get_delta_weight("a")
    layer.unmerge()
    assert {name: bits(p) for name, p in base.named_parameters()} == stored
    assert bits(layer(x)) == bits(y)
    # what W and the change give on their own is the size against which a cancelled sum is measured
    assume(change.isfinite().all())
    assert near(merged, y, dtype, base(x) if dtype != torch.bfloat16 else 4 * base(x))


@everything
@torch.no_grad()
def test_without_B_nothing_changes(built, r, alpha, method, dtype):
    layer, x = adapted(built, {"r": r, "lora_alpha": alpha, **METHODS[method]}, dtype, moved=False)
    y, base = layer(x), layer.base_layer(x)
    if "dora" in method:  # c = m / ‖W‖ is 1 but for the rounding of two norms
        bias = getattr(layer.base_layer, layer.kind.bias, None)
        if bias is None or dtype != torch.bfloat16:
            assert near(y, base, min(dtype, torch.float32, key=lambda d: torch.finfo(d).eps), base)
        else:  # b + c(y − b) rounds y − b
            assert (y - base).abs().max() <= 2.0**-7 * (base.abs().max() + bias.abs().max())
    else:
        assert torch.equal(y, base)
    stored = bits(layer.base_layer._parameters[layer.kind.weight])
    if method != "lora_bias" or getattr(layer.base_layer, layer.kind.bias, None) is not None:
        layer.merge()
        if "dora" not in method:
            assert bits(layer.base_layer._parameters[layer.kind.weight] + 0.0) == stored


@given(
    built=kinds,
    ranks=st.tuples(*[st.integers(1, 7)] * 3),
    methods=st.tuples(*[st.sampled_from(["lora", "dora", "rslora"])] * 3),
)
@torch.no_grad()
def test_adapters_add_up_in_any_order(built, ranks, methods):
    model = nn.ModuleDict({"layer": built.layer.double()})
    for name, r, method in zip("abc", ranks, methods, strict=True):
        config = LoraConfig(
            target_modules=["layer"], r=r, init_lora_weights=False, **METHODS[method]
        )
        inject(model, plan(model, config), name, init=False)
    [(_, layer)] = lora_layers(model)
    x = built.x.double() if built.x.is_floating_point() else built.x
    stored = layer.kind.store(layer.base_layer)
    W, total = stored.read(), 0
    for name in "abc":
        layer.set_adapter(name)
        layer.merge()
        total = total + stored.read() - W
        layer.unmerge()
    layer.set_adapter(["a", "b", "c"])
    layer.merge()
    torch.testing.assert_close(stored.read(), W + total, rtol=1e-9, atol=1e-9)
    expected = layer(x)
    layer.unmerge()
    for order in permutations("abc"):
        layer.set_adapter(order)
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@given(
    built=linear() | gpt2_conv1d() | embedding(),
    r=st.integers(1, 11),
    alpha=st.floats(0.25, 9),
    use_rslora=st.booleans(),
    use_dora=st.booleans(),
)
@torch.no_grad()
def test_the_output_is_that_of_the_formulas(built, r, alpha, use_rslora, use_dora):
    fields = {"r": r, "lora_alpha": alpha, "use_rslora": use_rslora, "use_dora": use_dora}
    layer, x = adapted(built, fields, torch.float64)
    base = layer.base_layer
    W = base.weight if type(base) is nn.Linear else base.weight.T
    if isinstance(base, nn.Embedding):
        A, B = layer.lora_embedding_A["a"], layer.lora_embedding_B["a"]
    else:
        A, B = layer.lora_A["a"].weight, layer.lora_B["a"].weight
    V = W + alpha / (r**0.5 if use_rslora else r) * B @ A
    if use_dora:
        V = layer.lora_magnitude_vector["a"].weight[:, None] * V / V.norm(dim=1, keepdim=True)
    y = V.T[x] if isinstance(base, nn.Embedding) else x @ V.T
    bias = getattr(base, "bias", None)
    expected = y if bias is None else y + bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-8, atol=1e-8)


@given(built=kinds, p=st.sampled_from([0.1, 0.5]), method=st.sampled_from(["lora", "dora"]))
@settings(max_examples=30)
@torch.no_grad()
def test_eval_mode_has_no_dropout(built, p, method):
    layer, x = adapted(built, {"r": 3, **METHODS[method]}, torch.float32)
    if layer.kind.op is None:
        return
    torch.manual_seed(1)
    dropping, _ = adapted(
        built, {"r": 3, "lora_dropout": p, **METHODS[method]}, torch.float32, moved=False
    )
    dropping.load_state_dict(layer.state_dict())
    assert torch.equal(dropping.eval()(x), layer.eval()(x))
