"""`LoraConfig`: PEFT's field names, defaults and meanings, and its `adapter_config.json`.

A field that this version cannot honour is accepted at its default and refused by name at any other
value. Nothing in a configuration is ignored.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from lowrank.config_problems import are_names, are_ranges, value_problems
from lowrank.errors import AdapterFileError, ConfigError, UnknownFieldError, did_you_mean, listed
from lowrank.files import write_text
from lowrank.hub import FOREIGN_KEYWORDS, HUB_KEYWORDS, adapter_file
from lowrank.init_config import (
    SUB_CONFIGS,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    sub_config,
)
from lowrank.task_types import TaskType

CONFIG_NAME = "adapter_config.json"


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


@dataclass
class LoraRuntimeConfig:
    """Settings of the running process that are not saved with an adapter."""

    ephemeral_gpu_offload: bool = False


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
                + "\nIf a newer library wrote the file and these keys may be dropped, take "
                "them out of it or pass ignore_unknown=True."
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
        try:
            return cls.from_dict({**values, **kwargs}, ignore_unknown=ignore_unknown)
        except (ConfigError, UnknownFieldError) as error:
            raise type(error)(f"{path}: {error}") from error

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
    ensure_weight_tying: what modules_to_save, trainable_token_indices and target_modules train of tied embeddings stays
        tied, also when merged; LoRA on one of them is one adapter for all.
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
            if not are_names(value):
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
        if are_ranges(self.layer_replication):
            self.layer_replication = [list(pair) for pair in self.layer_replication or ()]  # type: ignore[misc]
        if isinstance(self.runtime_config, Mapping):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)
        for name in SUB_CONFIGS:
            value = sub_config(name, getattr(self, name), self.init_lora_weights)
            setattr(self, name, value)
        found = value_problems(self)
        if found:
            raise ConfigError(listed(found))


def _json_value(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return value
