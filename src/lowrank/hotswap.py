"""Hotswap: another adapter in the place of one that is loaded, also under `torch.compile` without recompiling."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.adapter_file import read_start, read_tensors
from lowrank.config import LoraConfig, PeftConfig
from lowrank.errors import AdapterNameError, HotswapError, did_you_mean, listed
from lowrank.factors import with_rank
from lowrank.fingerprint import check_base as check_fingerprint
from lowrank.init import taken_out
from lowrank.layer import LoraLayer
from lowrank.lora import initial_magnitude, scaling_for
from lowrank.path_patterns import pattern_value
from lowrank.state import adapter_keys, different_values, tied_keys
from lowrank.wrappers import lora_layers, target_path, wrappers

# what both adapters must agree on; everything else in a configuration comes with the swap
_SAME = (
    *("use_dora", "lora_bias", "lora_dropout", "alora_invocation_tokens"),
    *("trainable_token_indices", "layer_replication", "ensure_weight_tying"),
)
_STARTED = "starts from the base's weights: save it with as_plain_lora=True, and swap that in."
_NUMBERS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    *,
    check_base: bool = True,
    ignore_unknown: bool = False,
    subfolder: str | None = None,
    **hub: Any,
) -> None:
    """Puts the adapter of a folder, or on the hub, in the place of the loaded adapter `adapter_name`.

    The tensors go into the parameters that are there (`torch_device` is accepted for compatibility).
    check_base, ignore_unknown and hub (`revision`, `token`, `cache_dir`, `local_files_only`) are those of
    `PeftModel.from_pretrained`. Raises HotswapError, and what loading raises; nothing is changed then.
    """
    del torch_device
    inner = _uncompiled(model)
    current = _config_of(inner, adapter_name)
    config = PeftConfig.from_pretrained(
        model_name_or_path, subfolder, ignore_unknown=ignore_unknown, **hub
    )
    check_hotswap_configs_compatible(current, config)
    tensors, metadata = read_tensors(model_name_or_path, subfolder=subfolder, **hub)
    if read_start(model_name_or_path, config, metadata, subfolder=subfolder, **hub):
        raise HotswapError(f"{model_name_or_path} {_STARTED}")
    if check_base:
        saved = metadata.get("base")
        check_fingerprint(inner, adapter_name, saved, tensors, model_name_or_path)
    hotswap_adapter_from_state_dict(inner, tensors, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same from tensors in memory, by the keys of PEFT's files, with or without the adapter's name.

    A smaller rank is padded with zeros. A layer that the new adapter leaves out is zeroed; one that the old
    adapter lacks is an error, as is a larger rank once the model was prepared. `model.peft_config` gets the
    new rank, alpha and patterns. Raises HotswapError with everything that does not fit; nothing is changed
    then.
    """
    if parameter_prefix != "lora_":
        raise HotswapError(f"parameter_prefix={parameter_prefix!r}: lowrank does LoRA only.")
    inner = _uncompiled(model)
    current = _config_of(inner, adapter_name)
    merged = [path for path, layer in lora_layers(inner) if adapter_name in layer.merged_adapters]
    if merged:
        raise HotswapError(
            f"Adapter {adapter_name!r} is merged into the base: unmerge_adapter() first, then swap it."
        )
    swaps, whole, problems = _fitted(inner, state_dict, adapter_name, config)
    if problems:
        raise HotswapError(f"Adapter {adapter_name!r} stays as it was: {listed(problems)}")
    with torch.no_grad():
        for parameter, tensor in whole:
            parameter.copy_(tensor)
        for swap in swaps:
            _put(swap, adapter_name)
    if isinstance(current, LoraConfig):
        numbers = {field: getattr(config, field) for field in _NUMBERS}
        peft_config: Any = inner.peft_config
        peft_config[adapter_name] = dataclasses.replace(current, **numbers)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Makes room in every adapter of `model`, so that later swaps need no recompilation.

    Scalings become tensors, and A and B are padded with zeros to `target_rank`, the largest rank to come.
    Call it after the first adapter is loaded and before `torch.compile`; check_compiled says what
    happens otherwise. An adapter is saved with its own rank as before, which is why `config` is accepted
    and left as it is. Raises HotswapError if there is no adapter, or one of a larger rank.
    """
    del config
    if check_compiled not in ("error", "warn", "ignore"):
        raise HotswapError(
            f"check_compiled={check_compiled!r} must be 'error', 'warn' or 'ignore'."
        )
    if _is_compiled(model) and check_compiled != "ignore":
        text = "prepare_model_for_compiled_hotswap must come before torch.compile: the compiled code would be thrown away."
        if check_compiled == "error":
            raise HotswapError(text + " check_compiled='ignore' does it all the same.")
        warnings.warn(text, stacklevel=2)
    layers = [(path, layer) for path, layer in lora_layers(_uncompiled(model)) if layer.r]
    if not layers:
        raise HotswapError("This model has no adapters: load the first one, then prepare.")
    larger = {
        f"{path}: adapter {name!r} has rank {r}, more than target_rank={target_rank}."
        for path, layer in layers
        for name, r in layer.r.items()
        if target_rank is not None and r > target_rank
    }
    if larger:
        raise HotswapError(listed(sorted(larger)))
    for _, layer in layers:
        for name in layer.r:
            layer.scale_by_tensor(name)
            if target_rank is not None:
                _resize(layer, name, target_rank)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raises HotswapError unless an adapter of `config1` can take the place of one of `config0`.

    Rank, alpha, their patterns and rsLoRA may differ: they come with the swap.
    """
    problems = []
    for field in ("peft_type", *_SAME):
        old, new = getattr(config0, field, None), getattr(config1, field, None)
        if old != new:
            problems.append(f"{field} is {old!r} here, {new!r} in the adapter to swap in.")
    init = getattr(config1, "init_lora_weights", True)
    if taken_out(init):
        problems.append(f"The adapter to swap in (init_lora_weights={init!r}) {_STARTED}")
    if init == "loftq":
        problems.append('The adapter to swap in (init_lora_weights="loftq") quantises its base.')
    if problems:
        raise HotswapError(
            "Configs are incompatible: " + listed(problems) + "\nLoad it under another name."
        )


# --- what goes where ------------------------------------------------------------------------------


class _Swap(NamedTuple):
    """The new adapter at one layer; tensors by the parameter's name within it, none for a layer left out."""

    layer: LoraLayer
    tensors: dict[str, Tensor]
    r: int
    lora_alpha: float
    use_rslora: bool


def _fitted(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: LoraConfig
) -> tuple[list[_Swap], list[tuple[Tensor, Tensor]], list[str]]:
    """(what changes at each layer, (parameter, tensor) of what is saved whole, everything that does not fit)."""
    keys = adapter_keys(model, adapter_name)
    known = {form: name for key, name in keys.items() for form in _forms(key, name)}
    given = {known[_plain(key)]: t for key, t in state_dict.items() if _plain(key) in known}
    plain = {_plain(key): t for key, t in state_dict.items()}
    copies = tied_keys(model, adapter_name)
    repeated = {_plain(key) for key in copies}
    problems = [
        f"{key} belongs to no layer of this adapter.{did_you_mean(key, keys)}"
        for key in state_dict
        if _plain(key) not in known and _plain(key) not in repeated
    ]
    problems += [
        different_values(key, source)
        for key, (source, transposed) in copies.items()
        if (copy := plain.get(_plain(key))) is not None
        and (own := plain.get(_plain(source))) is not None
        and not torch.equal(copy.T if transposed else copy, own)
    ]
    swaps = []
    in_layers: set[str] = set()
    for path, layer in lora_layers(model):
        if adapter_name not in layer.r:
            continue
        names = {
            name: f"{path}.{name}" if path else name
            for name in layer.adapter_parameters(adapter_name)
        }
        in_layers.update(names.values())
        tensors = {name: given[full] for name, full in names.items() if full in given}
        swap, wrong = _at_layer(path, layer, tensors, adapter_name, config)
        swaps.append(swap)
        problems += wrong
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    whole = []
    for key, name in keys.items():
        if name in in_layers:
            continue
        if name not in given:
            problems.append(f"{key} is saved whole by the adapter here, and is missing.")
        elif given[name].shape != parameters[name].shape:
            problems.append(_shapes(key, given[name].shape, parameters[name].shape))
        else:
            whole.append((parameters[name], given[name]))
    return swaps, whole, problems


def _at_layer(
    path: str, layer: LoraLayer, tensors: dict[str, Tensor], adapter_name: str, config: LoraConfig
) -> tuple[_Swap, list[str]]:
    base_path = target_path(_plain(path), layer)
    r = pattern_value(config.rank_pattern, base_path, config.r)
    alpha = pattern_value(config.alpha_pattern, base_path, config.lora_alpha)
    swap = _Swap(layer, tensors, r, alpha, config.use_rslora)
    here = layer.adapter_parameters(adapter_name)
    problems = [f"{path}.{name} is missing." for name in here if tensors and name not in tensors]
    for name, tensor in tensors.items():
        expected = with_rank(name, here[name], r, layer.experts).shape
        if tensor.shape != expected:
            problems.append(_shapes(f"{path}.{name}", tensor.shape, expected, r))
    if layer.start_factors(adapter_name):
        problems.append(
            f"{path}: the adapter here started from W, which the new one does not know; "
            "save it with as_plain_lora=True and load that."
        )
    room = layer.room(adapter_name)
    if tensors and r > room and isinstance(layer.scaling[adapter_name], Tensor):
        problems.append(
            f"{path}: rank {r} is more than the {room} it was prepared for: "
            f"prepare_model_for_compiled_hotswap(model, target_rank={r})."
        )
    return swap, problems


def _put(swap: _Swap, adapter_name: str) -> None:
    layer = swap.layer
    room = max(layer.room(adapter_name), swap.r if swap.tensors else 0)
    _resize(layer, adapter_name, room)
    for name, parameter in layer.adapter_parameters(adapter_name).items():
        if name in swap.tensors:
            parameter.copy_(with_rank(name, swap.tensors[name], room, layer.experts))
        else:
            parameter.zero_()
    layer.describe(
        adapter_name, swap.r, swap.lora_alpha, scaling_for(swap.lora_alpha, swap.r, swap.use_rslora)
    )
    own = layer.leader(adapter_name) is None
    if own and not swap.tensors and layer.use_dora[adapter_name]:  # DoRA without a change: m = ‖W‖
        m: Any = layer.lora_magnitude_vector[adapter_name]
        norm = initial_magnitude(layer.unmerged_weight(), layer.lora(adapter_name))
        m.weight.copy_(norm.view(m.weight.shape))
    layer.routing.cache.clear()


def _resize(layer: LoraLayer, adapter_name: str, r: int) -> None:
    """Gives A and B room for rank `r`. A parameter that has it already stays the same object."""
    for name, parameter in layer.adapter_parameters(adapter_name).items():
        value = with_rank(name, parameter.detach(), r, layer.experts)
        if value.shape == parameter.shape:
            continue
        owner, _, attribute = name.rpartition(".")
        setattr(
            layer.get_submodule(owner),
            attribute,
            nn.Parameter(value.clone(), requires_grad=parameter.requires_grad),
        )


def _shapes(key: str, found: torch.Size, expected: torch.Size, r: int | None = None) -> str:
    rank = "" if r is None else f" for rank {r}"
    return f"{key} is {tuple(found)}; {tuple(expected)} is expected{rank}."


def _forms(key: str, name: str) -> set[str]:
    """The names that a tensor may have: the file's, the parameter's, and PEFT's for a magnitude."""
    plain = _plain(name)
    return {_plain(key), plain, plain.removesuffix(".weight") if "magnitude" in plain else plain}


def _plain(key: str) -> str:
    """Without the marks that `torch.compile(module)` leaves in names."""
    return key.replace("_orig_mod.", "").replace("._orig_mod", "")


def _config_of(model: nn.Module, adapter_name: str) -> Any:
    configs = getattr(model, "peft_config", {})
    names = list(configs) or list(
        {name for _, module in wrappers(model) for name in getattr(module, "r", {})}
    )
    if adapter_name not in names:
        raise AdapterNameError(
            f"There is no adapter named {adapter_name!r} to swap out; there are: {', '.join(names) or 'none'}."
            + did_you_mean(adapter_name, names)
        )
    return configs.get(adapter_name)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _uncompiled(model: nn.Module) -> Any:
    return getattr(model, "_orig_mod", model)
