"""One more adapter in a whole model: planned, put in, and started."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from lowrank import functional
from lowrank.bare_parameters import LORA_KEY, PREFIX
from lowrank.calibration.starts import calibrated_inits, forget_calibration, starts_from_data
from lowrank.config import LoraConfig
from lowrank.errors import (
    AdapterNameError,
    ConfigError,
    TargetError,
)
from lowrank.fused_experts import for_fused_experts
from lowrank.init import Init, loftq
from lowrank.init_config import LoftQConfig
from lowrank.inject import check_name, inject
from lowrank.layer_replication import original_of, replicate, restore
from lowrank.path_patterns import pattern_value
from lowrank.targets import (
    plan,
    resolved,
    saved_modules,
    tied_saved_modules,
    trained_rows,
)
from lowrank.wrappers import adapter_names, base_biases


def add_to_model(
    model: nn.Module,
    config: LoraConfig,
    name: str,
    cast_to_float32: bool,
    meta: bool,
    inits: Mapping[str, Init] | None = None,
) -> LoraConfig:
    """Plans and injects; returns the configuration with its targets spelled out.

    inits: initialisations by path, in place of the configuration's.
    """
    check_name(model, name)
    fresh = _stack(model, config)
    try:
        return _add(model, config, name, cast_to_float32, meta, inits)
    except Exception:
        if fresh:
            restore(model)
        raise


def _stack(model: nn.Module, config: LoraConfig) -> bool:
    """Replicates the layers if the configuration wants it; whether that changed the model."""
    before = original_of(model)
    if before is not None and not config.layer_replication:
        raise TargetError(
            f"This model's layers are stacked as {before.ranges} by another adapter (layer_replication), and this one was "
            "made for the layers as they were: put it onto a base of its own."
        )
    if not config.layer_replication:
        return False
    if before is None and adapter_names(model):
        raise TargetError(
            "layer_replication changes the layers under the adapters that are there: put this one onto a base of its own."
        )
    replicate(model, config.layer_replication)
    return before is None


def _add(
    model: nn.Module,
    config: LoraConfig,
    name: str,
    cast_to_float32: bool,
    meta: bool,
    inits: Mapping[str, Init] | None,
) -> LoraConfig:
    config = for_fused_experts(model, config)
    targets = plan(model, config)
    saved = saved_modules(model, config)
    tokens = trained_rows(model, config)
    config = resolved(model, config, targets, saved)
    if not inits and not meta:
        inits = calibrated_inits(model, config, targets)
    inject(
        model,
        targets,
        name,
        init=_initialisation(model, config),
        inits=inits,
        saved=saved,
        tied=tied_saved_modules(model, config, saved),
        tokens=tokens,
        bias=config.bias,
        cast_to_float32=cast_to_float32,
        meta=meta,
        invocation=config.alora_invocation_tokens,
    )
    forget_calibration(model, config, targets)
    return config


def _initialisation(model: nn.Module, config: LoraConfig) -> bool | str | Init:
    """What `init_lora_weights` means, with its options bound to it."""
    if config.init_lora_weights != "loftq":
        return config.init_lora_weights
    there = adapter_names(model)
    if there:
        raise AdapterNameError(
            f'init_lora_weights="loftq" quantises the base, on which {there} stand: it must be the first adapter.'
        )
    options = LoftQConfig(**config.loftq_config)
    return partial(loftq, bits=options.loftq_bits, iterations=options.loftq_iter)


def activate(
    model: nn.Module, configs: dict[str, LoraConfig], names: list[str], inference_mode: bool
) -> None:
    """Makes these adapters, and no others, act; and the biases of the base that they train."""
    functional.set_adapter(model, names, inference_mode)
    for name, config in configs.items():
        for parameter in base_biases(model, config.bias).values():
            parameter.requires_grad_(name in names and not inference_mode)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Adds an active adapter to `model` in place, without a wrapper around it; sets `model.peft_config`.

    state_dict: tensors by the keys of an adapter's file. The layers that they name, and no others, get the
    adapter, with the ranks of their shapes; the values are not loaded. Raises ConfigError for a start from data
    that is taken out of W (CorDA, LoRA-GA): only a PeftModel saves and loads it.
    """
    init = peft_config.init_lora_weights
    if starts_from_data(init):
        raise ConfigError(
            f"init_lora_weights={init!r} takes its start out of the base's weights, and a model without a PeftModel around "
            "it would not save that. To train: get_peft_model(model, config). To load such a folder: "
            "PeftModel.from_pretrained(model, folder), or have it saved with as_plain_lora=True."
        )
    if state_dict is not None:
        peft_config = _as_in(state_dict, model, peft_config)
    config = add_to_model(model, peft_config, adapter_name, True, low_cpu_mem_usage)
    configs: dict[str, LoraConfig] = {**getattr(model, "peft_config", {}), adapter_name: config}
    model.peft_config = configs  # type: ignore[assignment]
    activate(model, configs, [adapter_name], config.inference_mode)
    return model


def _as_in(tensors: Mapping[str, Tensor], model: nn.Module, config: LoraConfig) -> LoraConfig:
    """`config` with the layers that an adapter's keys name as targets, and the ranks of their shapes."""
    ranks = {}
    for key, tensor in tensors.items():
        match = LORA_KEY.fullmatch(key.removeprefix(PREFIX))
        if match and match[2].endswith("_A"):
            ranks[match[1].replace(".base_layer", "")] = tensor.shape[0]
    if config.target_parameters:  # fused experts: what a layer's keys belong to is not in the keys
        return config
    if not ranks:
        raise ConfigError(
            f"state_dict has no lora_A or lora_embedding_A among its {len(tensors)} keys: {list(tensors)[:3]}."
        )
    try:
        same = {target.path for target in plan(model, config)} == set(ranks)
    except TargetError:
        same = False
    if not same:
        config = replace(
            config,
            target_modules=list(ranks),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
    others = {
        f"^{re.escape(path)}": r
        for path, r in ranks.items()
        if r != pattern_value(config.rank_pattern, path, config.r)
    }
    kept = {key: r for key, r in config.rank_pattern.items() if key not in others}
    return replace(config, rank_pattern=others | kept)
