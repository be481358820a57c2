"""Base and adapter as one model folder that transformers loads without us."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.adapter_file import Adapter
from lowrank.errors import MergeError
from lowrank.expected import Change, changes, loss, transposed_weights
from lowrank.log import logger
from lowrank.lora import Lora, all_finite
from lowrank.merge_files import Rounding, one_thread_each, write_files
from lowrank.merge_plan import MergePlan, NeedsModel, merge_plan
from lowrank.model_files import file_of, stored_tensors
from lowrank.model_folder import (
    ONTO_KEY,
    ROUNDING_KEY,
    NoSkeletonError,
    base_of,
    dequantised,
    is_tied,
    load_base,
    load_config,
    load_skeleton,
    quantised_by,
    quiet,
    task_of,
)
from lowrank.new_folder import GENERATION, check_out, complete_folder, copy_rest
from lowrank.quantisation import Quantisation
from lowrank.quantised_base import (
    METADATA_KEY,
    in_words,
    is_loftq,
    loftq_less,
    on_quantised,
    remade,
    round_weights,
    to_json,
    trained_on,
)
from lowrank.quantising import quantisable
from lowrank.unload import say_untied
from lowrank.verify.candidates import compare_candidates
from lowrank.verify.inputs import Example
from lowrank.verify.result import DEQUANTISED, ONTO, ORIGINAL, Candidates

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MergedFolder:
    """What `merge_to_folder` wrote."""

    path: str
    base: str
    adapter: str
    task: str  # a task_type, "CAUSAL_LM"
    dtype: str  # of the adapted weights, "bfloat16"
    total_bytes: int
    untied: bool  # the base's one embedding is two tensors now, input and output
    tokenizer: str | None  # the folder its tokenizer came from; None: neither has one
    rounding: list[Rounding]  # every changed tensor, the costliest first
    overall_rounding: float  # as Rounding.loss, over all of them together
    rounding_for: str = "entries"  # or "inputs"
    built: str | None = None  # why the whole model had to be loaded; None: its files were streamed
    onto: str | None = None  # "dequantised" or "original" where a quantised base is in play
    why: str = ""  # that one
    candidates: Candidates | None = (
        None  # both, measured; None where the caller or the base left no choice
    )


def merge_to_folder(
    base: str | Path | None,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    covariances: Mapping[str, Tensor] | None = None,
    onto: str | None = None,
    inputs: Sequence[str | Example] | None = None,
    trained_on: Quantisation | None = None,
) -> MergedFolder:
    """Write base + adapter as one model folder, for transformers and whoever reads its format.

    The base's safetensors files are streamed, block by block, into files of the same names; the model is never
    loaded. Where files alone do not say enough (other formats, weights stored in another form than the model's),
    it is, in float32; the log and the result's `built` then say why.

    base: a folder or a name on the Hub; None takes `base_model_name_or_path` from the adapter.
    dtype: "float32", "bfloat16" or "float16"; None keeps the base's, tensor by tensor. The sum is
    taken in float32 (float64 for float32) and rounded once; what that costs is in the result. The tokenizer comes
    from the adapter's folder if one is saved there, else from the base's.
    covariances: of the inputs of the adapted linear layers, as `merge_inputs.input_covariances` gives them. Their
    weights are then rounded down or up, to 16 bits, so that W′x stays near the exact one for such x; every entry is
    within one unit in the last place, but by `Rounding.loss` alone this looks worse than rounding to the nearest.
    onto: for an adapter trained on a quantised base, the weights that ΔW goes onto: "dequantised" (what the quantised
    ones stand for, as training saw them) or "original" (those of `base`, in 16 or 32 bits). None measures both on
    `inputs` (those of `verify`), which loads the base in float32, and writes the one with the lower loss: the result's
    `candidates` and `why`. A base that is stored quantised is always dequantised.
    trained_on: how the base was quantised in training, all layers but the output head, for an adapter whose file does
    not say so: one that PEFT wrote.
    `out` appears when it is complete, in one rename. Raises MergeError if `out` exists and is not
    empty (unless `overwrite`), if a merged weight overflows its dtype (or the base's own are seen not to be finite),
    or if the layers cannot be merged.
    """
    from lowrank.adapter_file import read_adapter

    target = _as_dtype(dtype)
    out = Path(out)
    check_out(out, [base, adapter], overwrite)
    file = read_adapter(adapter)
    base = base_of(file.config, base)
    revision = getattr(file.config, "revision", None)
    task = task_of(base, file.config.task_type, revision)
    job = _Job(str(base), str(adapter), file, task, revision, target, covariances or {})
    job = _with_onto(job, onto, inputs, trained_on)

    with complete_folder(out) as folder:
        try:
            with one_thread_each() as workers:
                written, built = _streamed(job, folder, workers), None
        except NeedsModel as reason:
            built = str(reason)
            if covariances:
                raise MergeError(
                    f"Rounding for inputs works on files alone, and {reason}."
                ) from reason
            logger.warning("%s: loading the whole model to merge, since %s.", base, reason)
            for rest in folder.iterdir():
                rest.unlink()
            written = _in_model(job, folder)
        tokenizers = ((job.adapter, None), (job.base, job.revision))
        tokenizer = copy_rest(folder, job.base, job.revision, tokenizers)
    rounding = sorted(written.rounding, key=lambda row: -row.loss)
    change = sum(row.change**2 for row in rounding)
    noise = sum((row.loss * row.change) ** 2 for row in rounding)
    return MergedFolder(
        path=str(out),
        base=str(base),
        adapter=str(adapter),
        task=task,
        dtype=rounding[0].dtype if rounding else written.dtype,
        total_bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        untied=written.untied,
        tokenizer=tokenizer,
        rounding=rounding,
        overall_rounding=(noise / change) ** 0.5 if change else 0.0,
        rounding_for="inputs" if covariances else "entries",
        built=built,
        onto=job.onto,
        why=job.why,
        candidates=job.candidates,
    )


class _Job(NamedTuple):
    base: str
    adapter: str
    file: Adapter
    task: str
    revision: str | None
    dtype: torch.dtype | None
    covariances: Mapping[str, Tensor]
    onto: str | None = None
    why: str = ""
    candidates: Candidates | None = None
    loftq: bool = (
        False  # `file` is an ordinary LoRA on the quantised weights; in its folder it is LoftQ's
    )
    less: Mapping[
        str, Lora
    ] = {}  # by path, what LoftQ took out of the weights before it rounded them
    trained_on: Mapping[str, Quantisation] = {}  # by path, of a base that is not stored so

    @property
    def rounding(self) -> Mapping[str, Quantisation]:
        """The layers whose weights are rounded before ΔW is added."""
        return self.trained_on if self.onto == DEQUANTISED else {}


class _Written(NamedTuple):
    rounding: list[Rounding]
    dtype: str
    untied: bool


def _with_onto(
    job: _Job,
    onto: str | None,
    inputs: Sequence[str | Example] | None,
    told: Quantisation | None,
) -> _Job:
    """The job with the weights that ΔW goes onto, chosen by measuring where nobody said it."""
    if onto not in (None, *ONTO):
        raise MergeError(f"onto={onto!r} is none of: {', '.join(ONTO)}.")
    layers = trained_on(job.file)
    if told is not None:
        named = {one.rounding for one in layers.values()}
        if named - {told.rounding}:
            raise MergeError(
                f"trained_on={told}: {job.adapter} says that its base was quantised to {in_words(layers)}. Leave it out."
            )
        layers = layers or dict.fromkeys(_quantisable(job), told)
    if quantised_by(load_config(job.base, job.revision)) is not None:
        if onto not in (None, DEQUANTISED):
            raise MergeError(
                f"{job.base} is stored quantised: the original weights are not in it. Name the base in 16 bits."
            )
        return job._replace(onto=DEQUANTISED, why="the base is stored quantised")
    if not layers:
        if onto is not None:
            raise MergeError(
                f"onto={onto!r}: {job.adapter} does not say that it was trained on a quantised base. Leave it out, "
                "or say how that was quantised: trained_on=…, --trained-on."
            )
        return job
    job = job._replace(trained_on=layers)
    if is_loftq(job.file):
        if onto not in (None, DEQUANTISED):
            raise MergeError(
                f"{job.adapter} was started with LoftQ: its ΔW makes up for the quantisation, and on the original "
                "weights it would count twice. Leave onto out."
            )
        why = "LoftQ's adapter makes up for the quantisation"
        less = loftq_less(job.file)
        job = job._replace(file=on_quantised(job.file), loftq=True, less=less)
        return job._replace(onto=DEQUANTISED, why=why)
    if not remade(layers):
        cannot = f"the weights quantised to {in_words(layers)} cannot be made from the original ones here"
        if onto == DEQUANTISED:
            raise MergeError(
                f"onto={onto!r}: {cannot}. Load that base in Python and merge_and_unload() there, or merge onto the "
                "original weights."
            )
        return job._replace(onto=ORIGINAL, why=f"{cannot}, to measure both")
    if onto is not None:
        return job._replace(onto=onto, why="as asked for")
    try:  # whatever does not fit is said before models are loaded
        dtype = _planned(job).plan.dtype
    except NeedsModel:
        dtype = str(job.dtype or load_config(job.base, job.revision).dtype or torch.float32)
    dtype = dtype.removeprefix("torch.")
    found = compare_candidates(
        job.base, job.adapter, job.file, layers, job.task, DTYPES[dtype], inputs
    )
    return job._replace(onto=found.onto, why=found.why, candidates=found)


def _quantisable(job: _Job) -> list[str]:
    """The layers that loading the base in few bits quantises."""
    return quantisable(load_skeleton(job.base, job.task, job.file.tensors, job.revision, True))


class _Planned(NamedTuple):
    model: Any  # on the meta device
    plan: MergePlan
    metadata: dict[str, dict[str, str]]


def _planned(job: _Job) -> _Planned:
    """What there is to write. Raises NeedsModel."""
    try:
        model = load_skeleton(
            job.base,
            job.task,
            job.file.tensors,
            job.revision,
            dequantised=True,
            metadata=job.file.metadata,
        )
    except NoSkeletonError as error:
        raise NeedsModel(str(error)) from error
    stored = stored_tensors(job.base, job.revision)
    if stored is None:
        raise NeedsModel("the base has no safetensors files")
    tensors = dequantised(stored, model)
    plan = merge_plan(model, tensors, job.file, job.adapter, job.dtype, job.rounding, job.less)
    return _Planned(model, plan, stored.metadata)


def _streamed(job: _Job, folder: Path, workers: int) -> _Written:
    """The base's files with the adapter in them. Raises NeedsModel."""
    model, plan, metadata = _planned(job)
    if plan.untied:
        say_untied(model)
    notes = {}
    if job.covariances:
        plan = _with_covariances(plan, job.covariances)
        notes[ROUNDING_KEY] = "inputs"
    if job.onto:
        notes[ONTO_KEY] = json.dumps({"onto": job.onto, METADATA_KEY: to_json(job.trained_on)})
    metadata = {name: {**metadata[name], **notes} for name in plan.files}
    rounding = write_files(plan, metadata, folder, workers, for_inputs=bool(job.covariances))
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = plan.dtype if job.dtype or config.dtype is None else config.dtype
    with quiet():
        config.save_pretrained(folder)
        if model.can_generate() and file_of(job.base, GENERATION, job.revision) is None:
            model.generation_config.save_pretrained(folder)
    return _Written(rounding, plan.dtype, plan.untied)


def _with_covariances(plan: MergePlan, covariances: Mapping[str, Tensor]) -> MergePlan:
    left = dict(covariances)
    files = {
        file: [
            part._replace(covariance=left.pop(part.in_model.removesuffix(".weight"), None))
            if part.lora is not None
            else part
            for part in parts
        ]
        for file, parts in plan.files.items()
    }
    if left:
        raise MergeError(f"covariances of what is no adapted layer: {', '.join(sorted(left)[:5])}.")
    return plan._replace(files=files)


def _in_model(job: _Job, folder: Path) -> _Written:
    """The model in float32, merged and saved."""
    from lowrank.peft import PeftModel

    if job.loftq:
        raise MergeError(
            f"{job.adapter} was started with LoftQ, and its base's files cannot be streamed. Load it in Python, and "
            "merge_and_unload()."
        )
    model: Any = load_base(
        job.base, job.task, job.file.tensors, revision=job.revision, metadata=job.file.metadata
    ).model
    tied = is_tied(model)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if job.dtype is not None:
        main = model.dtype  # tensors that the base keeps in another (float32 norms) stay in theirs
        dtypes = {name: job.dtype if was == main else was for name, was in dtypes.items()}
    model.float()
    round_weights(model, job.rounding)
    rounding = _rounding(
        changes(
            model.state_dict(),
            job.file.tensors,
            job.file.config,
            transposed_weights(model),
            job.file.start,
        ),
        dtypes,
    )
    with quiet():
        model = PeftModel.from_pretrained(model, job.adapter).merge_and_unload()
    _cast(model, dtypes)
    if file_of(job.base, GENERATION, job.revision) is not None:
        # the base's own is copied: saving would refuse one that transformers finds inconsistent
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig()
    with quiet():
        model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors writes them for the owner alone
        shutil.copymode(folder / "config.json", weights)
    dtype = str(job.dtype or model.dtype).removeprefix("torch.")
    return _Written(rounding, dtype, bool(tied) and not is_tied(model))


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise MergeError(
        f"dtype={dtype!r} is none that a merge can be written in: {', '.join(DTYPES)}."
    )


def _rounding(all_changes: Iterable[Change], dtypes: Mapping[str, torch.dtype]) -> list[Rounding]:
    rows = []
    for change in all_changes:
        dtype = dtypes[change.name]
        cost = loss(change.after.to(dtype), change)
        name = str(dtype).removeprefix("torch.")
        rows.append(Rounding(change.name, name, cost.rounding, cost.change_norm))
    return rows


@torch.no_grad()
def _cast(model: torch.nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round every tensor, in place, to its dtype; tied ones stay tied."""
    lost = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        rounded = tensor.data.to(dtypes.get(name, tensor.dtype))
        if not all_finite(rounded):
            lost.append(f"{name} (largest value {tensor.data.abs().max():.3g}, {rounded.dtype})")
        tensor.data = rounded
    if lost:
        raise MergeError(
            "These merged weights are not finite:\n  "
            + "\n  ".join(lost[:10])
            + "\nIf the dtype is too narrow for them, merge in float32: --dtype float32."
        )
