"""The rows of a merged matrix, block by block: read, summed in float32, rounded.

A worker has one block at a time, small enough to stay in the processor's cache, so that the memory a merge needs is
the adapter's and a few megabytes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.kernels.low_rank_add import (
    adds_bfloat16,
    bfloat16_factors,
    low_rank_add_bfloat16_,
)
from lowrank.lora import Lora, add_change_, unrounded_merged_weight
from lowrank.merge_plan import Part
from lowrank.quantised_files import DequantisedEntry
from lowrank.rounding import rounded_for_inputs
from lowrank.tensor_files import DTYPES, Entry, mapped, memory, read_bytes

_BLOCK = 1 << 22  # bytes of a block, and of its sums
_TILE = 64  # rows; a product over a multiple of them is faster
_WINDOW = 1 << 22  # entries that are mapped at a time
_MEASURED_BLOCKS = 2  # of a large tensor, or a few more


class Block(NamedTuple):
    rounded: Tensor  # (rows, width), as they are written; overwritten by the next block
    exact: Tensor  # the first of these rows before they were rounded, float32 or wider
    before: Tensor  # the same rows without the adapter


def blocks(
    part: Part,
    sources: Mapping[Path, int],
    scratch: threading.local,
    measured: float = 1.0,
    for_inputs: bool = False,
) -> Iterator[Block]:
    """All rows of `part`, in their order, as the merged model has them.

    sources: its files, open. scratch: memory that this worker uses again. measured: the share of the rows of which
    `exact` and `before` are given, in a few of the blocks. for_inputs: round for the part's covariance, if it has one.
    """
    if math.prod(part.shape) == 0:
        return
    if _adds_in_place(part):
        yield from _added_in_place(part, sources, scratch, measured)
        return
    dtype = DTYPES[part.dtype]
    # one more precision than what is written, so that the sum is rounded once
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    height, width = _matrix(part.shape)
    rows = max(1, _BLOCK // ((wide.itemsize + dtype.itemsize) * width))
    C = part.covariance
    if C is not None:
        rows *= 64  # columns are gone through one by one
    if part.transposed and (C is not None or _is_dora(part)):
        rows = height  # DoRA's norms, and inputs, run over what is the first dimension here
    rows = min(rows, height)
    read = _reader(part, sources)
    sums = _buffer(scratch, wide, "sum", rows * width)
    out = _buffer(scratch, dtype, "out", rows * width)
    for first in range(0, height, rows):
        count = min(rows, height - first)
        before = read(first, count)
        exact = _merged(part, before, first, sums[: count * width].view(count, width))
        rounded = out[: count * width].view(count, width).copy_(exact)
        if C is not None and for_inputs and dtype.itemsize == 2:
            best = rounded_for_inputs(exact.T if part.transposed else exact, C, dtype)
            rounded.copy_(best.T if part.transposed else best)
        some = _measured(first // rows, height / rows, count, measured)
        yield Block(rounded, exact[:some], before[:some])


def _adds_in_place(part: Part) -> bool:
    """Whether W, in bfloat16 before and after, can be read, added to and written in one buffer."""
    source = part.source
    return (
        part.dtype == "BF16"
        and isinstance(source, Entry)
        and source.dtype == "BF16"
        and part.lora is not None
        and part.lora.magnitude is None
        and part.covariance is None
        and adds_bfloat16()
    )


def _added_in_place(
    part: Part, sources: Mapping[Path, int], scratch: threading.local, measured: float
) -> Iterator[Block]:
    source, lora = part.source, part.lora
    assert isinstance(source, Entry)
    assert lora is not None
    A, B = lora.A.float(), lora.B.float() * lora.scaling
    if part.transposed:  # Wᵀ + (B·A)ᵀ, whose factors are Aᵀ and Bᵀ
        A, B = B.T, A.T
    A_halves, B_halves = bfloat16_factors(A, B)
    height, width = _matrix(part.shape)
    rows = min(height, max(1, _BLOCK // (2 * width * _TILE)) * _TILE)
    buffer = _buffer(scratch, torch.bfloat16, "out", rows * width)
    for first in range(0, height, rows):
        count = min(rows, height - first)
        W = buffer[: count * width].view(count, width)
        read_bytes(sources[source.file], memory(W), source.start + 2 * first * width)
        some = _measured(first // rows, height / rows, count, measured)
        before = exact = W[:0]
        if some:
            before = W[:some].float()
            exact = torch.addmm(before, B[first : first + some], A)
        low_rank_add_bfloat16_(W, A_halves, B_halves[first : first + count])
        yield Block(W, exact, before)


def _measured(block: int, blocks: float, count: int, share: float) -> int:
    """Of how many of this block's `count` rows the rounding is measured: of all, or in every so many blocks."""
    every = max(1, int(blocks / _MEASURED_BLOCKS)) if share < 1 else 1
    return math.ceil(min(1.0, share * every) * count) if block % every == 0 else 0


def _reader(part: Part, sources: Mapping[Path, int]) -> Callable[[int, int], Tensor]:
    """A function of (first, count) that gives these rows of what the tensor is made of."""
    height, width = _matrix(part.shape)
    source = part.source
    if isinstance(source, Tensor):
        held = source.detach().reshape(height, width)
        return lambda first, count: held[first : first + count]
    if isinstance(source, DequantisedEntry):
        numbers = source.reader()
        return lambda first, count: numbers(first * width, (first + count) * width).view(-1, width)
    dtype, file, start = source.torch_dtype, sources[source.file], source.start
    assert dtype is not None, source.dtype
    window, begin = torch.empty(0, width, dtype=dtype), 0

    def read(first: int, count: int) -> Tensor:
        nonlocal window, begin
        if not begin <= first <= first + count <= begin + len(window):
            rows = min(height - first, max(count, _WINDOW // width))
            at = start + first * width * dtype.itemsize
            window, begin = mapped(file, dtype, at, rows * width).view(rows, width), first
        return window[first - begin : first - begin + count]

    return read


def _merged(part: Part, before: Tensor, first: int, out: Tensor) -> Tensor:
    """`out`, in its wider dtype: the rows `before`, of which the first is `first`, as the merged model has them."""
    out.copy_(before)
    if part.add is not None:
        return out.add_(part.add.view_as(before))
    if part.lora is None:
        return out
    rows = slice(first, first + before.shape[0])
    lora = part.lora
    if part.transposed and lora.magnitude is not None:
        return out.copy_(unrounded_merged_weight(out.T, lora).T)
    if part.transposed:  # Wᵀ + scaling·(B·A)ᵀ, whose factors are Aᵀ and Bᵀ
        return add_change_(out, Lora(lora.B.T, lora.A.T[rows], lora.scaling))
    magnitude = None if lora.magnitude is None else lora.magnitude[rows]
    return add_change_(out, Lora(lora.A, lora.B[rows], lora.scaling, magnitude))


def _is_dora(part: Part) -> bool:
    return part.lora is not None and part.lora.magnitude is not None


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """The held tensor as rows of one width; a vector is one row."""
    width = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    return math.prod(shape) // width, width


def _buffer(scratch: threading.local, dtype: torch.dtype, use: str, numbers: int) -> Tensor:
    """Memory of this worker's own for `numbers` entries or more, used again for the next block."""
    name = f"{use} {dtype}"
    held = getattr(scratch, name, None)
    if held is None or held.numel() < numbers:
        held = torch.empty(max(numbers, _BLOCK // 2), dtype=dtype)
        setattr(scratch, name, held)
    return held
