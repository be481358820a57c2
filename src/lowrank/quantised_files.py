"""Weights of a quantised base out of files, as the numbers that they stand for: stored packed, or rounded when read.

Both are read some rows at a time. Of a doubly quantised weight that is rounded when read, the scales come first, in
a pass of their own: each is rounded by the mean and the magnitudes of others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank.errors import TensorFileError
from lowrank.kernels.quantisation import (
    NESTED_BLOCK_SIZE,
    Packed,
    block_size_of,
    dequantise,
    magnitudes,
    quantise,
    quantise_scales,
    scales,
)
from lowrank.lora import Lora, without
from lowrank.quantisation import Quantisation
from lowrank.tensor_files import DTYPES, NAMES, Entry, opened, read_block

Numbers = Callable[
    [int, int], Tensor
]  # (begin, end) of the flattened matrix → (end - begin,), float32

_STATE = ".quant_state.bitsandbytes__"  # what ends a weight's name, before its format
_CHUNK = 1 << 18  # entries, in a pass over the scales


@dataclass(frozen=True)
class DequantisedEntry:
    """A matrix in files, as `Entry` is one, whose numbers are those that its quantisation stands for."""

    file: Path
    name: str
    dtype: str  # of the base in 16 or 32 bits: "BF16"
    shape: tuple[int, ...]  # (out, in); transposed: (in, out)
    quantisation: Quantisation
    open: Callable[[], Numbers]  # of the matrix (out, in)
    stored: bool  # it is packed in the file
    transposed: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def floating(self) -> bool:
        return True

    @property
    def bytes(self) -> int:
        """Of the matrix in `dtype`."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def reader(self) -> Numbers:
        """A function of (begin, end) that gives these entries of the flattened tensor, float32."""
        numbers = self.open()
        if not self.transposed:
            return numbers
        whole = numbers(0, math.prod(self.shape)).view(self.shape[::-1]).T.reshape(-1)
        return lambda begin, end: whole[begin:end]

    def read(self) -> Tensor:
        """The whole tensor, float32."""
        return self.reader()(0, math.prod(self.shape)).view(self.shape)

    def entries(self, places: Iterable[int]) -> Tensor:
        """The numbers at these places of the flattened tensor."""
        numbers = self.reader()
        return torch.cat([numbers(place, place + 1) for place in places])


AnyEntry = Entry | DequantisedEntry


# --- rounded when read ----------------------------------------------------------------------------


def rounded_entry(
    entry: Entry,
    quantisation: Quantisation,
    transposed: bool = False,
    less: Lora | None = None,
) -> DequantisedEntry:
    """A weight of a base in 16 or 32 bits as `quantisation` rounds it. transposed: the file has (in, out).

    less: what is taken out of W (out, in) before that.
    """
    shape = entry.shape[::-1] if transposed else entry.shape
    by_row = quantisation.format == "int8"
    size = shape[-1] if by_row else block_size_of(quantisation)
    total = math.prod(shape)

    def stored(begin: int, end: int) -> Tensor:
        if transposed:
            return entry.read().T.reshape(-1)[begin:end]
        with opened(entry.file) as file:
            return read_block(file, entry, begin, end)

    def read(begin: int, end: int) -> Tensor:
        if less is None:
            return stored(begin, end)
        width = shape[-1]
        first, last = begin // width, -(-end // width)  # rows
        rows = stored(first * width, last * width).view(-1, width)
        taken = without(rows, less._replace(B=less.B[first:last]))
        return taken.view(-1)[begin - first * width : end - first * width]

    def pack(begin: int, end: int) -> Packed:
        return quantise(
            read(begin, end).view(-1 if by_row else 1, size if by_row else end - begin), plain
        )

    def open_() -> Numbers:
        held = _doubly(read, plain, size, total) if quantisation.double else None

        def numbers(begin: int, end: int) -> Tensor:
            first, last = _aligned(begin, end, size, total)
            packed = pack(first, last)
            if held is not None:
                packed = packed._replace(absmax=held[first // size : -(-last // size)])
            found = dequantise(packed, plain, (1, last - first)).view(-1)
            return found.view(-1)[begin - first : end - first]

        return numbers

    plain = Quantisation(quantisation.format, block_size=quantisation.block_size)
    return DequantisedEntry(
        entry.file, entry.name, entry.dtype, entry.shape, quantisation, open_, False, transposed
    )


def _doubly(
    read: Callable[[int, int], Tensor], plain: Quantisation, size: int, total: int
) -> Tensor:
    """The scales of all blocks after they were themselves rounded."""
    step = max(1, _CHUNK // size) * size
    starts = range(0, total, step)
    absmax = torch.cat([magnitudes(read(i, min(total, i + step)), plain) for i in starts])
    return scales(quantise_scales(torch.empty(0), absmax))


def _aligned(begin: int, end: int, size: int, total: int) -> tuple[int, int]:
    """The blocks around (begin, end)."""
    return begin // size * size, min(total, -(-end // size) * size)


# --- stored packed --------------------------------------------------------------------------------


def packed_entries(stored: Mapping[str, Entry], dtype: torch.dtype) -> dict[str, AnyEntry]:
    """`stored` with one `DequantisedEntry` in the place of all tensors of each weight that bitsandbytes packed.

    dtype: that of the base where the files do not say it (int8). Raises TensorFileError if parts are missing.
    """
    found: dict[str, AnyEntry] = {}
    parts: set[str] = set()
    states = {key.partition(_STATE)[0]: key for key in stored if _STATE in key}
    for name, entry in stored.items():
        rows = stored.get(f"{name.removesuffix('weight')}SCB")
        state = states.get(name)
        if name.endswith("weight") and rows is not None and entry.dtype == "I8":
            found[name] = _packed_int8(entry, rows, NAMES[dtype])
            parts |= {rows.name, f"{name}_format"}
        elif state is not None:
            found[name] = _packed_blocks(name, stored, stored[state])
            parts |= {key for key in stored if key.startswith(f"{name}.")}
        else:
            found[name] = entry
    return {name: entry for name, entry in found.items() if name not in parts}


def _packed_int8(codes: Entry, rows: Entry, dtype: str) -> DequantisedEntry:
    quantisation = Quantisation("int8", "bitsandbytes")
    width = codes.shape[1]

    def open_() -> Numbers:
        absmax = rows.read().float()

        def numbers(begin: int, end: int) -> Tensor:
            first, last = _aligned(begin, end, width, math.prod(codes.shape))
            with opened(codes.file) as file:
                part = read_block(file, codes, first, last).view(-1, width)
            packed = Packed(part, absmax[first // width : last // width])
            found = dequantise(packed, quantisation, tuple(part.shape))
            return found.view(-1)[begin - first : end - first]

        return numbers

    return DequantisedEntry(
        codes.file, codes.name, dtype, codes.shape, quantisation, open_, stored=True
    )


def _packed_blocks(name: str, stored: Mapping[str, Entry], state: Entry) -> DequantisedEntry:
    try:
        held = json.loads(bytes(state.read().tolist()))
        shape, size = tuple(held["shape"]), held["blocksize"]
        dtype, offset = NAMES[getattr(torch, held["dtype"])], held.get("nested_offset")
        quantisation = Quantisation(held["quant_type"], "bitsandbytes", size, offset is not None)
        if held.get("nested_blocksize", NESTED_BLOCK_SIZE) != NESTED_BLOCK_SIZE:
            raise ValueError(
                f"{held['nested_blocksize']} scales share one, not {NESTED_BLOCK_SIZE}"
            )
        absmax = stored[f"{name}.absmax"]
        nested = stored[f"{name}.nested_absmax"] if quantisation.double else None
    except (ValueError, KeyError, AttributeError) as error:
        raise TensorFileError(
            f"{state.file}: {name} is not packed as bitsandbytes packs it: {error!r}"
        ) from error
    codes, total = stored[name], math.prod(shape)
    as_bytes = codes._replace(dtype="U8", shape=(codes.bytes,))  # whatever storage they pass for

    def open_() -> Numbers:
        packed = Packed(torch.empty(0), absmax.read())
        if nested is not None:
            packed = packed._replace(nested_absmax=nested.read(), offset=torch.tensor(offset))
        held = scales(packed)

        def numbers(begin: int, end: int) -> Tensor:
            first, last = _aligned(begin, end, size, total)
            with opened(codes.file) as file:
                part = read_block(file, as_bytes, first // 2, -(-last // 2))
            packed = Packed(part[:, None], held[first // size : -(-last // size)])
            found = dequantise(packed, plain, (1, last - first)).view(-1)
            return found[begin - first : end - first]

        return numbers

    plain = Quantisation(quantisation.format, block_size=size)
    return DequantisedEntry(codes.file, name, dtype, shape, quantisation, open_, stored=True)
