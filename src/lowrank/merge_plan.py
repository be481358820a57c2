"""What a merged model's files will hold, tensor by tensor, decided from headers and a model without weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.adapter_file import Adapter
from lowrank.adapter_layers import AdapterLayer, read_layers
from lowrank.bases import stores
from lowrank.bases.kinds import kind_of
from lowrank.errors import AdapterMismatchError, listed
from lowrank.fingerprint import Sample, check_samples, sample_of, sample_places
from lowrank.lora import Lora
from lowrank.model_folder import embedding_names
from lowrank.quantisation import Quantisation
from lowrank.quantised_files import AnyEntry, DequantisedEntry, rounded_entry
from lowrank.start_factors import start_problems
from lowrank.tensor_files import NAMES, Entry
from lowrank.unload import refuse_to_untie

# fields of a configuration whose meaning is in the modules, not in the weights
_IN_MODULES = (
    *("target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens"),
    *("ensure_weight_tying", "use_bdlora", "use_qalora", "megatron_config", "arrow_config"),
)  # fmt: skip


class NeedsModel(Exception):
    """Why this merge cannot be done on the files alone."""


class Part(NamedTuple):
    """One tensor of the merged model and what it is made of."""

    name: str  # in the file that is written
    in_model: str  # in the model's state dict
    source: AnyEntry | Tensor
    dtype: str  # the file's name of it, "BF16"
    lora: Lora | None = None  # with factors in float32 or wider
    transposed: bool = False  # the source is (in, out)
    add: Tensor | None = None  # a change that is known itself, as a bias has it
    covariance: Tensor | None = None  # of the layer's inputs, (in, in)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def changed(self) -> bool:
        return self.lora is not None or self.add is not None

    @property
    def copied(self) -> bool:
        """Byte for byte what is in the base's file."""
        return (
            isinstance(self.source, Entry) and not self.changed and self.source.dtype == self.dtype
        )


class MergePlan(NamedTuple):
    files: dict[str, list[Part]]  # by the name of the file to write
    dtype: str  # of the model, "bfloat16"
    untied: bool


def merge_plan(
    model: Any,
    stored: Mapping[str, AnyEntry],
    adapter: Adapter,
    where: str,
    dtype: torch.dtype | None,
    rounding: Mapping[str, Quantisation] | None = None,
    less: Mapping[str, Lora] | None = None,
) -> MergePlan:
    """Where each tensor of base + adapter comes from and goes to. Reads nothing large.

    model: the base on the meta device, as large as the adapter wants it; its config says afterwards whether
    the embeddings are tied. stored: the base's tensors by their names in the files. where: the adapter's, for
    errors. dtype: what tensors in the base's own dtype become; None keeps them. rounding: by path, the layers of a
    base in 16 or 32 bits whose weights are to be those of its quantised form; less: what is taken out of them before.
    Raises NeedsModel; AdapterMismatchError, BaseMismatchError, MergeError as merging in the model would.
    """
    _check_config(adapter.config)
    problems = start_problems(adapter, "the adapter")
    if problems:
        raise NeedsModel(problems[0])
    names, verbatim = names_in_model(model, stored)
    params = model.state_dict(keep_vars=True)
    on_disk = {name: key for key, name in names.items()}
    layers, saved = _adapter(model, params, adapter, where)
    biases = {_bias(name) for name, layer in layers.items() if layer.lora.bias is not None}
    touched = {*saved, *layers, *biases}
    unclear = sorted(touched & set(verbatim.values()))
    if unclear:
        raise NeedsModel(f"{unclear[0]} is stored in another form than the model holds it in")
    _check_base(adapter, layers, on_disk, stored, saved, where)
    stored = {**stored, **_rounded(model, on_disk, stored, rounding or {}, less or {})}

    modules = tuple(f".{name}." for name in adapter.config.modules_to_save or ())
    own = {name for name in saved if any(module in f".{name}" for module in modules)}
    sources, untied = _sources(
        model, params, on_disk, stored, saved, own, own | {*layers} | biases, set(verbatim.values())
    )

    main = _main_dtype(stored.values())
    outer = _outer_names(model, names)
    files: dict[str, list[Part]] = {}
    last = next(reversed([*{entry.file.name: None for entry in stored.values()}]))
    for key, entry in stored.items():
        name = names.get(key)
        if key in verbatim or name is None:
            if key in verbatim or _ignored(model, key):
                part = Part(key, key, entry, _dtype(entry, main, dtype))
                files.setdefault(entry.file.name, []).append(part)
            continue
        if name in sources:
            part = _part(outer[key], name, *sources.pop(name), layers, main, dtype)
            files.setdefault(entry.file.name, []).append(part)
    for name, (source, like) in sources.items():
        files.setdefault(last, []).append(_part(name, name, source, like, layers, main, dtype))
    return MergePlan(files, str(dtype or main).removeprefix("torch."), untied)


# --- what is there --------------------------------------------------------------------------------


def _check_config(config: Any) -> None:
    for field in _IN_MODULES:
        if getattr(config, field, None):
            raise NeedsModel(f"the adapter uses {field}")


def names_in_model(
    model: Any, stored: Mapping[str, AnyEntry]
) -> tuple[dict[str, str], dict[str, str]]:
    """By the name in the files, the name in the model, of tensors held in both in one form; and of others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [row for row in mapping if isinstance(row, WeightRenaming)]
    converters = [row for row in mapping if isinstance(row, WeightConverter)]
    params = model.state_dict()
    names: dict[str, str] = {}
    found: set[str] = set()  # their values
    converted: dict[str, str] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, converter = rename_source_key(
            key, renamings, converters, model.base_model_prefix, params
        )
        if name not in params:
            continue
        if converter is not None:
            converted[key] = name
        elif name in found:
            raise NeedsModel(f"two tensors of the base's files are the model's {name}")
        else:
            names[key] = name
            found.add(name)
    return names, converted


def _outer_names(model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """What to call each tensor: as the base's files do, but with the prefix of the model around the base model.

    A head beside names without it is read wrongly by some programs.
    """
    prefix = f"{model.base_model_prefix}."
    bare = any(name == prefix + key for key, name in names.items())
    return {key: name if bare and name.endswith(key) else key for key, name in names.items()}


def _ignored(model: Any, key: str) -> bool:
    """Whether the model says that it has no use for this tensor, which other programs may have."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, key) for pattern in patterns)


class _Layer(NamedTuple):
    lora: Lora
    transposed: bool


def _adapter(
    model: nn.Module, params: Mapping[str, Tensor], adapter: Adapter, where: str
) -> tuple[dict[str, _Layer], dict[str, Tensor]]:
    """By the weight's name: the LoRA there, and the tensors that the file holds whole."""
    read = read_layers(adapter)
    modules = dict(model.named_modules())
    layers: dict[str, _Layer] = {}
    strangers, problems = [], list(read.problems)
    for path, layer in read.layers.items():
        module = modules.get(path)
        parent = modules.get(path.rpartition(".")[0])
        kind = module and kind_of(module, bool(adapter.config.fan_in_fan_out), parent)
        if not kind:
            strangers.append(path)
            continue
        name = f"{path}.{kind.weight}"
        transposed = kind.hold is stores.transposed
        W = params[name].T if transposed else params[name].flatten(1)
        if W.shape != (layer.B.shape[0], math.prod(layer.A.shape[1:])):
            problems.append(
                f"{path}: A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)} in the file, the base's weight "
                f"is {tuple(W.shape)} as (out, in)"
            )
            continue
        if layer.bias is not None and _bias(name) not in params:
            problems.append(
                f"{path} has a trained lora_B bias, the base's layer no bias to merge it into"
            )
        layers[name] = _Layer(_matrices(layer), transposed)
    saved = {}
    for key, tensor in read.rest.items():
        if ".original_module." in key or ".modules_to_save." in key:
            continue  # with bias="all" PEFT writes these beside the same tensor under its proper key
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name not in params:
            strangers.append(key)
        elif params[name].shape != tensor.shape:
            problems.append(
                f"{name} is {tuple(tensor.shape)} in the file, {tuple(params[name].shape)} in the base"
            )
        saved[name] = tensor
    if strangers:
        problems.append(
            f"{len(strangers)} of its entries belong to nothing in {type(model).__name__}: "
            + ", ".join(sorted(strangers)[:20])
        )
    if problems:
        raise AdapterMismatchError(
            f"{where} does not fit this base. {listed(problems)}\n"
            "Was the adapter trained on it, and for this task?"
        )
    return layers, saved


def _matrices(layer: AdapterLayer) -> Lora:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    magnitude, bias = (None if t is None else wide(t) for t in (layer.magnitude, layer.bias))
    A, B = wide(layer.A.flatten(1)), wide(layer.B.flatten(1))
    return Lora(A, B, layer.scaling, magnitude, bias)


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _check_base(
    adapter: Adapter,
    layers: Mapping[str, _Layer],
    on_disk: Mapping[str, str],
    stored: Mapping[str, AnyEntry],
    saved: Mapping[str, Tensor],
    where: str,
) -> None:
    """The fingerprint in the adapter's file against the entries on disk."""
    fingerprint = adapter.metadata.get("base")
    weights = {}
    for name, layer in layers.items() if fingerprint else ():
        if name in saved or name not in on_disk:
            continue
        entry = stored[on_disk[name]]
        out, in_ = layer.lora.B.shape[0], layer.lora.A.shape[1]
        rows, columns = sample_places(out, in_)
        flat = columns * out + rows if layer.transposed else rows * in_ + columns
        path = name.removesuffix(".weight").removesuffix(".in_proj_weight")
        if isinstance(entry, DequantisedEntry):
            W = entry.read().view(in_, out).T if layer.transposed else entry.read().view(out, in_)
            weights[path] = sample_of(W, entry.quantisation)
        else:
            weights[path] = Sample((out, in_), entry.entries(flat.tolist()))
    check_samples(fingerprint, weights, where, "this one", adapter.config.base_model_name_or_path)


def _rounded(
    model: nn.Module,
    on_disk: Mapping[str, str],
    stored: Mapping[str, AnyEntry],
    rounding: Mapping[str, Quantisation],
    less: Mapping[str, Lora],
) -> dict[str, AnyEntry]:
    """By the name in the files, the weights of the layers in `rounding`."""
    modules = dict(model.named_modules())
    strangers = [path for path in rounding if path not in modules]
    if strangers:
        raise AdapterMismatchError(
            f"The adapter's file names {len(strangers)} quantised layers that {type(model).__name__} does not have: "
            + ", ".join(strangers[:5])
        )
    found: dict[str, AnyEntry] = {}
    for path, quantisation in rounding.items():
        key = on_disk.get(f"{path}.weight")
        entry = stored[key] if key else None
        if key is None or not isinstance(entry, Entry):
            raise NeedsModel(f"{path}.weight is not in the base's files as the model holds it")
        transposed = type(modules[path]).__name__ == "Conv1D"
        found[key] = rounded_entry(entry, quantisation, transposed, less.get(path))
    return found


# --- what goes where ------------------------------------------------------------------------------


def _groups(params: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor of the model: several where it is tied."""
    found: dict[int, list[str]] = {}
    for name, param in params.items():
        found.setdefault(id(param), []).append(name)
    return list(found.values())


def _sources(
    model: Any,
    params: Mapping[str, Tensor],
    on_disk: Mapping[str, str],
    stored: Mapping[str, AnyEntry],
    saved: Mapping[str, Tensor],
    own: set[str],
    alone: set[str],
    covered: set[str],
) -> tuple[dict[str, tuple[AnyEntry | Tensor, AnyEntry | None]], bool]:
    """By name in the model, what each tensor to be written starts from and the base's; and whether a tie comes apart.

    saved: what the adapter holds whole. own: those of modules_to_save, which stand alone; the others stay tied
    as the base's are. alone: all that changes without what it is tied to. covered: names to leave out.
    """
    groups = _groups(params)
    apart = [group for group in groups if len(group) > 1 and not alone.isdisjoint(group)]
    pair = set(embedding_names(model) or ())
    for group in apart:
        if not pair or not pair <= set(group):
            raise NeedsModel(f"{group[0]} is tied to {group[1]}, and one of them changes alone")
        refuse_to_untie(model)
    found: dict[str, tuple[AnyEntry | Tensor, AnyEntry | None]] = {}
    for group in groups:
        if not covered.isdisjoint(group):
            continue
        there = [name for name in group if name in on_disk]
        _check_one(there, on_disk, stored)
        base = stored[on_disk[there[0]]] if there else None
        shared = next((saved[n] for n in group if n in saved and n not in own), base)
        for name in group if apart else (there or group)[:1]:
            # a LoRA may stand on a tensor that the file has whole, a resized vocabulary
            source = saved.get(name, shared)
            if source is None:
                raise NeedsModel(f"neither the base's files nor the adapter's have {name}")
            if tuple(source.shape) != tuple(params[name].shape):
                raise NeedsModel(
                    f"{name} is {tuple(source.shape)} in the files, {tuple(params[name].shape)} in the model"
                )
            found[name] = source, base
    return found, bool(apart)


def _check_one(
    there: list[str], on_disk: Mapping[str, str], stored: Mapping[str, AnyEntry]
) -> None:
    """Raises NeedsModel if what the model ties is two different tensors in the files."""
    if len(there) > 1:
        first, *others = (stored[on_disk[name]].read() for name in there)
        if any(first.dtype != other.dtype or not torch.equal(first, other) for other in others):
            raise NeedsModel(
                f"{there[0]} and {there[1]} should be one tensor, and the files have two"
            )


def _part(
    key: str,
    name: str,
    source: AnyEntry | Tensor,
    base: AnyEntry | None,
    layers: Mapping[str, _Layer],
    main: torch.dtype,
    wanted: torch.dtype | None,
) -> Part:
    # what the adapter saved whole is in float32 as a rule, whatever the base is in
    dtype = _dtype(base, main, wanted) if base is not None else NAMES[wanted or main]
    if name in layers:
        lora, transposed = layers[name]
        return Part(key, name, source, dtype, lora, transposed)
    owner = layers.get(name.removesuffix("bias") + "weight")
    if name.endswith("bias") and owner is not None and owner.lora.bias is not None:
        return Part(key, name, source, dtype, add=owner.lora.bias * owner.lora.scaling)
    return Part(key, name, source, dtype)


def _main_dtype(stored: Iterable[AnyEntry]) -> torch.dtype:
    """The dtype that most of the base's numbers have."""
    sizes: dict[torch.dtype, int] = {}
    for entry in stored:
        if entry.floating:
            dtype = entry.torch_dtype
            assert dtype is not None
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(entry.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _dtype(base: AnyEntry, main: torch.dtype, wanted: torch.dtype | None) -> str:
    """The dtype to write: a tensor that the base keeps in another than most stays in its own."""
    return NAMES[wanted] if wanted is not None and base.torch_dtype == main else base.dtype
