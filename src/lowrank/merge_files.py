"""The files of a merged model, written block by block, with what rounding cost."""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lowrank.errors import MergeError
from lowrank.lora import all_finite, delta_norm
from lowrank.merge_blocks import blocks
from lowrank.merge_plan import MergePlan, Part
from lowrank.tensor_files import (
    DTYPES,
    Entry,
    Layout,
    copy_bytes,
    created,
    layout,
    memory,
    opened,
    write_bytes,
)

_MEASURED = 1 << 14  # entries of a matrix on which rounding is measured; of a smaller one all
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

    metadata: of each file's header. for_inputs: round parts that have a covariance for their inputs. Raises MergeError,
    with all of them, if merged numbers overflow, or if the base's own are not finite where rounding is measured.
    """
    with ExitStack() as stack:
        jobs: list[_Job] = []
        files = []
        layouts = {}
        for name, parts in plan.files.items():
            rows = [(part.name, part.dtype, part.shape, _bytes(part.shape, part)) for part in parts]
            layouts[name] = place = layout(rows, {"format": "pt", **metadata.get(name, {})})
            files.append(file := _File(stack.enter_context(created(folder / name, place))))
            file.jobs += [_Job(part, file, place.start[part.name], for_inputs) for part in parts]
            jobs += file.jobs
        sources = {
            path: stack.enter_context(opened(path))
            for path in {j.part.source.file for j in jobs if isinstance(j.part.source, Entry)}
        }
        _run_all(files, workers, sources)
    results = [job.result for job in jobs]
    lost = [text for result in results if (text := result.not_finite)]
    if lost:
        raise MergeError(
            "These merged weights are not finite:\n  "
            + "\n  ".join(lost[:10])
            + "\nIf the dtype is too narrow for them, merge in float32: --dtype float32."
        )
    write_index(folder, layouts)
    return [result.rounding for result in results if result.rounding is not None]


@dataclass
class _Result:
    rounding: Rounding | None = None
    not_finite: str = ""


@dataclass(eq=False)
class _File:
    """One that is written. File systems take one write to a file at a time: threads that do not take turns spin."""

    number: int
    jobs: deque[_Job] = field(default_factory=deque)
    workers: int = 0
    turn: threading.Lock = field(default_factory=threading.Lock)


def _run_all(files: Sequence[_File], workers: int, sources: Mapping[Path, int]) -> None:
    """Run all jobs of `files`; whoever is free takes the next one of the file that fewest are writing to."""
    scratch = threading.local()
    choosing = threading.Lock()

    def work() -> None:
        while True:
            with choosing:
                file = min((f for f in files if f.jobs), key=lambda f: f.workers, default=None)
                if file is None:
                    return
                job = file.jobs.popleft()
                file.workers += 1
            try:
                job.result = job.run(sources, scratch)
            except BaseException:
                for each in files:
                    each.jobs.clear()
                raise
            finally:
                file.workers -= 1

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result()


@dataclass(eq=False)
class _Job:
    """One tensor and its place in the file."""

    part: Part
    file: _File
    start: int
    for_inputs: bool
    result: _Result = field(default_factory=_Result)

    def run(self, sources: Mapping[Path, int], scratch: threading.local) -> _Result:
        part = self.part
        if part.copied:
            assert isinstance(part.source, Entry)
            entry = part.source
            with self.file.turn:
                copy_bytes(
                    sources[entry.file], entry.start, entry.bytes, self.file.number, self.start
                )
            return _Result()
        C = part.covariance
        total, at = math.prod(part.shape), self.start
        share = 1.0 if C is not None else min(1.0, _MEASURED / max(1, total))
        lora = part.lora if part.lora is not None and part.lora.magnitude is None else None
        norm, bound = (0.0, math.inf) if lora is None else delta_norm(lora)
        looked_at = may_overflow(part, bound)
        noise = change = measured = largest = noise_out = change_out = 0.0
        for rounded, exact, before in blocks(part, sources, scratch, share, self.for_inputs):
            if looked_at and not all_finite(rounded):
                largest = max(largest, rounded.abs().max().item()) or math.nan
            with self.file.turn:
                write_bytes(self.file.number, memory(rounded), at)
            at += rounded.numel() * rounded.element_size()
            if C is not None:
                noise_out += _through(C, exact - rounded, part.transposed)
                change_out += _through(C, exact - before, part.transposed)
            if part.changed and len(exact):
                noise += _square(exact - rounded[: len(exact)])
                change += _square(exact - before)
                measured += exact.numel()
        dtype = DTYPES[part.dtype]
        not_finite = f"{part.name} (largest value {largest:.3g}, {dtype})" if largest else ""
        if not (largest or math.isfinite(noise)):
            not_finite = f"{part.name} (the base's own are not)"
        if not part.changed:
            return _Result(None, not_finite)
        if lora is None:
            norm = math.sqrt(change * total / measured) if measured else 0.0
        cost = math.sqrt(noise * total / measured) / norm if norm else 0.0
        name = str(dtype).removeprefix("torch.")
        outputs = None if C is None else math.sqrt(noise_out / change_out) if change_out else 0.0
        return _Result(Rounding(part.in_model, name, cost, norm, outputs), not_finite)


def may_overflow(part: Part, bound: float) -> bool:
    """Whether finite weights may become infinite, so that each of them is to be looked at.

    bound: no entry of ΔW is larger. Where W keeps its dtype, they cannot if that is less than half a unit in the last
    place of the dtype's largest number.
    """
    if not isinstance(part.source, Entry) or part.source.dtype != part.dtype:
        return True
    limits = torch.finfo(DTYPES[part.dtype])
    return part.covariance is not None or not bound < limits.max * limits.eps / 8


def _square(values: Tensor) -> float:
    flat = values.view(-1)
    return torch.dot(flat, flat).item()


def _through(C: Tensor, E: Tensor, transposed: bool) -> float:
    """The mean of ‖E·x‖² over inputs with the covariance C."""
    E = E.T if transposed else E
    return max(0.0, ((E @ C.to(E.dtype)) * E).sum().item())


def _bytes(shape: Sequence[int], part: Part) -> int:
    if part.copied:
        assert isinstance(part.source, Entry)
        return part.source.bytes
    return math.prod(shape) * DTYPES[part.dtype].itemsize


@contextmanager
def one_thread_each() -> Iterator[int]:
    """As many workers as torch would use threads; within each, and meanwhile everywhere, torch uses one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield max(1, min(threads, _WORKERS))
    finally:
        torch.set_num_threads(threads)


def write_index(folder: Path, layouts: Mapping[str, Layout]) -> None:
    """Which file holds which tensor, where there are several files."""
    if len(layouts) == 1:
        return
    size = sum(place.bytes - len(place.head) for place in layouts.values())
    places = {name: file for file, place in layouts.items() for name in place.start}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
