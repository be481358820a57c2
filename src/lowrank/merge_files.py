"""The files of a merged model, written block by block, with what rounding cost.

A block is some rows of one matrix, as many as a core's cache holds: read, summed in float32, rounded, written.
A worker holds one block, so that the memory needed is the adapter's and a few megabytes.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank.errors import MergeError
from lowrank.lora import Lora, add_change_, delta_norm, unrounded_merged_weight
from lowrank.merge_plan import MergePlan, Part
from lowrank.rounding import rounded_for_inputs
from lowrank.tensor_files import (
    DTYPES,
    Entry,
    Layout,
    copy_bytes,
    layout,
    opened,
    read_bytes,
    write_bytes,
)

_BLOCK = 1 << 17  # entries: in float32 and in bfloat16 together, half of what a core's cache holds
_MEASURED = 1 << 18  # entries of a matrix on which rounding is measured; of a smaller one all
_WORKERS = 8


@dataclass(frozen=True)
class Rounding:
    """What rounding to the merged dtype costs at one tensor."""

    name: str
    dtype: str
    loss: float  # ‖round(W+ΔW) − (W+ΔW)‖ / ‖ΔW‖: 0.02 means noise of 2% of the adapter's change
    change: float  # ‖ΔW‖, Frobenius
    outputs: float | None = None  # ‖E·x‖ / ‖ΔW·x‖ over the given inputs, E the rounding error


@torch.no_grad()
def write_files(
    plan: MergePlan,
    metadata: Mapping[str, Mapping[str, str]],
    folder: Path,
    workers: int = 1,
    for_inputs: bool = False,
) -> list[Rounding]:
    """Write every file of `plan` into `folder`, and an index if they are several. In the plan's order: the rounding
    of the changed tensors.

    metadata: of each file's header. for_inputs: round parts that have a covariance for their inputs. Raises MergeError, with all of them, if merged numbers are not finite.
    """
    with ExitStack() as stack:
        jobs = []
        layouts = {}
        for name, parts in plan.files.items():
            rows = [(part.name, part.dtype, part.shape, _bytes(part.shape, part)) for part in parts]
            layouts[name] = place = layout(rows, {"format": "pt", **metadata.get(name, {})})
            file = stack.enter_context(opened(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL))
            os.truncate(file, place.bytes)
            write_bytes(file, memoryview(place.head), 0)
            jobs += [_Job(part, file, place.start[part.name], for_inputs) for part in parts]
        sources = {
            path: stack.enter_context(opened(path))
            for path in {j.part.source.file for j in jobs if isinstance(j.part.source, Entry)}
        }
        with ThreadPoolExecutor(workers) as pool:
            scratch = threading.local()
            results = list(pool.map(lambda job: job.run(sources, scratch), jobs))
    lost = [text for result in results if (text := result.not_finite)]
    if lost:
        raise MergeError(
            "These merged weights are not finite:\n  "
            + "\n  ".join(lost[:10])
            + "\nIf the dtype is too narrow for them, merge in float32: --dtype float32."
        )
    _write_index(folder, layouts)
    return [result.rounding for result in results if result.rounding is not None]


@dataclass
class _Result:
    rounding: Rounding | None = None
    not_finite: str = ""


@dataclass
class _Job:
    """One tensor and its place in the file."""

    part: Part
    file: int
    start: int
    for_inputs: bool

    def run(self, sources: Mapping[Path, int], scratch: threading.local) -> _Result:
        part = self.part
        if part.copied:
            assert isinstance(part.source, Entry)
            entry = part.source
            copy_bytes(sources[entry.file], entry.start, entry.bytes, self.file, self.start)
            return _Result()
        dtype = DTYPES[part.dtype]
        # one more precision than what is written, so that the sum is rounded once
        wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
        total, width = math.prod(part.shape), _width(part.shape)
        rows = max(1, _BLOCK // max(1, width))
        if part.covariance is not None:
            rows = max(1, _BLOCK * 64 // max(1, width))  # columns are gone through one by one
        if part.transposed and (part.covariance is not None or _is_dora(part)):
            rows = max(
                1, total
            )  # DoRA's norms, and inputs, run over what is the first dimension here
        read = self._reader(sources, width, scratch)
        sums = _buffer(scratch, wide, "sum", min(total, rows * width))
        out = _buffer(scratch, dtype, "out", min(total, rows * width))
        height = total // width if width else 0
        step = max(1, total // _MEASURED)
        noise = change = measured = largest = noise_out = change_out = 0.0
        C = part.covariance
        for i, first in enumerate(range(0, height, rows)):
            count = min(rows, height - first)
            before = read(first, count)
            exact = _merged(part, before, first, sums[: count * width].view(count, width))
            rounded = out[: count * width].view(count, width).copy_(exact)
            if C is not None and self.for_inputs and dtype.itemsize == 2:
                best = rounded_for_inputs(exact.T if part.transposed else exact, C, dtype)
                rounded.copy_(best.T if part.transposed else best)
            if not _surely_finite(exact, rounded) and not rounded.isfinite().all():
                largest = max(largest, exact.abs().max().item()) or math.nan
            write_bytes(self.file, _memory(rounded), self.start + first * width * dtype.itemsize)
            if C is not None:
                noise_out += _through(C, exact - rounded, part.transposed)
                change_out += _through(C, exact - before, part.transposed)
            if part.changed and (i % step == 0 or C is not None):
                noise += (exact - rounded).square().sum().item()
                change += (exact - before).square().sum().item()
                measured += exact.numel()
        not_finite = f"{part.name} (largest value {largest:.3g}, {dtype})" if largest else ""
        if not part.changed:
            return _Result(None, not_finite)
        norm = math.sqrt(change * total / measured) if measured else 0.0
        if part.lora is not None and part.lora.magnitude is None:
            norm = delta_norm(part.lora)
        cost = math.sqrt(noise * total / measured) / norm if norm else 0.0
        name = str(dtype).removeprefix("torch.")
        outputs = None if C is None else math.sqrt(noise_out / change_out) if change_out else 0.0
        return _Result(Rounding(part.in_model, name, cost, norm, outputs), not_finite)

    def _reader(
        self, sources: Mapping[Path, int], width: int, scratch: threading.local
    ) -> Callable[[int, int], Tensor]:
        """A function of (first, count) that gives these rows of what the tensor is made of."""
        source = self.part.source
        if isinstance(source, Tensor):
            held = source.detach().reshape(-1, max(1, width))
            return lambda first, count: held[first : first + count]
        dtype, file, start = source.torch_dtype, sources[source.file], source.start
        assert dtype is not None, source.dtype
        size = dtype.itemsize * width

        def read(first: int, count: int) -> Tensor:
            block = _buffer(scratch, dtype, "in", count * width)[: count * width]
            read_bytes(file, _memory(block), start + first * size)
            return block.view(count, width)

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


def _buffer(scratch: threading.local, dtype: torch.dtype, use: str, numbers: int) -> Tensor:
    """Memory of this worker's own for `numbers` entries or more, used again for the next block."""
    name = f"{use} {dtype}"
    held = getattr(scratch, name, None)
    if held is None or held.numel() < numbers:
        held = torch.empty(max(numbers, _BLOCK), dtype=dtype)
        setattr(scratch, name, held)
    return held


def _surely_finite(exact: Tensor, rounded: Tensor) -> bool:
    """Whether a sum, which is quick, shows that all of `rounded` is finite; False if it does not."""
    narrow = rounded.dtype == torch.float16  # what float32 holds may be too large for it
    return abs((rounded if narrow else exact).sum().item()) < 1e38


def _is_dora(part: Part) -> bool:
    return part.lora is not None and part.lora.magnitude is not None


def _through(C: Tensor, E: Tensor, transposed: bool) -> float:
    """The mean of ‖E·x‖² over inputs with the covariance C."""
    E = E.T if transposed else E
    return max(0.0, ((E @ C.to(E.dtype)) * E).sum().item())


def _width(shape: Sequence[int]) -> int:
    """How long a row of the held matrix is; a vector is one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def _bytes(shape: Sequence[int], part: Part) -> int:
    if part.copied:
        assert isinstance(part.source, Entry)
        return part.source.bytes
    return math.prod(shape) * DTYPES[part.dtype].itemsize


def _memory(data: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy; the tensor has to outlive it."""
    size = data.numel() * data.element_size()
    return memoryview((ctypes.c_char * size).from_address(data.data_ptr())).cast("B")


@contextmanager
def one_thread_each() -> Iterator[int]:
    """As many workers as torch would use threads; within each, and meanwhile everywhere, torch uses one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield max(1, min(threads, _WORKERS))
    finally:
        torch.set_num_threads(threads)


def _write_index(folder: Path, layouts: Mapping[str, Layout]) -> None:
    if len(layouts) == 1:
        return
    size = sum(place.bytes - len(place.head) for place in layouts.values())
    places = {name: file for file, place in layouts.items() for name in place.start}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
