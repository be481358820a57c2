"""Rounding a weight to few bits and back: floats of 4 bits in blocks, and integers by row.

The bytes are bitsandbytes', every one of them, so that what either library stored the other reads. On CUDA its
kernels do the reading where it is installed; the numbers are the same.
"""

import sys
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import QuantisationError
from lowrank.quantisation import IN_BLOCKS, Quantisation

NESTED_BLOCK_SIZE = 256  # scales that share a scale: QLoRA §3
_CELLS = 512  # of 1/512 in a unit: fp4's bounds are 1/384 apart around zero
_TAIL = 0.9677083  # the quantile at which a normal float's largest value stands: QLoRA's code
_PART = 2**20  # entries that are quantised at a time
_CHUNK = 2**15  # bytes that are dequantised at a time: what lies between stays in a core's cache


class Packed(NamedTuple):
    """What is stored of a weight of n entries, in row-major order."""

    # 4 bits: uint8 (⌈n/2⌉, 1), the first of two entries in the high half of a byte; 8: int8 (out, in)
    codes: Tensor
    # the largest magnitude of each block, or row: float32 (blocks,), (out,); double: uint8 (blocks,)
    absmax: Tensor
    nested_absmax: Tensor | None = None  # double: float32 (⌈blocks/256⌉,)
    offset: Tensor | None = None  # double: float32 (), the mean of the blocks' magnitudes


# --- code books -----------------------------------------------------------------------------------


def normal_float(bits: int) -> Tensor:
    """The 2^bits values of the normal float, ascending from −1 to 1 with an exact 0; float32.

    Quantiles of the normal distribution, one more above zero than below: Dettmers et al. 2023, eq. 4 and
    Appendix E, whose table is `normal_float(4)`.
    """
    half = 2 ** (bits - 1)
    above = torch.special.ndtri(_linspace(_TAIL, 0.5, half + 1)[:-1].double()).float()
    below = -torch.special.ndtri(_linspace(_TAIL, 0.5, half)[:-1].double()).float()
    return torch.cat([above, torch.zeros(1, device="cpu"), below]).sort().values / above.max()


def float4() -> Tensor:
    """The 16 values of "fp4": a sign, two bits of an exponent and one of a fraction, 0.0625 at the lowest."""
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], device="cpu")
    return torch.cat([magnitudes, -magnitudes]) / 12


def dynamic_map() -> Tensor:
    """The 256 values, ascending from almost −1 to 1, that doubly quantised scales take; float32.

    A sign, a power of ten down to 10⁻⁶ in as many zero bits, and the bits that are left as a fraction
    between 0.1 and 1: dynamic tree quantisation, Dettmers 2016, §3 (arXiv:1511.04561).
    """
    parts = [torch.tensor([0.0, 1.0], device="cpu")]
    for bits in range(7):
        edges = _linspace(0.1, 1, 2**bits + 1)
        values = 10.0 ** (bits - 6) * ((edges[:-1] + edges[1:]) / 2)
        parts += [values, -values]
    return torch.cat(parts).sort().values


def _linspace(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")


def _in_pairs(values: Tensor) -> Tensor:
    """For each byte the values of its two codes, as one complex number: (256,), what torch gathers fastest."""
    both = torch.nn.functional.pad(values, (0, 16 - len(values)))
    return torch.view_as_complex(torch.cartesian_prod(both, both))


_BOOKS = {"nf2": normal_float(2), "nf4": normal_float(4), "fp4": float4()}
_TABLES = {
    **_BOOKS,
    **{f"{name} in pairs": _in_pairs(values) for name, values in _BOOKS.items()},
    "dynamic": dynamic_map(),
}
_ELSEWHERE: dict[tuple[str, torch.device], Tensor] = {}


def table(name: str, device: torch.device) -> Tensor:
    """The values of the codes 0, 1, 2, … of "nf4", "nf2", "fp4" or the "dynamic" map of scales; float32."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return _TABLES[name].to(device)
    if (name, device) not in _ELSEWHERE:
        _ELSEWHERE[name, device] = _TABLES[name].to(device)
    return _ELSEWHERE[name, device]


# --- quantising -----------------------------------------------------------------------------------


def quantise(W: Tensor, quantisation: Quantisation) -> Packed:
    """W (out, in) of 16 or 32 bits, rounded. The formats are "nf4", "nf2", "fp4" and "int8".

    Each entry over the largest magnitude of its block (int8: of its row) becomes the nearest value of the
    format. Raises QuantisationError where an entry is not finite, or for another format.
    """
    if quantisation.format == "int8":
        return _quantise_int8(W)
    codes, absmax = _quantise_blocks(W, quantisation)
    return quantise_scales(codes, absmax) if quantisation.double else Packed(codes, absmax)


def quantise_scales(codes: Tensor, absmax: Tensor) -> Packed:
    """The same weight doubly quantised: `absmax` of all its blocks, float32 (blocks,), in 8 bits."""
    offset = absmax.mean()
    return Packed(codes, *_quantise_scales(absmax - offset), offset)


def _quantise_blocks(W: Tensor, quantisation: Quantisation) -> tuple[Tensor, Tensor]:
    """Some blocks at a time: what lies between takes many times the memory of the entries."""
    size = block_size_of(quantisation)
    parts = W.detach().flatten().split(max(1, _PART // size) * size)
    found = [_quantise_part(part, quantisation) for part in parts]
    codes, absmax = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return codes, absmax


def _quantise_part(W: Tensor, quantisation: Quantisation) -> tuple[Tensor, Tensor]:
    size = block_size_of(quantisation)
    blocks, absmax = _in_blocks(W, size), magnitudes(W, quantisation)
    least = absmax.clamp_min(1e-38)
    unit = blocks * least.reciprocal()[:, None]
    if W.numel() % size:  # bitsandbytes' way with the last block, where it is short
        unit[-1] = blocks[-1] / least[-1]
    order = torch.argsort(_TABLES[quantisation.format], stable=True).to(W.device)
    values = table(quantisation.format, W.device)[order]
    entries = unit.clamp_(-1, 1).flatten()[: W.numel()]
    entries = torch.nn.functional.pad(entries, (0, W.numel() % 2))  # two share a byte
    codes = order.to(torch.uint8).index_select(0, _above(entries, _between(values)))
    return (codes[::2] << 4 | codes[1::2])[:, None], absmax


def magnitudes(W: Tensor, quantisation: Quantisation) -> Tensor:
    """The largest magnitude of each block of W, float32 (blocks,). Raises QuantisationError where it is not finite."""
    size = block_size_of(quantisation)
    absmax = _in_blocks(W, size).abs().amax(dim=1)
    _refuse_infinite(absmax)
    if W.numel() % size:
        absmax[-1] = absmax[-1].clamp_min(1e-38)
    return absmax


def _above(entries: Tensor, bounds: Tensor) -> Tensor:
    """How many of `bounds`, ascending in (−1, 1), are less than each entry, of [−1, 1]: int32 (entries,).

    On a CPU a search takes longer than all the rest of quantising. Cells so narrow that at most one bound lies in each
    leave one comparison: what is in a higher cell than a bound is above it.
    """
    if entries.device.type != "cpu":
        return torch.bucketize(entries, bounds, out_int32=True)
    cells = [((x + 1) * _CELLS).int() for x in (entries, bounds)]
    below = torch.searchsorted(
        cells[1], torch.arange(2 * _CELLS + 1, dtype=torch.int32), out_int32=True
    )
    first = below.index_select(0, cells[0])
    next_bound = torch.nn.functional.pad(bounds, (0, 1), value=2.0).index_select(0, first)
    return first.add_(entries > next_bound)


def _quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of the "dynamic" table (blocks,), and the largest magnitude of every 256 scales."""
    blocks = _in_blocks(scales, NESTED_BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    unit = blocks / torch.where(absmax > 0, absmax, 1)[:, None]
    if scales.device.type == "cpu":  # where bitsandbytes looks the nearest value up at 2¹⁶ places
        place = ((unit.double() + 1) / 2 * 65535 + 0.5).floor()
        unit = (place / 65535 * 2 - 1).float()
    codes = torch.bucketize(unit, _between(table("dynamic", scales.device)))
    codes = torch.where((absmax > 0)[:, None], codes, 0)
    return codes.flatten()[: len(scales)].to(torch.uint8), absmax


def _quantise_int8(W: Tensor) -> Packed:
    """In 127ths of each row's largest magnitude, of W in float16: LLM.int8's weights, Dettmers et al. 2022."""
    half = W.detach().to(torch.float16)
    absmax = half.abs().amax(dim=1).float()
    _refuse_infinite(absmax)
    codes = (half * torch.where(absmax > 0, 127.0 / absmax, 0)[:, None]).round().to(torch.int8)
    return Packed(codes, absmax)


def _in_blocks(W: Tensor, size: int) -> Tensor:
    """The entries in row-major order, float32 (blocks, size), the last block filled up with zeros."""
    flat = W.detach().flatten().float()
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _between(values: Tensor) -> Tensor:
    return (values[1:] + values[:-1]) / 2


def _refuse_infinite(absmax: Tensor) -> None:
    if not absmax.is_meta and not torch.isfinite(absmax).all():
        raise QuantisationError(
            "The weight has NaN, infinity or, for int8, entries beyond ±65504 in it, and cannot be quantised."
        )


def block_size_of(quantisation: Quantisation) -> int:
    """The entries of a block. Raises QuantisationError for a format that is not written in blocks here."""
    size = quantisation.block_size
    if quantisation.format not in IN_BLOCKS or size is None:
        raise QuantisationError(f"lowrank reads {quantisation.format} and does not write it.")
    if size < 2 or size % 2:
        raise QuantisationError(f"block_size={size} must be even: two entries share a byte.")
    return size


# --- and back -------------------------------------------------------------------------------------


def dequantise(
    packed: Packed,
    quantisation: Quantisation,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of that shape that `packed` stands for: computed in float32, rounded to `dtype`."""
    if quantisation.format == "int8":
        return dequantise_int8(packed, dtype)
    size = block_size_of(quantisation)
    absmax = scales(packed)
    codes = packed.codes.view(torch.uint8)
    if torch.compiler.is_compiling() or codes.is_meta:
        return dequantise_blocks_reference(codes, absmax, quantisation.format, size, shape, dtype)
    if quantisation.format != "nf2" and _bitsandbytes_reads(codes, shape, dtype, size):
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            codes, absmax, size, quantisation.format, shape, dtype
        )
    return dequantise_blocks(codes, absmax, quantisation.format, size, shape, dtype)


def scales(packed: Packed) -> Tensor:
    """The largest magnitude of each block, or row, as dequantising takes it; float32."""
    if packed.nested_absmax is None or packed.offset is None:
        return packed.absmax.float()
    values = table("dynamic", packed.absmax.device)[packed.absmax.int()]
    nested = packed.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: len(values)]
    return values * nested + packed.offset


def dequantise_int8(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (out, in) in 127ths of each row's scale."""
    return packed.codes.to(dtype).mul_((packed.absmax * (1 / 127))[:, None])


def dequantise_blocks_reference(
    codes: Tensor,
    absmax: Tensor,
    format: str,
    size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Each code's value times its block's scale, in plain steps."""
    both = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten()
    n = torch.Size(shape).numel()
    values = table(format, codes.device)[both[:n].int()]
    return (values * absmax.repeat_interleave(size)[:n]).to(dtype).view(shape)


def dequantise_blocks(
    codes: Tensor,
    absmax: Tensor,
    format: str,
    size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """The same, bit for bit, a byte's two values looked up at once, and some blocks at a time.

    Between the codes and the result lies no tensor of the weight's size. benchmarks/quantised_step.py times it.
    """
    n = torch.Size(shape).numel()
    flat, pairs = codes.flatten(), table(f"{format} in pairs", codes.device)
    found = torch.empty(n, dtype=dtype, device=codes.device)
    step = max(1, (_CHUNK if codes.device.type == "cpu" else 2**24) * 2 // size)  # blocks
    for block in range(0, len(absmax), step):
        part = flat[block * size // 2 : (block + step) * size // 2]
        values = pairs.index_select(0, part.int()).view(torch.float32)
        out = found[block * size : (block + step) * size]
        if len(out) % size:  # the last block is short
            scale = absmax[block : block + step].repeat_interleave(size)[: len(out)]
            out.copy_(values[: len(out)] * scale)
        else:
            scale = absmax[block : block + step, None]
            torch.mul(values.view(-1, size), scale, out=out.view(-1, size))
    return found.view(shape)


def _bitsandbytes_reads(
    codes: Tensor, shape: tuple[int, ...], dtype: torch.dtype, size: int
) -> bool:
    """Whether to use its kernel: on CUDA wherever it is installed, on a CPU where it is loaded anyway."""
    if (
        dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or size < 32
        or size & (size - 1)
    ):
        return False
    if codes.device.type == "cpu":
        # 0.50.2 scales a row wrongly where a block goes on in the next one; larger blocks it hands to torch
        return "bitsandbytes" in sys.modules and shape[-1] % size == 0 and size < 2048
    return codes.device.type == "cuda" and _load_bitsandbytes()


@cache
def _load_bitsandbytes() -> bool:
    if find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes  # noqa: F401

    return True


def rounded(W: Tensor, quantisation: Quantisation) -> Tensor:
    """The numbers that stand for W (out, in) once it is quantised; float32."""
    return dequantise(quantise(W, quantisation), quantisation, tuple(W.shape))
