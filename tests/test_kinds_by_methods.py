"""Every kind of layer × every method × dtype, each against W + scaling·B·A written out in float64.

Checked for each: forward, the gradients of A, B, the magnitude, the bias and x, the merged weight and
bias, the merged forward, and that unmerging brings every bit back. What is not supported is refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lowrank.config import LoraConfig
from lowrank.errors import MergeError, TargetError
from lowrank.inject import inject
from lowrank.layer import LoraLayer
from lowrank.targets import plan
from lowrank.wrappers import adapter_parameters, lora_layers

DTYPES = [torch.float32, torch.bfloat16]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rslora+dora": {"use_rslora": True, "use_dora": True},
    "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora+rslora+dora": {"init_lora_weights": "olora", "use_rslora": True, "use_dora": True},
}
R, ALPHA = 3, 5

# ‖found − exact‖ / ‖exact‖. A pass through the layer rounds a handful of times: x·A, ·B, the sum.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5 * 2.0**-8}


# --- the layers -----------------------------------------------------------------------------------


@dataclass
class Case:
    """A layer, its input, and what it computes from a weight in matrix form, written out again."""

    layer: nn.Module
    x: Tensor
    # W (out, in), bias, x -> output; in float64
    truth: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    # the stored weight -> (out, in)
    matrix: Callable[[Tensor], Tensor] = lambda W: W
    call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)
    path: str = "layer"
    weight: str = "weight"
    bias: str = "bias"
    options: dict[str, Any] = field(default_factory=dict)
    # methods that plan() refuses, and a word of the reason
    refused: dict[str, str] = field(default_factory=dict)


def linear(bias: bool = True) -> Case:
    return Case(
        nn.Linear(7, 5, bias=bias),
        torch.randn(2, 4, 7),
        lambda W, b, x: x @ W.T if b is None else x @ W.T + b,
    )


def linear_on_a_vector() -> Case:
    return Case(nn.Linear(7, 5), torch.randn(7), lambda W, b, x: W @ x + b)


def falcon_linear() -> Case:
    return Case(FalconLinear(7, 5), torch.randn(2, 4, 7), lambda W, b, x: x @ W.T + b)


def gpt2_conv1d() -> Case:
    layer = Conv1D(5, 7)
    nn.init.normal_(layer.bias)
    return Case(layer, torch.randn(2, 4, 7), lambda W, b, x: x @ W.T + b, matrix=lambda p: p.T)


TOKENS = torch.tensor([[3, 0, 9, 3], [8, 2, 2, 10]])


def embedding(layer: nn.Embedding, scale: float = 1.0) -> Case:
    return Case(
        layer,
        TOKENS,
        lambda W, b, x: W.T[x] * scale,
        matrix=lambda p: p.T,
        refused={"lora_bias": "an embedding has no bias"},
    )


def gemma3_embedding() -> Case:
    return embedding(Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5), 2.5)


def bart_embedding() -> Case:
    return embedding(BartScaledWordEmbedding(11, 6, 0, embed_scale=math.sqrt(6)), math.sqrt(6))


def convolution(layer: nn.Module, *shape: int) -> Case:
    """The layer's padding is done first, by hand, and the kernel then meets the padded input."""
    n = layer.weight.ndim - 2
    run = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in layer.padding]
    sides = [side for pair in reversed(pads) for side in pair]
    mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)

    def truth(W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
        kernel = W.view(layer.weight.shape)
        padded = F.pad(x, sides, mode=mode)
        return run(padded, kernel, b, layer.stride, 0, layer.dilation, layer.groups)

    return Case(layer, torch.randn(shape), truth, matrix=lambda p: p.flatten(1))


class OwnLinear(nn.Linear):
    """Not linear in W: only running the module itself with the merged weight gives the right answer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sin(x), torch.tanh(self.weight), self.bias) * 2


def own_linear() -> Case:
    return Case(
        OwnLinear(7, 5),
        torch.randn(2, 4, 7),
        lambda W, b, x: 2 * (torch.sin(x) @ torch.tanh(W).T + b),
    )


class StandardisedConv(nn.Conv2d):
    """Weight standardisation, as ResNet-V2 and BiT use it."""

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight
        W = (W - W.mean((1, 2, 3), keepdim=True)) / (W.std((1, 2, 3), keepdim=True) + 0.1)
        return F.conv2d(x, W, self.bias, self.stride, self.padding)


def own_convolution() -> Case:
    def truth(W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
        W = (W - W.mean(1, keepdim=True)) / (W.std(1, keepdim=True) + 0.1)
        return F.conv2d(x, W.view(6, 4, 3, 2), b, stride=(2, 1), padding=1)

    layer = StandardisedConv(4, 6, (3, 2), stride=(2, 1), padding=1)
    return Case(layer, torch.randn(2, 4, 7, 6), truth, matrix=lambda p: p.flatten(1))


class NormalisedEmbedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(super().forward(tokens), dim=-1)


def own_embedding() -> Case:
    case = embedding(NormalisedEmbedding(11, 6))

    def truth(W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
        rows = W.T[x]
        return rows / rows.norm(dim=-1, keepdim=True)

    case.truth = truth
    return case


class InOutWeight(nn.Module):
    """A module of someone's own, with the weight as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def in_out_weight() -> Case:
    return Case(
        InOutWeight(),
        torch.randn(2, 4, 7),
        lambda W, b, x: x @ W.T + b,
        matrix=lambda p: p.T,
        options={"fan_in_fan_out": True},
    )


def transposed_convolution() -> Case:
    layer = nn.ConvTranspose1d(4, 6, 3, stride=2)
    return Case(
        layer,
        torch.randn(2, 4, 5),
        lambda W, b, x: F.conv_transpose1d(x, W.view(4, 6, 3), b, stride=2),
        matrix=lambda p: p.flatten(1),
        refused={"lora_bias": "bias"},
    )


def bilinear() -> Case:
    second = torch.randn(3, 4)
    return Case(
        nn.Bilinear(7, 4, 5),
        torch.randn(3, 7),
        lambda W, b, x: torch.einsum("ni,nj,oij->no", x, second.double(), W.view(5, 7, 4)) + b,
        matrix=lambda p: p.flatten(1),
        call=lambda layer, x: layer(x, second.to(x.dtype)),
    )


def embedding_bag() -> Case:
    return Case(
        nn.EmbeddingBag(11, 6, mode="sum"),
        TOKENS,
        lambda W, b, x: W[x].sum(1),
        refused={"lora_bias": "no bias"},
    )


def attend(in_proj: Tensor, in_bias, out_proj: Tensor, out_bias, x: Tensor, heads, mask=None):
    """Multi-head self-attention (Vaswani et al. 2017, §3.2) on x (batch, sequence, width)."""
    batch, length, width = x.shape
    q, k, v = (x @ in_proj.T + in_bias).split(width, dim=-1)
    q, k, v = (t.view(batch, length, heads, -1).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(width // heads)
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    return mixed @ out_proj.T + out_bias


PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])  # (batch, sequence)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


def attention(part: str, batch_first: bool = True, causal: bool = False, padded=False) -> Case:
    layer = nn.MultiheadAttention(6, 2, batch_first=batch_first)
    nn.init.normal_(layer.in_proj_bias, std=0.5)
    nn.init.normal_(layer.out_proj.bias)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    if causal:
        mask = mask | CAUSAL
    if padded:
        mask = mask | PADDED[:, None, None]

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        masks = {
            "attn_mask": CAUSAL if causal else None,
            "key_padding_mask": PADDED if padded else None,
        }
        return layer(x, x, x, need_weights=False, **masks)[0]

    def truth(W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
        other = layer.get_submodule("out_proj" if part == "in_proj" else "")
        base = other.base_layer if isinstance(other, LoraLayer) else other
        x = x if batch_first else x.transpose(0, 1)
        if part == "in_proj":
            y = attend(W, b, base.weight.double(), base.bias.double(), x, 2, mask)
        else:
            y = attend(base.in_proj_weight.double(), base.in_proj_bias.double(), W, b, x, 2, mask)
        return y if batch_first else y.transpose(0, 1)

    x = torch.randn(2, 5, 6) / 2  # a sharper softmax would magnify the rounding
    case = Case(layer, x if batch_first else x.transpose(0, 1).contiguous(), truth)
    case.call = call
    if part == "in_proj":
        case.weight, case.bias = "in_proj_weight", "in_proj_bias"
    else:
        case.path = "layer.out_proj"
    return case


CASES: dict[str, Callable[[], Case]] = {
    "linear": linear,
    "linear without bias": lambda: linear(bias=False),
    "linear on one vector": linear_on_a_vector,
    "FalconLinear": falcon_linear,
    "GPT-2's Conv1D": gpt2_conv1d,
    "embedding": lambda: embedding(nn.Embedding(11, 6)),
    "embedding with padding_idx": lambda: embedding(nn.Embedding(11, 6, padding_idx=2)),
    "Gemma 3's scaled embedding": gemma3_embedding,
    "BART's scaled embedding": bart_embedding,
    "conv1d": lambda: convolution(nn.Conv1d(4, 6, 3), 2, 4, 9),
    "conv1d without batch": lambda: convolution(nn.Conv1d(4, 6, 3, padding=1), 4, 9),
    "conv1d circular, dilated": lambda: convolution(
        nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"), 2, 4, 9
    ),
    "conv2d": lambda: convolution(
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)), 3, 4, 9, 7
    ),
    "conv2d without batch": lambda: convolution(nn.Conv2d(4, 6, (3, 2)), 4, 9, 7),
    "conv2d reflect, dilated": lambda: convolution(
        nn.Conv2d(4, 6, 3, padding=2, dilation=(2, 1), padding_mode="reflect"), 3, 4, 9, 7
    ),
    "conv2d replicate, same": lambda: convolution(
        nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="replicate"), 3, 4, 9, 7
    ),
    "conv2d without bias": lambda: convolution(nn.Conv2d(4, 6, 3, bias=False), 3, 4, 9, 7),
    "conv2d 1×1": lambda: convolution(nn.Conv2d(4, 6, 1), 3, 4, 5, 7),
    "conv2d in two groups": lambda: convolution(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), 3, 4, 9, 7
    ),
    "conv2d depthwise": lambda: convolution(nn.Conv2d(6, 6, 3, groups=6), 3, 6, 9, 7),
    "conv3d": lambda: convolution(
        nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=1), 2, 4, 5, 6, 3
    ),
    "conv3d circular, in groups": lambda: convolution(
        nn.Conv3d(4, 6, 2, padding=1, groups=2, padding_mode="circular"), 2, 4, 5, 6, 3
    ),
    "attention in_proj": lambda: attention("in_proj"),
    "attention in_proj, sequence first": lambda: attention("in_proj", batch_first=False),
    "attention in_proj, masked": lambda: attention("in_proj", causal=True, padded=True),
    "attention out_proj": lambda: attention("out_proj"),
    "attention out_proj, sequence first": lambda: attention("out_proj", batch_first=False),
    "attention out_proj, masked": lambda: attention("out_proj", causal=True, padded=True),
    "linear with its own forward": own_linear,
    "convolution with its own forward": own_convolution,
    "embedding with its own forward": own_embedding,
    "module with an (in, out) weight": in_out_weight,
    "transposed convolution": transposed_convolution,
    "bilinear": bilinear,
    "embedding bag": embedding_bag,
}


# --- putting an adapter on and working out what it must do ----------------------------------------


class Holder(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


def adapted(case: Case, method: str, dtype: torch.dtype, names=("default",), **options) -> Holder:
    """The case's layer in `dtype`, with adapters that are not where they started."""
    holder = Holder(case.layer.to(dtype))
    values = {"r": R, "lora_alpha": ALPHA, **METHODS[method], **case.options, **options}
    config = LoraConfig(target_modules=[case.path], **values)
    for name in names:
        inject(holder, plan(holder, config), name, init=config.init_lora_weights)
    for key, parameter in adapter_parameters(holder):
        with torch.no_grad():
            if config.init_lora_weights is not True and "magnitude" not in key:
                parameter += torch.randn_like(parameter) * 0.3
            elif "magnitude" in key:
                parameter *= torch.rand_like(parameter) + 0.6
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "bias" in key else 0.5))
    for _, layer in lora_layers(holder):
        layer.set_adapter(names)
    return holder


def the_layer(holder: Holder) -> LoraLayer:
    [(_, layer)] = lora_layers(holder)
    return layer


@dataclass
class Exact:
    """The adapter's parameters in float64, as leaves, and the weight and bias that they make."""

    A: Tensor
    B: Tensor
    m: Tensor | None
    b: Tensor | None
    W: Tensor  # (out, in), merged
    bias: Tensor | None


def exact(case: Case, layer: LoraLayer, method: str, name: str = "default") -> Exact:
    stored = dict(adapter_parameters_of(layer, name))
    leaf = {key: value.detach().double().requires_grad_() for key, value in stored.items()}
    A = next(value for key, value in leaf.items() if key.endswith("_A"))
    B = next(value for key, value in leaf.items() if key.endswith("_B"))
    m, b = leaf.get("magnitude"), leaf.get("bias")
    scaling = ALPHA / math.sqrt(R) if "rslora" in method else ALPHA / R
    base = layer.base_layer
    W = case.matrix(base._parameters[case.weight].detach().double())
    V = W - taken_out(W, method, scaling) + scaling * B.reshape(-1, R) @ A.reshape(R, -1)
    if m is not None:
        V = m.view(-1, 1) * V / V.detach().square().sum(1, keepdim=True).sqrt()
    bias = base._parameters.get(case.bias)
    bias = None if bias is None else bias.detach().double()
    if b is not None:
        bias = scaling * b if bias is None else bias + scaling * b
    return Exact(A, B, m, b, V, bias)


def taken_out(W: Tensor, method: str, scaling: float) -> Tensor | float:
    """What the initialisation takes out of W: PiSSA the best approximation of rank r, OLoRA s·Q_r·R_r."""
    if "pissa" in method:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :R] @ torch.diag(S[:R]) @ Vh[:R]
    if "olora" in method:
        Q, upper = torch.linalg.qr(W)
        return scaling * Q[:, :R] @ upper[:R]
    return 0.0


def adapter_parameters_of(layer: LoraLayer, name: str) -> list[tuple[str, nn.Parameter]]:
    """(A, B, magnitude, bias) by short names, read from the modules that hold them."""
    found = []
    for part in ("lora_A", "lora_B"):
        if name in getattr(layer, part):
            found.append((part, getattr(layer, part)[name].weight))
    for part in ("lora_embedding_A", "lora_embedding_B"):
        if name in getattr(layer, part):
            found.append((part, getattr(layer, part)[name]))
    if name in layer.lora_magnitude_vector:
        found.append(("magnitude", layer.lora_magnitude_vector[name].weight))
    if name in layer.lora_B and layer.lora_B[name].bias is not None:
        found.append(("bias", layer.lora_B[name].bias))
    return found


def off(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert found.shape == expected.shape
    return ((found.double() - expected).norm() / expected.norm()).item()


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def parametrize(test):
    test = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])(test)
    test = pytest.mark.parametrize("method", METHODS)(test)
    return pytest.mark.parametrize("kind", CASES)(test)


# --- the tests ------------------------------------------------------------------------------------


@parametrize
def test_forward_and_gradients(kind, method, dtype):
    case = CASES[kind]()
    if method in case.refused:
        with pytest.raises(TargetError, match=case.refused[method]):
            adapted(case, method, dtype)
        return
    holder = adapted(case, method, dtype)
    layer, tolerance = the_layer(holder), TOLERANCE[dtype]
    x = case.x.to(dtype).requires_grad_() if case.x.is_floating_point() else case.x
    y = case.call(holder.layer, x)
    assert y.dtype == dtype

    want = exact(case, layer, method)
    x64 = x.detach().double().requires_grad_() if x.is_floating_point() else x
    y64 = case.truth(want.W, want.bias, x64)
    assert off(y, y64.detach()) < tolerance

    g = torch.randn(y.shape).to(dtype)
    (y * g).sum().backward()
    (y64 * g.double()).sum().backward()
    leaves = {"lora_A": want.A, "lora_B": want.B, "magnitude": want.m, "bias": want.b}
    for key, parameter in adapter_parameters_of(layer, "default"):
        expected = leaves[key.replace("embedding_", "")].grad
        if getattr(case.layer, "padding_idx", None) is not None and key == "lora_embedding_A":
            expected = expected.clone()
            expected[:, case.layer.padding_idx] = 0  # as for the base: padding is not trained
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert off(parameter.grad, expected) < tolerance, key
    if x.is_floating_point():
        assert x.grad.dtype == dtype
        assert off(x.grad, x64.grad) < tolerance
    assert all(p.grad is None for p in layer.base_layer.parameters() if not p.requires_grad)


@parametrize
def test_merge(kind, method, dtype):
    case = CASES[kind]()
    if method in case.refused:
        return
    holder = adapted(case, method, dtype)
    layer = the_layer(holder)
    base = layer.base_layer
    want = exact(case, layer, method)
    x = case.x.to(dtype) if case.x.is_floating_point() else case.x
    with torch.no_grad():
        before = case.call(holder.layer, x)
    originals = {name: (p, bits(p)) for name, p in base.named_parameters()}

    if method == "lora_bias" and base._parameters.get(case.bias) is None:
        with pytest.raises(MergeError, match="bias"):
            layer.merge()
        assert not layer.merged
    else:
        layer.merge()
        assert layer.merged
        merged = case.matrix(base._parameters[case.weight])
        assert merged.dtype == dtype
        assert not merged.requires_grad
        assert_rounded_once(merged, want.W.detach(), dtype)
        if want.bias is not None:
            assert_rounded_once(base._parameters[case.bias], want.bias.detach(), dtype)
        x64 = x.double() if x.is_floating_point() else x
        with torch.no_grad():
            assert (
                off(case.call(holder.layer, x), case.truth(want.W, want.bias, x64))
                < TOLERANCE[dtype]
            )
        layer.unmerge()

    for name, p in base.named_parameters():
        assert p is originals[name][0]
        assert bits(p) == originals[name][1]
    with torch.no_grad():
        assert bits(case.call(holder.layer, x)) == bits(before)


def assert_rounded_once(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    half_ulp = torch.finfo(dtype).eps / 2 * expected.abs()
    float32_sum = 1e-6 * expected.abs().max()
    assert ((found.double() - expected).abs() <= half_ulp + float32_sum).all()


@pytest.mark.parametrize(
    "scale", [math.sqrt(768), torch.tensor(math.sqrt(768))], ids=["float", "tensor"]
)
def test_the_scale_of_a_bfloat16_embedding_is_the_layers_own(scale):
    """BART's is a float, which bfloat16 must not round (27.7 to 27.75); Gemma's a tensor that the layer rounds."""
    cls = BartScaledWordEmbedding if isinstance(scale, float) else Gemma3TextScaledWordEmbedding
    layer = cls(50, 40, 0, embed_scale=float(scale)).bfloat16()
    case = embedding(layer, float(scale))
    holder = adapted(case, "lora", torch.bfloat16)
    nn.init.zeros_(layer.weight)
    for _, parameter in adapter_parameters(holder):
        parameter.data = parameter.data.bfloat16().float()
    tokens = torch.arange(50)
    want = exact(case, the_layer(holder), "lora").W.T[tokens].detach()
    y = holder.layer(tokens).double()
    ratio = ((y * want).sum() / want.square().sum()).item()
    expected = float(scale) if isinstance(scale, float) else float(scale.bfloat16())
    assert ratio == pytest.approx(expected, rel=4e-4)
