"""What is wrong with the values of a `LoraConfig`, as far as that shows without a model."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from lowrank.errors import did_you_mean
from lowrank.init_config import LoftQConfig, sub_config_problems
from lowrank.task_types import TaskType

_INITIALISATIONS = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "pissa",
    "olora",
    "loftq",
    "eva",
    "corda",
    "lora_ga",
)
_PISSA_NITER = re.compile(r"pissa_niter_\d+")

# field -> why a value other than its default is refused
REFUSED = {
    "megatron_config": "Megatron's parallel layers hold a piece of W each; load the model with transformers and shard it with FSDP or DeepSpeed",
    "megatron_core": "it names the module of Megatron's parallel layers; load the model with transformers and shard it with FSDP or DeepSpeed",
    "use_qalora": "QALoRA gives A the mean of each group of inputs, for GPTQ bases alone; put plain LoRA on the quantised base, or train with PEFT",
    "qalora_group_size": "it only belongs to use_qalora, which is not supported; leave it at 16",
    "velora_config": "VeLoRA saves memory by an approximate gradient of A; gradient checkpointing saves it with the exact one",
    "monteclora_config": "MonteCLoRA samples the adapter in each forward and adds a term to the loss; train it with PEFT, or regularise with lora_dropout",
    "use_bdlora": "BD-LoRA's block-diagonal factors serve sharded inference engines; leave it out for plain LoRA, or train with PEFT",
    "arrow_config": "Arrow routes tokens between loaded adapters; choose one for each row (adapter_names=[...]), or combine them (add_weighted_adapter)",
    "kasa_config": "KaSA cuts W's smallest singular values off for good, and disabling the adapter would not give the base back; init_lora_weights='pissa' trains W's largest ones",
}


def value_problems(config: Any) -> list[str]:
    """Everything that is wrong with the values of a LoraConfig, a sentence each; empty if nothing is."""
    found = []
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name, why in REFUSED.items():
        if getattr(config, name) not in (defaults[name], None):
            found.append(f"{name}={getattr(config, name)!r}: {why}.")
    if config.runtime_config.ephemeral_gpu_offload:
        found.append(
            "runtime_config.ephemeral_gpu_offload=True: in PEFT it only speeds up the start of DoRA on a base in CPU memory; "
            "move the model to the GPU before get_peft_model, or leave it out."
        )
    wrong_types = _type_problems(config)
    if wrong_types:
        return found + wrong_types
    ranks: dict[str, Any] = {
        "r": config.r,
        **{f"rank_pattern[{k!r}]": v for k, v in config.rank_pattern.items()},
    }
    for name, value in ranks.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found.append(f"{name}={value!r} must be a whole number of at least 1.")
    alphas: dict[str, Any] = {
        "lora_alpha": config.lora_alpha,
        **{f"alpha_pattern[{k!r}]": v for k, v in config.alpha_pattern.items()},
    }
    for name, value in alphas.items():
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            found.append(f"{name}={value!r} must be a finite number.")
    if not isinstance(config.lora_dropout, int | float) or not 0 <= config.lora_dropout < 1:
        found.append(f"lora_dropout={config.lora_dropout!r} must be at least 0 and below 1.")
    if config.bias not in ("none", "all", "lora_only"):
        found.append(f"bias={config.bias!r} must be 'none', 'all' or 'lora_only'.")
    if config.task_type is not None and config.task_type not in [t.value for t in TaskType]:
        names = [t.value for t in TaskType]
        found.append(
            f"task_type={config.task_type!r} is none of {', '.join(names)}.{did_you_mean(str(config.task_type), names)}"
        )
    found += _initialisation_problems(config) + sub_config_problems(config)
    tokens = config.alora_invocation_tokens
    if tokens is not None:
        whole = isinstance(tokens, list | tuple) and all(type(t) is int for t in tokens)
        if not whole or not tokens:
            found.append(
                f"alora_invocation_tokens={tokens!r} must be a list of token ids, at least one."
            )
        if config.use_dora:
            found.append(
                "alora_invocation_tokens with use_dora=True: DoRA rescales what the base computes, also where the "
                "adapter must not act; drop one."
            )
    if config.use_dora and config.lora_bias:
        found.append(
            "lora_bias=True with use_dora=True: DoRA scales the weight's rows and leaves biases alone; drop one."
        )
    if config.lora_bias and isinstance(config.init_lora_weights, str):
        found.append(
            f"lora_bias=True with init_lora_weights={config.init_lora_weights!r}: PEFT would not load the adapter; drop one."
        )
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        found.append(
            "layers_to_transform needs target_modules as a list of names: put the layers into the regular expression."
        )
    if config.layers_pattern is not None and config.layers_to_transform is None:
        found.append("layers_pattern does nothing without layers_to_transform.")
    return found


def _type_problems(config: Any) -> list[str]:
    found = []
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name)
        if not (value is None or isinstance(value, str) or are_names(value)):
            found.append(f"{name}={value!r} must be a list of names, or one regular expression.")
    for name in ("modules_to_save", "target_parameters"):
        value = getattr(config, name)
        if isinstance(value, str):
            found.append(f"{name}={value!r} must be a list: [{value!r}].")
        elif not (value is None or are_names(value)):
            found.append(f"{name}={value!r} must be a list of names.")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(getattr(config, name), Mapping):
            found.append(f"{name}={getattr(config, name)!r} must map names to numbers.")
    found += _token_problems(config.trainable_token_indices)
    if config.layer_replication is not None and not are_ranges(config.layer_replication):
        found.append(
            f"layer_replication={config.layer_replication!r} must be a list of [start, end) with start < end, such as [[0, 4], [2, 5]]."
        )
    layers = config.layers_to_transform
    listed_layers = layers if isinstance(layers, list | tuple) else [layers]
    if layers is not None and not all(type(i) is int for i in listed_layers):
        found.append(f"layers_to_transform={layers!r} must be a whole number or a list of them.")
    return found


def _initialisation_problems(config: Any) -> list[str]:
    init = config.init_lora_weights
    if isinstance(init, str) and (
        init.startswith("pissa") or init in ("loftq", "corda", "lora_ga")
    ):
        alphas = [config.lora_alpha, *config.alpha_pattern.values()]
        if any(isinstance(alpha, int | float) and alpha <= 0 for alpha in alphas):
            return [f"init_lora_weights={init!r} divides by lora_alpha, which must be above 0."]
    if init == "loftq":
        return _loftq_problems(config)
    if isinstance(init, bool) or init in _INITIALISATIONS:
        return []
    if isinstance(init, str) and _PISSA_NITER.fullmatch(init):
        return []
    names = [name for name in _INITIALISATIONS if isinstance(name, str)]
    if init == "mica":
        return [
            "init_lora_weights='mica': MiCA freezes B at W's least singular directions, and a file does not say that "
            "it is frozen; init_lora_weights='orthogonal' starts orthogonal too, or train with PEFT."
        ]
    allowed = f"True, False, {', '.join(map(repr, names))} or 'pissa_niter_<iterations>'"
    return [f"init_lora_weights={init!r} must be {allowed}.{did_you_mean(str(init), names)}"]


def _loftq_problems(config: Any) -> list[str]:
    values: Any = config.loftq_config
    if not values or not isinstance(values, Mapping):
        return ['init_lora_weights="loftq" needs loftq_config=LoftQConfig(…).']
    found = []
    known = {f.name: f.default for f in dataclasses.fields(LoftQConfig)}
    for key in values:
        if key not in known:
            found.append(f"loftq_config has no field {key!r}.{did_you_mean(key, known)}")
    values = {**known, **values}
    if values["loftq_bits"] not in (2, 4, 8):
        found.append(f"loftq_bits={values['loftq_bits']!r} must be 2, 4 or 8.")
    if type(values["loftq_iter"]) is not int or values["loftq_iter"] < 1:
        found.append(f"loftq_iter={values['loftq_iter']!r} must be a whole number of at least 1.")
    return found


def are_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(name, str) for name in value
    )


def are_ranges(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
        and all(type(i) is int for pair in value for i in pair)
        and all(0 <= start < end for start, end in value)
    )


def _token_problems(given: Any) -> list[str]:
    """What is wrong with trainable_token_indices, as far as that shows without a model."""
    if given is None:
        return []
    named = given if isinstance(given, Mapping) else {"": given}
    found = []
    for name, indices in named.items():
        where = f"trainable_token_indices[{name!r}]" if name else "trainable_token_indices"
        if not isinstance(indices, list | tuple) or not all(type(i) is int for i in indices):
            found.append(
                f"{where}={indices!r} must be a list of token ids, or map the names of embeddings to such lists."
            )
        elif not indices:
            found.append(f"{where} is empty; leave it out to train no token.")
        elif len(set(indices)) < len(indices):
            twice = sorted({i for i in indices if indices.count(i) > 1})
            found.append(f"{where} has {twice[:5]} twice.")
    return found
