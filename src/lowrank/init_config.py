"""The options of the initialisations that have some, under PEFT's names and as its `adapter_config.json` holds them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.errors import ConfigError, UnknownFieldError, did_you_mean, listed


@dataclass
class LoftQConfig:
    """How LoftQ quantises: to 4 bits (NF4), 2 (NF2) or 8 (integers), in so many turns with the SVD."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """Options of `init_lora_weights="eva"` (Paischer et al. 2024).

    rho: a layer gets at most round(r·rho) components; 1 leaves every layer its r.
    tau: a component is settled when its cosine with itself of the batch before reaches this.
    use_label_mask: leave out positions whose label is `label_mask_value`.
    whiten: divide each direction by the root of its singular value.
    adjust_scaling_factors: where a layer's rank changes, change its lora_alpha so that its scaling stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        problems = []
        if not self.rho >= 1:
            problems.append(f"eva_config.rho={self.rho!r} must be at least 1.")
        if not 0 <= self.tau <= 1:
            problems.append(f"eva_config.tau={self.tau!r} must be from 0 to 1.")
        _raise(problems)


@dataclass
class CordaConfig:
    """Options of `init_lora_weights="corda"` (Yang et al. 2024).

    cache_file: where the r components of each layer are kept; read if it is there, else written.
    covariance_file: the same for the inputs' covariances, which serve any rank.
    corda_method: "ipm" adapts the components that matter most for the inputs, "kpm" those that matter least.
    verbose: say in the log which layer is being decomposed.
    use_float16_for_covariance: hold the covariances in float16 while they are collected.
    prune_temporary_fields: False leaves `sample_count` and `covariance_matrix` on the layers.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        _raise(_choices("corda_config", self, corda_method=("ipm", "kpm")))


@dataclass
class LoraGAConfig:
    """Options of `init_lora_weights="lora_ga"` (Wang et al. 2024).

    direction: which singular vectors of the gradient A and B start from. scale: what they are multiplied by.
    stable_gamma: the γ of "stable".
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16

    def __post_init__(self) -> None:
        problems = _choices(
            "lora_ga_config",
            self,
            direction=("ArBr", "A2rBr", "ArB2r", "random"),
            scale=("stable", "weight_svd", "gd_scale", "unit"),
        )
        if not self.stable_gamma > 0:
            problems.append(
                f"lora_ga_config.stable_gamma={self.stable_gamma!r} must be more than 0."
            )
        _raise(problems)


# field of LoraConfig -> its type, and the init_lora_weights that it belongs to
SUB_CONFIGS: dict[str, tuple[type, str]] = {
    "eva_config": (EvaConfig, "eva"),
    "corda_config": (CordaConfig, "corda"),
    "lora_ga_config": (LoraGAConfig, "lora_ga"),
}


def sub_config(field: str, value: Any, init: bool | str) -> Any:
    """The options in `value`, an object or a dictionary; the defaults where `init` needs some and has None.

    Raises UnknownFieldError for unknown keys and ConfigError for impossible values.
    """
    kind, name = SUB_CONFIGS[field]
    if isinstance(value, Mapping):
        fields = [f.name for f in dataclasses.fields(kind)]
        unknown = [
            f"{field} has no key {key!r}.{did_you_mean(key, fields)}"
            for key in value
            if key not in fields
        ]
        if unknown:
            raise UnknownFieldError(listed(unknown))
        return kind(**value)
    return kind() if value is None and init == name else value


def sub_config_problems(config: Any) -> list[str]:
    """What is wrong with the options of a LoraConfig: of another type, or for another initialisation."""
    found = []
    for field, (kind, name) in SUB_CONFIGS.items():
        value = getattr(config, field)
        if value is None:
            continue
        if not isinstance(value, kind):
            found.append(f"{field}={value!r} must be a {kind.__name__}, or a dictionary.")
        elif config.init_lora_weights != name:
            found.append(f"{field} does nothing without init_lora_weights={name!r}.")
    return found


def _choices(where: str, config: Any, **options: tuple[str, ...]) -> list[str]:
    return [
        f"{where}.{field}={value!r} is none of {', '.join(known)}.{did_you_mean(str(value), known)}"
        for field, known in options.items()
        if (value := getattr(config, field)) not in known
    ]


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(listed(problems))
