"""Every kind of layer, each with an input and with what it computes from its weight, written out again."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lowrank.layer import LoraLayer


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
    # how the layer meets W: "linear", "table", "convolution", "weight" (any way), "parameter", "experts"
    how: str = "linear"
    # which dimension of the output is `out`, counted from the end
    channel: int = -1
    # whether the input's first dimension is that of a batch
    batched: bool = True
    # whether the layer can tell the rows of a batch apart; None: each row has a mask, test_mixed_batch.py has that
    by_rows: bool | None = True
    # how much more the layer itself rounds than one product does: a softmax, on the way there and back
    rounding: float = 1.0
    # methods that plan() refuses beside those of REFUSED in the test, and a word of the reason
    refused: dict[str, str] = field(default_factory=dict)
    # a layer in few bits -> what its weight stands for, (out, in), worked out again
    dequantised: Callable[[Any], Tensor] | None = None
    # how far off a weight is that is merged into few bits, ‖found − exact‖ / ‖exact‖; None: cannot be written
    merged_off: float | None = 0.0

    def W(self, module: nn.Module) -> Tensor:
        """The weight that the module holds, in matrix form and float64."""
        if self.dequantised is not None:
            return self.dequantised(module).detach().double()
        return self.matrix(module._parameters[self.weight].detach().double())

    @property
    def place(self) -> str:
        """The path, within `layer`, of the module that holds the weight."""
        path = self.path.removesuffix(f".{self.weight}")
        return path.removeprefix("layer").removeprefix(".")


def linear(bias: bool = True) -> Case:
    return Case(
        nn.Linear(7, 5, bias=bias),
        torch.randn(2, 4, 7),
        lambda W, b, x: x @ W.T if b is None else x @ W.T + b,
    )


def linear_on_a_vector() -> Case:
    return Case(nn.Linear(7, 5), torch.randn(7), lambda W, b, x: W @ x + b, batched=False)


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
        how="table",
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

    return Case(
        layer,
        torch.randn(shape),
        truth,
        matrix=lambda p: p.flatten(1),
        how="convolution",
        channel=-1 - n,
        batched=len(shape) == n + 2,
    )


class OwnLinear(nn.Linear):
    """Not linear in W: only running the module itself with the merged weight gives the right answer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sin(x), torch.tanh(self.weight), self.bias) * 2


def own_linear() -> Case:
    return Case(
        OwnLinear(7, 5),
        torch.randn(2, 4, 7),
        lambda W, b, x: 2 * (torch.sin(x) @ torch.tanh(W).T + b),
        how="weight",
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
    x = torch.randn(2, 4, 7, 6)
    return Case(layer, x, truth, matrix=lambda p: p.flatten(1), how="weight", channel=-3)


class NormalisedEmbedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(super().forward(tokens), dim=-1)


def own_embedding() -> Case:
    case = embedding(NormalisedEmbedding(11, 6))

    def truth(W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
        rows = W.T[x]
        return rows / rows.norm(dim=-1, keepdim=True)

    case.truth, case.how = truth, "weight"
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
        how="weight",
    )


def transposed_convolution() -> Case:
    layer = nn.ConvTranspose1d(4, 6, 3, stride=2)
    return Case(
        layer,
        torch.randn(2, 4, 5),
        lambda W, b, x: F.conv_transpose1d(x, W.view(4, 6, 3), b, stride=2),
        matrix=lambda p: p.flatten(1),
        how="weight",
        refused={"lora_bias": "this layer's bias is of another shape"},
    )


def bilinear() -> Case:
    second = torch.randn(3, 4)
    return Case(
        nn.Bilinear(7, 4, 5),
        torch.randn(3, 7),
        lambda W, b, x: torch.einsum("ni,nj,oij->no", x, second.double(), W.view(5, 7, 4)) + b,
        matrix=lambda p: p.flatten(1),
        call=lambda layer, x: layer(x, second.to(x.dtype)),
        how="weight",
        by_rows=False,
    )


def embedding_bag() -> Case:
    return Case(
        nn.EmbeddingBag(11, 6, mode="sum"),
        TOKENS,
        lambda W, b, x: W[x].sum(1),
        how="weight",
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
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
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
    case = Case(layer, x if batch_first else x.transpose(0, 1).contiguous(), truth, how="weight")
    case.call, case.batched, case.rounding = call, batch_first, 2.0
    case.by_rows = None if padded else part == "in_proj"
    if part == "in_proj":
        case.weight, case.bias = "in_proj_weight", "in_proj_bias"
    else:
        case.path = "layer.out_proj"
    return case


class Experts(nn.Module):
    """A fused mixture of experts: (expert, out, in), or (expert, in, out) and says so, as in transformers."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        self.up_proj = nn.Parameter(torch.randn(3, 7, 5) if transposed else torch.randn(3, 5, 7))

    def forward(self, x: Tensor) -> Tensor:
        W = self.up_proj if self.is_transposed else self.up_proj.mT
        return torch.einsum("bni,nio->bno", x, W)


def experts(transposed: bool = False) -> Case:
    return Case(
        Experts(transposed),
        torch.randn(2, 3, 7),
        lambda W, b, x: torch.einsum("bni,noi->bno", x, W),
        matrix=lambda p: p.mT if transposed else p,
        path="layer.up_proj",
        weight="up_proj",
        how="experts",
        by_rows=False,
        refused={"lora_bias": "no bias"},
    )


class Gate(nn.Module):
    """A router: a matrix that is no layer, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.gate.T


def parameter() -> Case:
    return Case(
        Gate(),
        torch.randn(2, 4, 7),
        lambda W, b, x: x @ W.T,
        path="layer.gate",
        weight="gate",
        how="parameter",
        refused={"lora_bias": "no bias"},
    )


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
    "parameter": parameter,
    "experts": experts,
    "transposed experts": lambda: experts(transposed=True),
}
