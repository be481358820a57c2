"""Rounding a weight to few bits and back, in plain torch: normal floats in blocks, and integers by row."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_SIZE = 64
_TAIL = 0.9677083  # the quantile at which a normal float's largest value stands: QLoRA's code


class Quantised(NamedTuple):
    """What a quantisation stores of a weight."""

    codes: Tensor  # uint8 or int8; blocks: (blocks, block_size); rows: (out, in)
    scales: Tensor  # float32, the largest magnitude of each block or row: (blocks,) or (out,)


@cache
def normal_float(bits: int) -> Tensor:
    """The 2^bits values of the normal float, ascending from −1 to 1 with an exact 0; float32.

    Quantiles of the normal distribution, one more above zero than below: Dettmers et al. 2023, eq. 4 and
    Appendix E, whose table is `normal_float(4)`.
    """
    half = 2 ** (bits - 1)
    above = torch.special.ndtri(torch.linspace(_TAIL, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(_TAIL, 0.5, half, dtype=torch.float64)[:-1])
    zero = torch.zeros(1, dtype=torch.float64)
    return (torch.cat([above, zero, below]).sort().values / above.max()).float()


def quantise_normal_float(W: Tensor, bits: int = 4, block_size: int = BLOCK_SIZE) -> Quantised:
    """Each entry of W, divided by the largest magnitude of its block, as the nearest of `normal_float(bits)`.

    Blocks are block_size entries in row-major order, the last padded with zeros: as bitsandbytes stores NF4.
    """
    flat = W.detach().float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    scales = blocks.abs().amax(dim=1)
    values = normal_float(bits).to(W.device)
    between = (values[1:] + values[:-1]) / 2
    unit = blocks / torch.where(scales > 0, scales, 1)[:, None]
    return Quantised(torch.bucketize(unit, between, out_int32=True).to(torch.uint8), scales)


def dequantise_normal_float(stored: Quantised, shape: tuple[int, ...], bits: int = 4) -> Tensor:
    """The weight of that shape that `stored` stands for; float32."""
    values = normal_float(bits).to(stored.scales.device)
    blocks = values[stored.codes.int()] * stored.scales[:, None]
    return blocks.flatten()[: torch.Size(shape).numel()].view(shape)


def quantise_int8(W: Tensor) -> Quantised:
    """Each entry of W (out, in) in 127ths of its row's largest magnitude: LLM.int8's weights (Dettmers et al. 2022)."""
    W = W.detach().float()
    scales = W.abs().amax(dim=1)
    unit = W / torch.where(scales > 0, scales, 1)[:, None]
    return Quantised((127 * unit).round().to(torch.int8), scales)


def dequantise_int8(stored: Quantised) -> Tensor:
    """The weight (out, in) that `stored` stands for; float32."""
    return stored.codes.float() * (stored.scales / 127)[:, None]


def rounded(W: Tensor, bits: int) -> Tensor:
    """W (out, in) quantised and back, float32: 2 and 4 bits as normal floats, 8 as integers by row."""
    if bits == 8:
        return dequantise_int8(quantise_int8(W))
    return dequantise_normal_float(quantise_normal_float(W, bits), tuple(W.shape), bits)
