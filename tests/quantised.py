"""Every kind of quantised linear layer, with what its bytes stand for worked out again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import Case
from starts import NF4
from torch import Tensor, nn

from lowrank import Quantisation
from lowrank.bases.quantised_linear import QuantisedLinear

FP4 = [0, 0.0625, 8, 12, 4, 6, 2, 3]
OUT, IN = 6, 30


def linear(dtype: torch.dtype, in_: int = IN, out: int = OUT) -> nn.Linear:
    return nn.Linear(in_, out).to(dtype)


def case(layer: nn.Module, dequantised: Callable[[Any], Tensor], merged_off: float | None) -> Case:
    width = layer.in_features
    return Case(
        layer,
        torch.randn(2, 4, width),
        lambda W, b, x: x @ W.T + b,
        dequantised=dequantised,
        merged_off=merged_off,
    )


# --- lowrank's own, and bitsandbytes' -------------------------------------------------------------


def own(dtype: torch.dtype, **values: Any) -> Case:
    layer = QuantisedLinear.from_linear(linear(dtype), Quantisation(**values))
    return case(layer, of_own, 0.02 if values["format"] == "int8" else 0.25)


def of_own(layer: QuantisedLinear) -> Tensor:
    packed, format = layer.packed, layer.quantisation.format
    if format == "int8":
        return packed.codes.double() * packed.absmax.double()[:, None] / 127
    scales = packed.absmax.double()
    if layer.quantisation.double:
        bnb = pytest.importorskip("bitsandbytes")  # its map of 256 values
        values = bnb.functional.create_dynamic_map().to(scales.device)[packed.absmax.long()]
        scales = values.double() * packed.nested_absmax.double()[0] + packed.offset.double()
    return of_blocks(packed.codes, scales, format, layer.quantisation.block_size, (OUT, IN))


def of_blocks(codes: Tensor, scales: Tensor, format: str, size: int, shape: tuple) -> Tensor:
    half = torch.tensor(FP4, dtype=torch.float64) / 12
    values = torch.cat([half, -half]) if format == "fp4" else torch.tensor(NF4).double()
    entries = []
    for i in range(shape[0] * shape[1]):
        byte = int(codes.flatten()[i // 2])
        entries.append(values[byte % 16 if i % 2 else byte // 16] * scales[i // size].cpu())
    return torch.stack(entries).view(shape).to(codes.device)


def linear_4bit(dtype: torch.dtype, quant_type: str, double: bool) -> Case:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type=quant_type, compress_statistics=double)
    layer.load_state_dict(linear(torch.float32).state_dict())
    return case(layer.to(dtype).to("cpu"), of_4bit, 0.25)


def of_4bit(layer: Any) -> Tensor:
    import bitsandbytes.functional as functional

    state = layer.weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return of_blocks(
        layer.weight.data, scales.double(), state.quant_type, state.blocksize, (OUT, IN)
    )


def linear_8bit(dtype: torch.dtype) -> Case:
    """In training mode, where it dequantises; in eval mode it rounds its input too."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.load_state_dict(linear(torch.float32).state_dict())
    return case(layer.to(dtype).to("cpu"), of_8bit, 0.02)


def of_8bit(layer: Any) -> Tensor:
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.double() * scales.double()[:, None] / 127


# --- torchao --------------------------------------------------------------------------------------


def torchao(dtype: torch.dtype, bits: int) -> Case:
    quantization = pytest.importorskip("torchao.quantization")
    layer = linear(dtype, 32)
    if bits == 8:
        settings = quantization.Int8WeightOnlyConfig()
    else:
        group = quantization.PerGroup(16)
        settings = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)
    quantization.quantize_(layer, settings)
    return case(layer, lambda layer: layer.weight.dequantize(), 0.02 if bits == 8 else 0.25)


def torchao_nf4(dtype: torch.dtype) -> Case:
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = linear(dtype, 128, 128)  # its least size: 256 scales share one
    layer.weight = nn.Parameter(nf4.to_nf4(layer.weight.data), requires_grad=False)
    return case(layer, lambda layer: layer.weight.get_original_weight(), 0.25)


# --- layers as those of GPTQ, AWQ and HQQ, which are read and not written -------------------------


class PackedLinear(nn.Module):
    """4 bits, a scale and a zero for every 16 inputs, eight codes in an integer: GPTQ along in, AWQ along out."""

    bits, group_size = 4, 16

    def __init__(self, dtype: torch.dtype, along: int):
        super().__init__()
        self.in_features, self.out_features, self.along = 32, 8, along
        codes = torch.randint(16, (32, 8))
        self.register_buffer("qweight", self._packed(codes))
        self.register_buffer("qzeros", torch.full((2, 8), 8))
        self.register_buffer("scales", (torch.rand(2, 8) / 20 + 0.01).to(dtype))
        self.register_buffer("bias", torch.randn(8).to(dtype))

    def _packed(self, codes: Tensor) -> Tensor:
        parts = codes.unflatten(self.along, (-1, 8)).movedim(self.along + 1, -1)
        return sum(parts[..., i].int() << 4 * i for i in range(8))

    def W(self) -> Tensor:
        """(in, out)"""
        codes = torch.stack([self.qweight >> 4 * i & 15 for i in range(8)], self.along + 1)
        codes = codes.flatten(self.along, self.along + 1)
        zeros, scales = (t.repeat_interleave(16, 0) for t in (self.qzeros, self.scales))
        return (codes - zeros) * scales

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.W().to(x.dtype)
        return y if self.bias is None else y + self.bias


class TorchQuantLinear(PackedLinear):
    def __init__(self, dtype: torch.dtype):
        super().__init__(dtype, along=0)
        self.register_buffer("g_idx", torch.arange(32) // 16)


class AwqLinear(PackedLinear):
    def __init__(self, dtype: torch.dtype):
        super().__init__(dtype, along=1)


class HQQLinear(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = 32, 8
        self.meta = {"nbits": 4, "group_size": 16}
        self.W_q = nn.Parameter(torch.randint(16, (16, 16), dtype=torch.uint8), False)
        self.register_buffer("scale", (torch.rand(16, 1) / 20 + 0.01).to(dtype))
        self.bias = nn.Parameter(torch.randn(8).to(dtype), False)

    def dequantize(self) -> Tensor:
        return ((self.W_q - 8.0) * self.scale).view(8, 32).to(self.scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().T.to(x.dtype) + self.bias


def read_only(layer: nn.Module) -> Case:
    of = (lambda m: m.dequantize()) if isinstance(layer, HQQLinear) else (lambda m: m.W().T)
    return case(layer, of, None)


QUANTISED: dict[str, Callable[[torch.dtype], Case]] = {
    "nf4": lambda dtype: own(dtype, format="nf4", block_size=64),
    "nf4 double": lambda dtype: own(dtype, format="nf4", block_size=64, double=True),
    "fp4": lambda dtype: own(dtype, format="fp4", block_size=32),
    "int8": lambda dtype: own(dtype, format="int8"),
    "Linear4bit nf4": lambda dtype: linear_4bit(dtype, "nf4", False),
    "Linear4bit nf4 double": lambda dtype: linear_4bit(dtype, "nf4", True),
    "Linear4bit fp4": lambda dtype: linear_4bit(dtype, "fp4", False),
    "Linear8bitLt": linear_8bit,
    "torchao int8": lambda dtype: torchao(dtype, 8),
    "torchao int4": lambda dtype: torchao(dtype, 4),
    "torchao nf4": torchao_nf4,
    "GPTQ": lambda dtype: read_only(TorchQuantLinear(dtype)),
    "AWQ": lambda dtype: read_only(AwqLinear(dtype)),
    "HQQ": lambda dtype: read_only(HQQLinear(dtype)),
}
