"""A model folder in few bits, in the form that transformers and bitsandbytes load; and what that costs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.errors import QuantisationError
from lowrank.merge_files import write_index
from lowrank.merge_plan import names_in_model
from lowrank.model_files import stored_tensors
from lowrank.model_folder import (
    TASKS,
    load_base,
    load_config,
    load_skeleton,
    quantised_by,
    quiet,
    task_of,
)
from lowrank.new_folder import check_out, complete_folder, copy_rest
from lowrank.quantisation import Quantisation
from lowrank.quantising import quantisable
from lowrank.tensor_files import (
    NAMES,
    Entry,
    Layout,
    copy_bytes,
    created,
    layout,
    memory,
    opened,
    write_bytes,
)
from lowrank.verify import probe
from lowrank.verify.inputs import Example, Inputs, inputs_for
from lowrank.verify.outputs import losses, mean_difference


@dataclass(frozen=True)
class QuantisedWeight:
    name: str
    error: float  # ‖Q − W‖ / ‖W‖


@dataclass(frozen=True)
class QuantisedFolder:
    """What `quantise_folder` wrote."""

    path: str
    base: str
    quantisation: str  # in words
    total_bytes: int  # of the safetensors files
    base_bytes: int
    kept: list[str]  # linear layers that stay as they are
    weights: list[QuantisedWeight]  # the worst first
    error: float  # over all of them together
    tokenizer: str | None
    # nats a supervised token on the given rows; None where there are none
    loss_base: float | None = None
    loss: float | None = None
    loss_error: float | None = None  # the standard error of their difference, over the rows
    tokens: int = 0


@torch.no_grad()
def quantise_folder(
    model: str | Path,
    out: str | Path,
    quantisation: Quantisation,
    *,
    skip: Sequence[str] | None = None,
    overwrite: bool = False,
    inputs: Sequence[str | Example] | None = None,
) -> QuantisedFolder:
    """Write a model folder with its linear layers in few bits, as bitsandbytes stores them, and all that lies beside.

    quantisation: "nf4", "fp4" or "int8". skip: names of layers that stay (None: the output head, as transformers
    does). One weight at a time is in memory. inputs: rows with "input_ids" and "labels"; with them both models are
    loaded in float32, one after the other, and their losses are in the result.
    Raises MergeError if `out` exists, QuantisationError for a model that is quantised or has no safetensors files.
    """
    model, out = str(model), Path(out)
    check_out(out, [model], overwrite)
    by = quantised_by(load_config(model))
    if by is not None:
        raise QuantisationError(f"{model} is quantised already ({by}). Name the model in 16 bits.")
    task = task_of(model, None)
    skeleton = load_skeleton(model, task, {})
    stored = stored_tensors(model)
    if stored is None:
        raise QuantisationError(
            f"{model} has no safetensors files; save it once with transformers."
        )
    names, _ = names_in_model(skeleton, stored.tensors)
    job = _Job(skeleton, {f"{path}.weight" for path in quantisable(skeleton, skip)}, quantisation)
    if not job.weights:
        raise QuantisationError(
            f"{model} has no linear layer to quantise{' but those to skip' if skip else ''}."
        )
    files: dict[str, list[tuple[str, Entry]]] = {}
    for key, entry in stored.tensors.items():
        files.setdefault(entry.file.name, []).append((names.get(key, key), entry))
    with complete_folder(out) as folder:
        layouts = {}
        for file, entries in files.items():
            with tempfile.TemporaryFile(dir=folder) as scratch:
                rows = list(job.rows(entries, scratch.fileno()))
                layouts[file] = _write(folder / file, rows, stored.metadata[file])
        write_index(folder, layouts)
        _write_config(job, folder)
        tokenizer = copy_rest(folder, model, None, [(model, None)])
    norm, off = (math.sqrt(sum(sizes[i] for sizes in job.sizes.values())) for i in (0, 1))
    weights = [
        QuantisedWeight(name, math.sqrt(off / norm) if norm else 0.0)
        for name, (norm, off) in job.sizes.items()
    ]
    found = QuantisedFolder(
        path=str(out),
        base=model,
        quantisation=str(quantisation),
        total_bytes=sum(place.bytes for place in layouts.values()),
        base_bytes=stored.bytes,
        kept=job.kept,
        weights=sorted(weights, key=lambda row: -row.error),
        error=off / norm if norm else 0.0,
        tokenizer=tokenizer,
    )
    return found if inputs is None else _with_losses(found, task, inputs)


class _Row(NamedTuple):
    """A tensor of the new file, and where its bytes are now."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    source: int | Path  # a file descriptor, or a file of the base
    start: int


class _Job:
    """What is quantised, and ‖W‖² and ‖Q − W‖² of what was."""

    def __init__(self, model: Any, weights: set[str], quantisation: Quantisation):
        self.model, self.weights, self.quantisation = model, weights, quantisation
        self.sizes: dict[str, tuple[float, float]] = {}

    @property
    def kept(self) -> list[str]:
        """The linear layers that stay as they are."""
        return [
            path
            for path, module in self.model.named_modules()
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
            and f"{path}.weight" not in self.weights
        ]

    def rows(self, entries: Iterable[tuple[str, Entry]], scratch: int) -> Iterator[_Row]:
        """The tensors of one file; those that are made are written to `scratch` first."""
        at = 0
        for name, entry in entries:
            if name not in self.weights:
                yield _Row(name, entry.dtype, entry.shape, entry.bytes, entry.file, entry.start)
                continue
            for end, tensor in self.packed(name, entry).items():
                data = tensor.contiguous()
                size = data.numel() * data.element_size()
                write_bytes(scratch, memory(data), at)
                own = name.removesuffix("weight") + end
                yield _Row(own, NAMES[data.dtype], tuple(data.shape), size, scratch, at)
                at += size

    def packed(self, name: str, entry: Entry) -> dict[str, Tensor]:
        """What is stored of one weight, by its name in the layer."""
        W = entry.read()
        if type(self.model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D":
            W = W.T.contiguous()
        try:
            layer = QuantisedLinear.from_weight(W, None, self.quantisation)
        except QuantisationError as error:
            raise QuantisationError(f"{name}: {error}") from error
        W = W.float()
        self.sizes[name] = _square(W), _square(layer.dequantised() - W)
        return layer.state_dict()


def _square(values: Tensor) -> float:
    return values.square().sum(dtype=torch.float64).item()


def _write(path: Path, rows: list[_Row], metadata: Mapping[str, str]) -> Layout:
    place = layout([row[:4] for row in rows], {"format": "pt", **metadata})
    with ExitStack() as stack:
        files = {
            source: stack.enter_context(opened(source))
            for source in {row.source for row in rows}
            if isinstance(source, Path)
        }
        file = stack.enter_context(created(path, place))
        for row in rows:
            source = files[row.source] if isinstance(row.source, Path) else row.source
            copy_bytes(source, row.start, row.bytes, file, place.start[row.name])
    return place


def _write_config(job: _Job, folder: Path) -> None:
    from lowrank.quantizer import QuantizationConfig

    model, own = job.model, job.quantisation
    config = model.config
    config.architectures = [type(model).__name__]
    config.quantization_config = QuantizationConfig(
        format=own.format, double=own.double, block_size=own.block_size, skip_modules=job.kept
    ).to_dict()
    with quiet():
        config.save_pretrained(folder)


def _with_losses(
    found: QuantisedFolder, task: str, given: Sequence[str | Example]
) -> QuantisedFolder:
    def run(folder: str, inputs: Inputs | None) -> tuple[Inputs, list[tuple[float, int]]]:
        model = load_base(folder, task, {}, dtype=torch.float32).model
        inputs = inputs or inputs_for(model, task, (folder, folder), None, given)
        outputs = [probe.outputs_of(model, one, TASKS[task][1]) for one in inputs.examples]
        return inputs, losses(outputs, inputs.labels, task)

    inputs, before = run(found.base, None)
    _, after = run(found.path, inputs)
    tokens = sum(count for _, count in before)
    if not tokens:
        raise QuantisationError("The rows have no labels to take a loss on.")
    return replace(
        found,
        loss_base=sum(loss for loss, _ in before) / tokens,
        loss=sum(loss for loss, _ in after) / tokens,
        loss_error=mean_difference(before, after)[1],
        tokens=tokens,
    )
