"""`LoraConfig`: PEFT's field names, defaults and meanings, and its `adapter_config.json`.

A field that this version cannot honour is accepted at its default and refused by name at any other
value. Nothing in a configuration is ignored.
"""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from lowrank.errors import AdapterFileError, ConfigError, UnknownFieldError, did_you_mean, listed
from lowrank.files import write_text
from lowrank.hub import FOREIGN_KEYWORDS, HUB_KEYWORDS, adapter_file
from lowrank.init_config import (
    SUB_CONFIGS,
    CordaConfig,
    EvaConfig,
    LoraGAConfig,
    sub_config,
    sub_config_problems,
)

CONFIG_NAME = "adapter_config.json"


class TaskType(str, Enum):  # noqa: UP042  (PEFT's users compare and format these as plain strings)
    """What the model does with its last hidden states."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, Enum):  # noqa: UP042
    """The methods that an `adapter_config.json` can name; lowrank does LoRA only."""

    LORA = "LORA"
    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


# The heads that a freshly built task model has untrained, so that they are trained and saved whole.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

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
_REFUSED = {
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


@dataclass
class LoraRuntimeConfig:
    """Settings of the running process that are not saved with an adapter."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """How LoftQ quantises: to 4 bits (NF4), 2 (NF2) or 8 (integers), in so many turns with the SVD."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass(kw_only=False)
class PeftConfig:
    """What every adapter configuration has. `from_pretrained` returns the right subclass.

    Raises UnknownFieldError for a keyword that is no field, with the nearest names.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __new__(cls, *args, **kwargs):
        names = [f.name for f in dataclasses.fields(cls) if f.init]
        unknown = [key for key in kwargs if key not in names]
        if unknown:
            problems = [
                f"{cls.__name__} has no field {key!r}.{did_you_mean(key, names)}" for key in unknown
            ]
            raise UnknownFieldError(listed(problems))
        return super().__new__(cls)

    @property
    def is_prompt_learning(self) -> bool:
        """Always False: lowrank does LoRA only. Part of the interface that trainers ask for."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, as `adapter_config.json` holds them."""
        values = dataclasses.asdict(self)
        values.pop("runtime_config", None)
        return {key: _json_value(value) for key, value in values.items()}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, ignore_unknown: bool = False) -> "LoraConfig":
        """The configuration in `values`, the content of an `adapter_config.json`.

        Raises ConfigError if it is not LoRA's or a value is refused, and UnknownFieldError for keys that
        no field has. With `ignore_unknown` (for files written by a newer library) those keys are
        dropped, and a warning lists them.
        """
        peft_type = values.get("peft_type", PeftType.LORA)
        if peft_type != PeftType.LORA:
            raise ConfigError(
                f"peft_type is {peft_type!r}; lowrank does LoRA only. Load this adapter with PEFT."
            )
        names = {f.name for f in dataclasses.fields(LoraConfig) if f.init}
        unknown = sorted(set(values) - names)
        if unknown and not ignore_unknown:
            problems = [f"unknown key {key!r}.{did_you_mean(key, names)}" for key in unknown]
            raise UnknownFieldError(
                listed(problems)
                + "\nIf a newer library wrote the file and these keys may be dropped, pass "
                "ignore_unknown=True."
            )
        if unknown:
            warnings.warn(
                f"ignored keys of the adapter's configuration: {', '.join(unknown)}", stacklevel=2
            )
        # an adapter that was rewritten as plain LoRA keeps the options of the start it once had
        over = [
            f for f, (_, init) in SUB_CONFIGS.items() if values.get("init_lora_weights") != init
        ]
        return LoraConfig(**{k: v for k, v in values.items() if k in names and k not in over})

    @classmethod
    def from_json_file(cls, path: str | PathLike, **kwargs) -> dict[str, Any]:
        """The content of a JSON file as a dictionary."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise AdapterFileError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise AdapterFileError(f"{path} holds no JSON object, but {type(values).__name__}.")
        return values

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        subfolder: str | None = None,
        *,
        ignore_unknown: bool = False,
        **kwargs,
    ) -> "LoraConfig":
        """The configuration of an adapter in a folder or on the hub.

        kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, as huggingface_hub has them;
        `trust_remote_code` and `code_revision` mean nothing here; any other is set as a field on the
        result. Raises AdapterFileError if there is no configuration.
        """
        kwargs = {key: value for key, value in kwargs.items() if key not in FOREIGN_KEYWORDS}
        hub = {key: kwargs.pop(key) for key in HUB_KEYWORDS if key in kwargs}
        path = adapter_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        assert path is not None  # without required=False it is there, or was an error
        values = cls.from_json_file(path)
        return cls.from_dict({**values, **kwargs}, ignore_unknown=ignore_unknown)

    def save_pretrained(self, save_directory: str | PathLike, **kwargs) -> None:
        """Writes `adapter_config.json` into the folder, by way of a temporary name."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_text(Path(save_directory) / CONFIG_NAME, self.to_json_string())


@dataclass
class LoraConfig(PeftConfig):
    """Which layers get an adapter, and of what kind. Field names and defaults are PEFT's.

    r: rank. lora_alpha: ΔW = (lora_alpha / r)·B·A, or / √r with use_rslora.
    target_modules: names or suffixes of module paths, a regular expression that a whole path must match,
        "all-linear" (every linear layer but the output head), or None for the architecture's default.
    target_parameters: names or suffixes of parameter paths, as `experts.gate_up_proj`: fused experts (3-D) and
        other parameters that no module of their own holds. With target_modules=[] nothing else is adapted.
    exclude_modules: names, suffixes or a regular expression that are left out.
    bias: "none", "lora_only" (train the targeted layers' own biases) or "all".
    modules_to_save: modules trained and saved whole, beside the adapter.
    trainable_token_indices: tokens whose rows of the input embedding are trained and saved; or a dictionary,
        {name of an embedding or output head: tokens}. What is tied to the input embedding follows it.
    ensure_weight_tying: modules_to_save and trainable_token_indices keep tied embeddings tied, also when merged.
    layer_replication: [[start, end), ...]: these layers, one range after another, make a deeper model, whose copies
        share the base's weights and have adapters of their own.
    rank_pattern, alpha_pattern: other r and lora_alpha for the module paths that a key matches (a suffix
        or a regular expression).
    Raises ConfigError for impossible values and for features that this version does not have, all at once.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if not _are_names(value):
                continue
            if isinstance(value, set | frozenset):  # their order differs from process to process
                value = sorted(value)
            setattr(self, name, list(dict.fromkeys(value)))
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = dataclasses.asdict(self.loftq_config)
        self.loftq_config = self.loftq_config or {}
        if self.loftq_config and self.init_lora_weights != "loftq":
            warnings.warn(
                f'loftq_config does nothing without init_lora_weights="loftq" (it is {self.init_lora_weights!r}).',
                stacklevel=3,
            )
            self.loftq_config = {}
        self.layers_pattern = (
            self.layers_pattern or None
        )  # [] of older files; PEFT refuses it beside a string
        if _are_ranges(self.layer_replication):
            self.layer_replication = [list(pair) for pair in self.layer_replication or ()]  # type: ignore[misc]
        if isinstance(self.runtime_config, Mapping):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)
        for name in SUB_CONFIGS:
            value = sub_config(name, getattr(self, name), self.init_lora_weights)
            setattr(self, name, value)
        problems = self.problems()
        if problems:
            raise ConfigError(listed(problems))

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, a sentence each; empty if nothing is."""
        found = []
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, why in _REFUSED.items():
            if getattr(self, name) not in (defaults[name], None):
                found.append(f"{name}={getattr(self, name)!r}: {why}.")
        if self.runtime_config.ephemeral_gpu_offload:
            found.append(
                "runtime_config.ephemeral_gpu_offload=True: in PEFT it only speeds up the start of DoRA on a base in CPU memory; "
                "move the model to the GPU before get_peft_model, or leave it out."
            )
        wrong_types = self._type_problems()
        if wrong_types:
            return found + wrong_types
        ranks: dict[str, Any] = {
            "r": self.r,
            **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()},
        }
        for name, value in ranks.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                found.append(f"{name}={value!r} must be a whole number of at least 1.")
        alphas: dict[str, Any] = {
            "lora_alpha": self.lora_alpha,
            **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()},
        }
        for name, value in alphas.items():
            if (
                not isinstance(value, int | float)
                or isinstance(value, bool)
                or not math.isfinite(value)
            ):
                found.append(f"{name}={value!r} must be a finite number.")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout={self.lora_dropout!r} must be at least 0 and below 1.")
        if self.bias not in ("none", "all", "lora_only"):
            found.append(f"bias={self.bias!r} must be 'none', 'all' or 'lora_only'.")
        if self.task_type is not None and self.task_type not in [t.value for t in TaskType]:
            names = [t.value for t in TaskType]
            found.append(
                f"task_type={self.task_type!r} is none of {', '.join(names)}.{did_you_mean(str(self.task_type), names)}"
            )
        found += self._initialisation_problems() + sub_config_problems(self)
        tokens = self.alora_invocation_tokens
        if tokens is not None:
            whole = isinstance(tokens, list | tuple) and all(type(t) is int for t in tokens)
            if not whole or not tokens:
                found.append(
                    f"alora_invocation_tokens={tokens!r} must be a list of token ids, at least one."
                )
            if self.use_dora:
                found.append(
                    "alora_invocation_tokens with use_dora=True: DoRA rescales what the base computes, also where the "
                    "adapter must not act; drop one."
                )
        if self.use_dora and self.lora_bias:
            found.append(
                "lora_bias=True with use_dora=True: DoRA scales the weight's rows and leaves biases alone; drop one."
            )
        if self.lora_bias and isinstance(self.init_lora_weights, str):
            found.append(
                f"lora_bias=True with init_lora_weights={self.init_lora_weights!r}: PEFT would not load the adapter; drop one."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            found.append(
                "layers_to_transform needs target_modules as a list of names: put the layers into the regular expression."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            found.append("layers_pattern does nothing without layers_to_transform.")
        return found

    def _type_problems(self) -> list[str]:
        found = []
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or _are_names(value)):
                found.append(
                    f"{name}={value!r} must be a list of names, or one regular expression."
                )
        for name in ("modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, str):
                found.append(f"{name}={value!r} must be a list: [{value!r}].")
            elif not (value is None or _are_names(value)):
                found.append(f"{name}={value!r} must be a list of names.")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                found.append(f"{name}={getattr(self, name)!r} must map names to numbers.")
        found += _token_problems(self.trainable_token_indices)
        if self.layer_replication is not None and not _are_ranges(self.layer_replication):
            found.append(
                f"layer_replication={self.layer_replication!r} must be a list of [start, end) with start < end, such as [[0, 4], [2, 5]]."
            )
        layers = self.layers_to_transform
        listed_layers = layers if isinstance(layers, list | tuple) else [layers]
        if layers is not None and not all(type(i) is int for i in listed_layers):
            found.append(
                f"layers_to_transform={layers!r} must be a whole number or a list of them."
            )
        return found

    def _initialisation_problems(self) -> list[str]:
        init = self.init_lora_weights
        if isinstance(init, str) and (
            init.startswith("pissa") or init in ("loftq", "corda", "lora_ga")
        ):
            alphas = [self.lora_alpha, *self.alpha_pattern.values()]
            if any(isinstance(alpha, int | float) and alpha <= 0 for alpha in alphas):
                return [f"init_lora_weights={init!r} divides by lora_alpha, which must be above 0."]
        if init == "loftq":
            return self._loftq_problems()
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

    def _loftq_problems(self) -> list[str]:
        values: Any = self.loftq_config
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
            found.append(
                f"loftq_iter={values['loftq_iter']!r} must be a whole number of at least 1."
            )
        return found


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(name, str) for name in value
    )


def _are_ranges(value: Any) -> bool:
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


def _json_value(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return value
