"""safetensors files, tensor by tensor and block by block: where each one lies, and files laid out before they are filled.

The format: eight bytes with the header's length, the header (JSON: name → dtype, shape, place), the data.
Blocks are written at their place with `pwrite`, and read with `pread`, or in windows of the file that are mapped
one after the other: mapping a whole file would count every page that was touched as resident.
"""

import ctypes
import errno
import json
import math
import mmap
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import TensorFileError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the format's own
_MADV_POPULATE_READ = 22  # Linux 5.14: all pages at once, not one fault after the other


class Entry(NamedTuple):
    """One tensor in a file, not read yet."""

    file: Path
    name: str
    dtype: str  # as the file calls it, "BF16"
    shape: tuple[int, ...]
    start: int  # its first byte in the file
    bytes: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for a dtype that only its bytes can be copied of."""
        return DTYPES.get(self.dtype)

    @property
    def floating(self) -> bool:
        dtype = self.torch_dtype
        return dtype is not None and dtype.is_floating_point

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        with opened(self.file) as file:
            return read_block(file, self, 0, math.prod(self.shape)).view(self.shape)

    def entries(self, places: Iterable[int]) -> Tensor:
        """The numbers at these places of the flattened tensor."""
        with opened(self.file) as file:
            return torch.cat([read_block(file, self, i, i + 1) for i in places])


class Layout(NamedTuple):
    """A file before it is filled: its head, and where each tensor begins."""

    head: bytes
    start: dict[str, int]
    bytes: int


def entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, in their order there, and its metadata. Raises TensorFileError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise TensorFileError(f"{path} is no safetensors file, or not all of it is there.")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            rows = [
                (*row["data_offsets"], name, row["dtype"], tuple(row["shape"]))
                for name, row in header.items()
            ]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise TensorFileError(f"{path}: the header is broken: {error}") from error
    found = {}
    for begin, end, name, dtype, shape in sorted(rows):
        if not 0 <= begin <= end <= size - 8 - length:
            raise TensorFileError(f"{path} ends before its tensor {name!r} does: it is cut off.")
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise TensorFileError(
                f"{path}: {name!r} is {dtype} of shape {shape}, and has {end - begin} bytes."
            )
        found[name] = Entry(path, name, dtype, shape, 8 + length + begin, end - begin)
    return found, metadata


def layout(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> Layout:
    """Where each of `tensors` (name, the file's dtype, shape, bytes) will lie, wider entries first."""
    rows = list(tensors)
    # the wide ones first, so that each begins at a multiple of its entries' size
    rows.sort(key=lambda row: -(row[3] // max(1, math.prod(row[2]))))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    offsets = {}
    for name, dtype, shape, size in rows:
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offsets[name] = offset
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: start + at for name, at in offsets.items()}
    return Layout(len(text).to_bytes(8, "little") + text, places, start + offset)


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A file descriptor for `pread` and `pwrite`, which threads may share."""
    file = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def created(path: Path, place: Layout) -> Iterator[int]:
    """A new file of this layout, with its head, and room for the rest. Raises TensorFileError if there is none."""
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
        try:
            _reserve(file, place.bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = shutil.disk_usage(path.parent).free
            raise TensorFileError(
                f"{path} needs {place.bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there: {error.strerror}."
            ) from error
        write_bytes(file, memoryview(place.head), 0)
        yield file


def _reserve(file: int, size: int) -> None:
    """Give a new file its size, and its place on the disk where the file system can do that at once.

    Not by os.posix_fallocate, which writes to every block where it cannot.
    """
    fallocate = None
    if sys.platform == "linux":
        fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate and fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
        fallocate = None
    if not fallocate:
        os.truncate(file, size)


def read_block(file: int, entry: Entry, begin: int, end: int, into: bytearray | None = None):
    """Entries `begin` to `end` of the flattened tensor, (end - begin,); in `into` if it is given."""
    dtype = entry.torch_dtype
    assert dtype is not None, entry.dtype
    size = (end - begin) * dtype.itemsize
    buffer = bytearray(size) if into is None else into
    read_bytes(file, memoryview(buffer)[:size], entry.start + begin * dtype.itemsize)
    if not size:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=end - begin)


def read_bytes(file: int, into: memoryview, at: int) -> None:
    """Fill `into` from the place `at`. Raises TensorFileError if the file ends before."""
    while into:
        count = os.preadv(file, [into], at)
        if not count:
            raise TensorFileError("A file became shorter while it was read.")
        into, at = into[count:], at + count


def mapped(file: int, dtype: torch.dtype, start: int, numbers: int) -> Tensor:
    """`numbers` entries from the place `start`, (numbers,), mapped: not to be written to.

    Unmapped when the tensor goes. Raises TensorFileError if the file ends before.
    """
    at = start - start % mmap.ALLOCATIONGRANULARITY
    size = start - at + numbers * dtype.itemsize
    try:
        # private: torch takes writable memory without a warning
        window = mmap.mmap(file, size, mmap.MAP_PRIVATE, offset=at)
    except ValueError as error:
        raise TensorFileError("A file became shorter while it was read.") from error
    if sys.platform == "linux":
        with suppress(OSError):  # an older kernel: page by page then
            window.madvise(_MADV_POPULATE_READ)
    if (
        start % dtype.itemsize
    ):  # a header of odd length: numbers are not read across their boundaries
        found = torch.frombuffer(window, dtype=torch.uint8, offset=start - at)
        return found.clone().view(dtype)
    return torch.frombuffer(window, dtype=dtype, count=numbers, offset=start - at)


def memory(data: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy; the tensor has to outlive it."""
    size = data.numel() * data.element_size()
    return memoryview((ctypes.c_char * size).from_address(data.data_ptr())).cast("B")


def write_bytes(file: int, data: memoryview, at: int) -> None:
    """Write all of `data` at the place `at`."""
    while data:
        count = os.pwrite(file, data, at)
        data, at = data[count:], at + count


def copy_bytes(source: int, start: int, size: int, file: int, at: int) -> None:
    """Copy `size` bytes between files, in the kernel where it can."""
    in_kernel = hasattr(os, "copy_file_range")
    buffer = bytearray()
    while size:
        count = 0
        if in_kernel:
            try:
                count = os.copy_file_range(source, file, min(size, 1 << 26), start, at)
            except OSError:  # two file systems, or one that cannot
                in_kernel = False
        if not count:
            buffer = buffer or bytearray(min(size, 1 << 20))
            count = min(size, len(buffer))
            read_bytes(source, memoryview(buffer)[:count], start)
            write_bytes(file, memoryview(buffer)[:count], at)
        start, at, size = start + count, at + count, size - count
