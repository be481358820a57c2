"""An adapter's tensors out of a model and into one, under the keys of PEFT's files."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.bases.bitsandbytes_layers import is_4bit
from lowrank.config import LoraConfig
from lowrank.errors import AdapterFileError, AdapterMismatchError, MergeError, did_you_mean
from lowrank.factors import with_rank
from lowrank.hub import adapter_file
from lowrank.layer import LoraLayer
from lowrank.saved_module import ModulesToSaveWrapper
from lowrank.sharded import shared_as, whole
from lowrank.trainable_tokens import TrainableTokensWrapper
from lowrank.wrappers import base_biases, inner, lora_chains, lora_layers, mergeable, wrappers

_SHOWN = 8


class LoadResult(NamedTuple):
    """What did not fit when tensors were loaded with strict=False."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def adapter_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """For every key of the adapter's file, the name of its parameter or buffer in `model`."""
    keys: dict[str, str] = {}
    chains = dict(lora_chains(model))
    for path, wrapper in wrappers(model):
        prefix = f"{path}." if path else ""
        if isinstance(wrapper, LoraLayer):
            if wrapper in chains.get(path, []):
                keys |= _layer_keys(path, chains[path], adapter_name)
        else:
            for key, name in wrapper.adapter_state_dict_load_map(adapter_name).items():
                keys[prefix + key] = prefix + name
    bias = getattr(_config(model, adapter_name), "bias", "none")
    keys.update({name: name for name in base_biases(model, bias)})
    return keys


def _layer_keys(path: str, chain: list[LoraLayer], adapter_name: str) -> dict[str, str]:
    """`adapter_keys` of one module's layers.

    In PEFT's files the parameters of one module that the adapter targets are nested in the order in which the
    module has them, the last one outermost, whatever else is adapted in the model.
    """
    places = [(layer, path + ".base_layer" * i) for i, layer in enumerate(chain)]
    order = list(chain[0].get_base_layer()._parameters)
    places = [(layer, place) for layer, place in places if adapter_name in layer.r]
    if len(places) > 1:
        places.sort(key=lambda found: order.index(found[0].kind.weight), reverse=True)
    return {
        f"{path}{'.base_layer' * depth}.{file_key(name, adapter_name)}": f"{place}.{name}"
        for depth, (layer, place) in enumerate(places)
        for name in layer.adapter_parameters(adapter_name)
    }


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, by the keys of PEFT's files; views of the parameters, sharded ones gathered.

    state_dict: the model's state, where a trainer has gathered it; else taken from the model.
    save_embedding_layers: True adds the base's input and output embeddings, "auto" does so if the
        vocabulary is not the size that the base's own configuration says.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    for _, layer in lora_layers(model):
        layer.refuse_waiting([adapter_name])
    keys = adapter_keys(model, adapter_name)
    keep = save_embedding_layers
    if keep == "auto":
        keep = _vocabulary_changed(model, _config(model, adapter_name))
    if keep:
        keys = {**{name: name for name in embedding_keys(model, adapter_name)}, **keys}
    state = {**(model.state_dict() if state_dict is None else state_dict), **_unmerged(model)}
    lost = [name for name in keys.values() if name not in state]
    if lost:
        raise AdapterMismatchError(
            f"state_dict lacks {len(lost)} of the adapter's {len(keys)} tensors: {lost[:3]}."
        )
    found = {key: whole(state[name]) for key, name in keys.items()}
    for key, (parameter, layer) in _factors(model, adapter_name, keys).items():
        found[key] = with_rank(parameter, found[key], layer.r[adapter_name], layer.experts)
    return found | tied_copies(model, found, adapter_name)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: bool = True,
) -> LoadResult:
    """Loads an adapter's tensors, by the keys of PEFT's files, into the adapter of that name.

    Each tensor takes the dtype and device of the parameter that it fills (a meta parameter: the base
    weight's device). Everything is compared first: raises AdapterMismatchError with all missing,
    unexpected and wrongly shaped tensors, and then nothing was loaded. strict=False tolerates the first
    two and returns them; ignore_mismatched_sizes tolerates the third.
    """
    del low_cpu_mem_usage  # parameters on the meta device are always filled by assignment
    keys = adapter_keys(model, adapter_name)
    tensors = {key: t for key, t in peft_model_state_dict.items() if not _redundant(key)}
    for key, (source, transposed) in tied_keys(model, adapter_name).items():
        copy = tensors.pop(key, None)
        if copy is not None and source in tensors:
            copy = copy.T if transposed else copy
            if not torch.equal(copy, tensors[source]):
                raise AdapterMismatchError(different_values(key, source))
    optional = {name: name for name in embedding_keys(model, adapter_name)}
    missing = [key for key in keys if key not in tensors]
    unexpected = [key for key in tensors if key not in keys and key not in optional]
    target = {**optional, **keys}
    parameters = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    for key, (parameter, layer) in _factors(model, adapter_name, keys).items():
        here, r = parameters[keys[key]], layer.r[adapter_name]
        if key not in tensors or tensors[key].shape == here.shape:
            continue
        if tensors[key].shape == with_rank(parameter, here, r, layer.experts).shape:
            # an adapter padded for hotswapping takes its own file back
            room = layer.room(adapter_name)
            tensors[key] = with_rank(parameter, tensors[key], room, layer.experts)
    wrong = {
        key: (tuple(tensors[key].shape), tuple(parameters[name].shape))
        for key, name in target.items()
        if key in tensors and tensors[key].shape != parameters[name].shape
    }
    if (wrong and not ignore_mismatched_sizes) or (strict and (missing or unexpected)):
        vocabulary = _vocabulary_in_file(model, target, wrong)
        raise AdapterMismatchError(_mismatch_text(keys, missing, unexpected, wrong, vocabulary))
    _check_shared(parameters, target, tensors)
    with torch.no_grad():
        for key, name in target.items():
            if key in tensors and key not in wrong:
                _fill(model, name, parameters[name], tensors[key])
    for _, layer in lora_layers(model):
        layer.waiting.pop(adapter_name, None)
    return LoadResult(missing, unexpected)


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors, unmerged, by the names that they have without adapters; views of its parameters."""
    base = _base(model)
    state = {**base.state_dict(), **_unmerged(base)}
    return {name: state[key] for name, key in _base_names(base).items()}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Loads tensors into the base, by the names that they have without adapters.

    Raises MergeError while something is merged, and AdapterMismatchError, with nothing loaded, for a
    tensor of another shape and (`strict`) for missing and unexpected ones, and for bitsandbytes' 4-bit layers,
    whose own loading leaves the scales out.
    """
    base = _base(model)
    if any(is_4bit(module) for module in base.modules()):
        raise AdapterMismatchError(
            "bitsandbytes' Linear4bit does not load its scales from a state dict: load the base with from_pretrained."
        )
    if any(layer.merged for _, layer in mergeable(base)):
        raise MergeError("The base holds merged weights: unmerge_adapter() before loading others.")
    names, present = _base_names(base), base.state_dict()
    missing = [name for name in names if name not in state_dict]
    unexpected = [name for name in state_dict if name not in names]
    wrong = {
        name: (tuple(state_dict[name].shape), tuple(present[key].shape))
        for name, key in names.items()
        if name in state_dict
        and state_dict[name].shape != present[key].shape
        and ".quant_state." not in name  # JSON, which the layer itself reads
    }
    if wrong or (strict and (missing or unexpected)):
        text = _mismatch_text(names, missing, unexpected, wrong, None)
        raise AdapterMismatchError(text.replace("This adapter does", "These tensors do", 1))
    found = {names[name]: tensor for name, tensor in state_dict.items() if name in names}
    base.load_state_dict(found, strict=False)
    return LoadResult(missing, unexpected)


def _base(model: nn.Module) -> nn.Module:
    get = getattr(type(model), "get_base_model", None)
    return get(model) if get else model


# where the base's own tensors are within each wrapper
_BASE_WITHIN = {
    LoraLayer: "base_layer.",
    ModulesToSaveWrapper: "original_module.",
    TrainableTokensWrapper: "token_adapter.base_layer.",
}


def _base_names(base: nn.Module) -> dict[str, str]:
    """For every tensor of the base, by its name without adapters, its name in the model as it is."""
    within = {path: _BASE_WITHIN[type(module)] for path, module in wrappers(base)}
    found = {}
    for key in base.state_dict():
        name = key
        for path in sorted(within, key=len, reverse=True):
            if name.startswith(f"{path}."):
                rest = name[len(path) + 1 :]
                if not rest.startswith(within[path]):
                    break  # the adapter's own
                name = f"{path}.{rest.removeprefix(within[path])}"
        else:
            found[name] = key
    return found


def _check_shared(
    parameters: Mapping[str, Tensor], target: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Of copies that share a parameter (ensure_weight_tying) a file must hold one value.

    Raises AdapterMismatchError otherwise.
    """
    first: dict[int, str] = {}
    for key, name in target.items():
        if key not in tensors or ".modules_to_save." not in name:
            continue
        other = first.setdefault(id(parameters[name]), key)
        if other != key and not torch.equal(tensors[other], tensors[key]):
            raise AdapterMismatchError(different_values(other, key))


def different_values(key: str, other: str) -> str:
    """What is wrong with a file that holds two values of what ensure_weight_tying makes one."""
    return (
        f"The file has different values for {_short(key)} and {_short(other)}, which ensure_weight_tying=True "
        "makes one tensor. To load both, set it to False in the adapter's configuration, and name both there."
    )


def tied_keys(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, bool]]:
    """For the keys that files have for what shares its embedding's adapter, the embedding's; whether it is transposed.

    PEFT's files have the factors. A magnitude beside a head's is one for each of its columns, where PEFT looks for
    one for each row and so refuses the file.
    """
    layers = {id(layer): path for path, layer in lora_layers(model)}
    found = {}
    for path, layer in lora_layers(model):
        leader = layer.leader(adapter_name)
        if leader is None:
            continue
        source, head = layers[id(leader)], layer.kind.layout is not leader.kind.layout
        keys = (
            ("lora_B.weight", "lora_A.weight") if head else ("lora_embedding_A", "lora_embedding_B")
        )
        for key, factor in zip(keys, "AB", strict=True):
            found[f"{path}.{key}"] = (f"{source}.lora_embedding_{factor}", head)
        if layer.use_dora[adapter_name]:
            m = "lora_magnitude_vector"
            found[f"{path}.{m}"] = (f"{source}.{m}", False)
    return found


def tied_copies(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str
) -> dict[str, Tensor]:
    """What files repeat of an embedding's `tensors` for those that share its adapter, by key; views."""
    return {
        key: tensors[source].T if transposed else tensors[source]
        for key, (source, transposed) in tied_keys(model, adapter_name).items()
        if source in tensors
    }


def embedding_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """The names of the base's input and output embedding tensors, unless the adapter has its own of them."""
    ours = set(adapter_keys(model, adapter_name))
    found = []
    modules = {id(module): path for path, module in model.named_modules()}
    for embedding in _embeddings(model):
        # of a module that is saved whole the adapter has its own
        module = embedding if isinstance(embedding, ModulesToSaveWrapper) else inner(embedding)
        path = modules.get(id(module))
        if path is not None:
            found += [
                f"{path}.{name}" for name in module.state_dict() if f"{path}.{name}" not in ours
            ]
    return [name for name in found if not _redundant(name)]


def _unmerged(model: nn.Module) -> dict[str, Tensor]:
    """By name, the base tensors that merges have replaced, as they were."""
    return {
        f"{path}.{name}" if path else name: tensor.detach()
        for path, layer in mergeable(model)
        for name, tensor in layer.unmerged_parameters().items()
    }


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            yield module


def _vocabulary_changed(model: nn.Module, config: LoraConfig | None) -> bool:
    """Whether the model's vocabulary differs in size from that of the base on disk or in the hub's cache."""
    now = vocab_size(model)
    before = getattr(model, "initial_vocab_size", now)
    if now is None or config is None or config.base_model_name_or_path is None:
        return now != before
    try:
        path = adapter_file(
            config.base_model_name_or_path,
            "config.json",
            required=False,
            local_files_only=True,
            revision=config.revision,
        )
    except (AdapterFileError, ImportError):
        path = None
    if path is None:
        return now != before
    values = LoraConfig.from_json_file(path)
    on_disk = values.get("vocab_size", (values.get("text_config") or {}).get("vocab_size", now))
    return now != before or now != on_disk


def vocab_size(model: nn.Module) -> int | None:
    """The size of the vocabulary in the configuration of a model, or of the language model in it."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return getattr(text() if text else config, "vocab_size", None)


def _factors(
    model: nn.Module, adapter_name: str, keys: Mapping[str, str]
) -> dict[str, tuple[str, LoraLayer]]:
    """For the file's keys that belong to a LoraLayer: the name within it, and the layer."""
    found = {
        f"{path}.{parameter}" if path else parameter: (parameter, layer)
        for path, layer in lora_layers(model)
        if adapter_name in layer.r
        for parameter in layer.adapter_parameters(adapter_name)
    }
    return {key: found[name] for key, name in keys.items() if name in found}


def _config(model: nn.Module, adapter_name: str) -> LoraConfig | None:
    return getattr(model, "peft_config", {}).get(adapter_name)


def file_key(name: str, adapter_name: str) -> str:
    """A parameter's name within its layer, as files have it: `lora_A.default.weight` -> `lora_A.weight`; PEFT's files have `lora_magnitude_vector` without `.weight`."""
    short = name.replace(f".{adapter_name}", "", 1)
    return "lora_magnitude_vector" if short == "lora_magnitude_vector.weight" else short


def _redundant(key: str) -> bool:
    """Keys that PEFT writes with bias="all" beside the same tensor under its proper key."""
    return ".original_module." in key or ".modules_to_save." in key


def _fill(model: nn.Module, name: str, parameter: Tensor, tensor: Tensor) -> None:
    if parameter.device.type != "meta":
        parameter.copy_(shared_as(tensor, parameter))
        return
    path, _, attribute = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    device = _device_of_base(model, name)
    value = nn.Parameter(
        tensor.to(device, parameter.dtype, copy=True), requires_grad=parameter.requires_grad
    )
    owner._parameters[attribute] = value


def _device_of_base(model: nn.Module, name: str) -> torch.device:
    layers = [
        layer
        for path, layer in wrappers(model)
        if isinstance(layer, LoraLayer) and name.startswith(f"{path}.")
    ]
    layer = max(layers, key=lambda layer: len(layer.r), default=None)
    return layer.unmerged_weight().device if layer is not None else torch.device("cpu")


def _mismatch_text(
    keys: dict[str, str],
    missing: list[str],
    unexpected: list[str],
    wrong: dict[str, tuple[tuple, tuple]],
    vocabulary: int | None,
) -> str:
    total = len(missing) + len(unexpected) + len(wrong)
    everything = len(keys) + len(unexpected)
    lines = [f"This adapter does not fit this model: {total} of {everything} tensors."]
    for what, found, detail in (
        ("missing from the file", missing, lambda key: ""),
        ("in the file but not in the model", unexpected, lambda key: _near(key, missing)),
        ("of another shape", list(wrong), lambda key: "   file {}   model {}".format(*wrong[key])),
    ):
        if found:
            lines.append(f"{len(found)} {what}:")
            lines += [f"  {_short(key)}{detail(key)}" for key in found[:_SHOWN]]
            lines += [f"  … and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    if vocabulary:
        lines.append(
            f"The adapter was saved with a vocabulary of {vocabulary}: model.resize_token_embeddings({vocabulary}) before loading."
        )
    if missing or unexpected:
        lines.append("strict=False loads what fits and leaves the rest as it is.")
    return "\n".join(lines)


def _vocabulary_in_file(
    model: nn.Module, target: dict[str, str], wrong: dict[str, tuple[tuple, tuple]]
) -> int | None:
    """The size of the vocabulary that the adapter was saved with, if that is what does not fit."""
    embeddings = list(_embeddings(model))
    paths = [path for path, m in model.named_modules() if any(m is e for e in embeddings)]
    for key, (shape, _) in wrong.items():
        if any(target[key].startswith(f"{path}.") for path in paths):
            return shape[-1] if key.endswith("lora_embedding_A") else shape[0]
    return None


def _near(key: str, missing: list[str]) -> str:
    return did_you_mean(_short(key), map(_short, missing)) if missing else ""


def _short(key: str) -> str:
    return key.removeprefix("base_model.model.")
