"""Proof that a merged model folder is the same function as base + adapter.

Two independent witnesses. The tensors: every weight of the merged folder against W + ΔW, computed in
float64 from the base's and the adapter's files by code that the merge does not use. The outputs: the
merged folder, loaded by plain transformers in a process of its own, against base + adapter computed
live and unmerged, on the same inputs. What is lost is measured against what the adapter does.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lowrank.adapter_file import Adapter, save_tensors
from lowrank.errors import ModelFolderError
from lowrank.expected import Change, changes, transposed_weights
from lowrank.log import logger
from lowrank.model_files import stored_tensors
from lowrank.model_folder import (
    ONTO_KEY,
    ROUNDING_KEY,
    TASKS,
    base_of,
    embedding_names,
    is_tied,
    load_base,
    load_config,
    load_model,
    quantised_by,
    task_of,
)
from lowrank.quantisation import Quantisation
from lowrank.quantised_base import (
    METADATA_KEY,
    from_json,
    in_words,
    is_loftq,
    loftq_less,
    on_quantised,
    remade,
    round_weights,
    rounded_weight,
    trained_on,
)
from lowrank.verify import probe
from lowrank.verify.candidates import compare_candidates
from lowrank.verify.inputs import Example, Inputs, inputs_for
from lowrank.verify.outputs import compare_outputs
from lowrank.verify.result import (
    DEFAULT_TOLERANCE,
    DEQUANTISED,
    ONTO,
    ORIGINAL,
    Candidates,
    OutputCheck,
    TensorCheck,
    Verification,
    judge_onto,
    judge_outputs,
    judge_tensors,
    judge_ties,
)
from lowrank.verify.tensors import Tally, worst_first

__all__ = ["Candidates", "OutputCheck", "TensorCheck", "Verification", "verify"]


def verify(
    base: str | Path | None,
    adapter: str | Path,
    merged: str | Path,
    *,
    inputs: Sequence[str | Example] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
    candidates: Candidates | None = None,
) -> Verification:
    """Whether the folder `merged` is `base` with `adapter` merged in, with the evidence.

    base: a folder or a name on the Hub; None takes the one that the adapter's config names.
    inputs: texts, or mappings with "input_ids" and optionally "labels" (then perplexities are
    computed); None makes up texts and token ids from `seed`, among them the tokens whose embedding
    the adapter changes most.
    tolerance: how much of the adapter's effect on the outputs rounding may cost (0.1: a tenth). What
    rounding does not explain fails at any tolerance: each tensor has to hold the right W + ΔW.
    An adapter trained on a quantised base can stand on its weights dequantised or on the original ones: the folder is
    held against the one that it says (or looks like), and both are measured against what was trained, unless that
    was done already (`candidates`).
    Raises ModelFolderError and the errors of loading; a merge that is wrong is no error but a result.
    """
    from lowrank.adapter_file import read_adapter

    started = time.perf_counter()
    if not (Path(merged) / "config.json").is_file():
        raise ModelFolderError(f"{merged} is no model folder: there is no config.json in it.")
    file = read_adapter(adapter)
    base = base_of(file.config, base)
    revision = getattr(file.config, "revision", None)
    task = task_of(base, file.config.task_type, revision)
    model: Any = load_base(base, task, file.tensors, dtype=torch.float32, revision=revision).model
    names, tied = embedding_names(model), is_tied(model)

    loaded = load_model(merged, task, any_shape=True)
    notes = _notes(merged)
    onto, layers = _onto(base, revision, file, notes, model, loaded.model)
    if onto == DEQUANTISED and not is_loftq(file):  # which quantises the base when it is loaded
        round_weights(model, layers)
    weights = model.state_dict()
    if is_loftq(file):
        less = loftq_less(file)
        modules = {f"{path}.weight": model.get_submodule(path) for path in layers}
        weights |= {
            name: rounded_weight(m, layers[path], less.get(path))
            for name, m in modules.items()
            for path in [name.removesuffix(".weight")]
        }
    tally = Tally(weights, loaded.model.state_dict(), ROUNDING_KEY in notes)
    busiest: list[int] = []
    plain = on_quantised(file)
    exact = changes(weights, file.tensors, plain.config, transposed_weights(model), plain.start)
    tally.check(_note_busiest(exact, names[0] if names else None, busiest))
    tied_merged, dtype = is_tied(loaded.model), _dtype(tally.checks)
    missing = sorted({*tally.missing, *loaded.missing, *loaded.misshapen})
    unexpected = loaded.unexpected
    del loaded, tally.merged

    examples = inputs_for(model, task, (adapter, base), revision, inputs, seed, busiest)
    with _said_elsewhere() if layers else nullcontext():
        outputs, trouble = _compare(model, adapter, merged, examples, task)
    del model, weights, tally.base
    if layers and candidates is None and not is_loftq(file):
        written = getattr(torch, dtype)
        candidates = compare_candidates(base, adapter, file, layers, task, written, inputs, seed)

    reasons = judge_tensors(tally.checks, missing, unexpected)
    ties = judge_ties(tied, tied_merged, bool(names) and len(tally.changed & set(names or ())) == 1)
    said: tuple[list[str], list[str]] = ([trouble] if trouble else [], [])
    if outputs is not None:
        said = judge_outputs(outputs, dtype, tolerance, tally.rounding, tensors_right=not reasons)
    reasons += ties[0] + said[0]
    remarks = [] if candidates is None or onto is None else judge_onto(onto, candidates)
    if onto == ORIGINAL and not layers:
        remarks.append(
            f"The adapter was trained on a base quantised to {in_words(trained_on(file))}, which cannot be made again "
            "here: this is about the original weights + ΔW alone, and how far they are from training is not measured."
        )
    return Verification(
        base=str(base),
        adapter=str(adapter),
        merged=str(merged),
        task=task,
        dtype=dtype,
        passed=not reasons,
        reasons=reasons,
        warnings=ties[1] + said[1] + remarks,
        tolerance=tolerance,
        outputs=outputs,
        adapted=sum(check.role != "base" for check in tally.checks),
        untouched=sum(check.role == "base" for check in tally.checks),
        right=sum(not check.problem for check in tally.checks),
        rounding=tally.rounding,
        worst=worst_first(tally.checks),
        missing=missing,
        unexpected=unexpected,
        tied_base=tied,
        tied_merged=tied_merged,
        onto=onto,
        candidates=candidates,
        seconds=time.perf_counter() - started,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("lowrank", "torch", "transformers")},
        },
    )


def _notes(merged: str | Path) -> dict[str, str]:
    """What the merge left in the metadata of its files: how it rounded, what ΔW was added to."""
    stored = stored_tensors(merged)
    found: dict[str, str] = {}
    for metadata in stored.metadata.values() if stored else ():
        found |= metadata
    return found


def _onto(
    base: str | Path,
    revision: str | None,
    file: Adapter,
    notes: Mapping[str, str],
    model: Any,
    merged: Any,
) -> tuple[str | None, dict[str, Quantisation]]:
    """The weights that `merged` says, or looks, to be merged onto, and the layers of the base that were quantised."""
    if quantised_by(load_config(base, revision)) is not None:
        return DEQUANTISED, {}
    said = json.loads(notes.get(ONTO_KEY, "{}"))
    layers = from_json(said.get(METADATA_KEY)) or trained_on(file)
    if not layers:
        return None, {}
    if is_loftq(file):
        return DEQUANTISED, layers
    if not remade(layers):
        return ORIGINAL, {}
    onto = said.get("onto")
    return onto if onto in ONTO else _nearer(file, layers, model, merged), layers


def _nearer(file: Adapter, layers: Mapping[str, Quantisation], model: Any, merged: Any) -> str:
    """Which weights another program has merged onto: those that one adapted layer stands on."""
    weights, there = model.state_dict(), merged.state_dict()
    names = {f"{path}.weight": path for path in layers}

    def distance(of: Mapping[str, Tensor], wanted: str | None = None) -> tuple[str, float]:
        turned = transposed_weights(model)
        for change in changes(of, file.tensors, file.config, turned, file.start):
            if change.name == wanted or (wanted is None and change.name in names):
                M = there.get(change.name, torch.empty(0)).double()
                off = (M - change.after).norm().item() if M.shape == change.after.shape else 0.0
                return change.name, off
        return "", 0.0

    name, original = distance(weights)
    if not name:
        return ORIGINAL
    path = names[name]
    Q = rounded_weight(model.get_submodule(path), layers[path])
    return DEQUANTISED if distance({**weights, name: Q}, name)[1] < original else ORIGINAL


@contextmanager
def _said_elsewhere() -> Iterator[None]:
    """Without the log's lines: that the base is in another form than in training is what is measured here."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _note_busiest(
    exact: Iterator[Change], embedding: str | None, busiest: list[int]
) -> Iterator[Change]:
    """Pass the changes on, and note the tokens whose input embedding changes most."""
    for change in exact:
        if change.name == embedding:
            moved = (change.after - change.before).norm(dim=1)
            busiest += moved.topk(min(64, len(moved))).indices.tolist()
        yield change


def _dtype(checks: Sequence[TensorCheck]) -> str:
    """The dtype of most of the adapted tensors, or of all of them where none is adapted."""
    dtypes = [check.dtype for check in checks if check.role == "adapted"]
    dtypes = dtypes or [check.dtype for check in checks] or ["unknown"]
    return max(set(dtypes), key=dtypes.count)


def _compare(
    model: Any, adapter: str | Path, merged: str | Path, inputs: Inputs, task: str
) -> tuple[OutputCheck | None, str]:
    """The outputs' comparison, or why there is none. `model` gets the adapter injected."""
    from lowrank.peft import PeftModel

    fields = TASKS[task][1]
    with tempfile.TemporaryDirectory(prefix="lowrank-verify-") as name:
        job = _write_job(Path(name), merged, inputs, task)
        process = _start_probe(job)
        try:
            before = [probe.outputs_of(model, one, fields) for one in inputs.examples]
            live = PeftModel.from_pretrained(model, str(adapter)).eval()
            after = [probe.outputs_of(live, one, fields) for one in inputs.examples]
            error = process.communicate()[1]
        finally:
            process.kill()
        if process.returncode:
            last = (error.strip().splitlines() or ["no message"])[-1]
            return None, f"The merged folder cannot be run by transformers alone: {last}"
        found = [load_file(job / f"output-{i}.safetensors")["output"] for i in range(len(after))]
    shapes = {(tuple(a.shape), tuple(m.shape)) for a, m in zip(after, found, strict=True)}
    for right, wrong in sorted(shapes):
        if right != wrong:
            return None, f"The merged model gives outputs of shape {wrong}, base + adapter {right}."
    return compare_outputs(before, after, found, inputs, task, fields), ""


def _write_job(folder: Path, merged: str | Path, inputs: Inputs, task: str) -> Path:
    auto_class, fields = TASKS[task]
    save_tensors(folder / "inputs.safetensors", probe.numbered(inputs.examples), {})
    job = {
        "model": str(merged),
        "auto_class": auto_class,
        "fields": fields,
        "threads": torch.get_num_threads(),
    }
    (folder / "job.json").write_text(json.dumps(job))
    return folder


def _start_probe(job: Path) -> subprocess.Popen[str]:
    """A fresh Python that sees neither this process's classes nor (-P) the folder of probe.py."""
    return subprocess.Popen(
        [sys.executable, "-P", probe.__file__, str(job)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
