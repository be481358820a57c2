"""PEFT's names for what has another name here, so that its shim holds re-exports only."""

from abc import ABC
from collections.abc import Mapping
from typing import Any

from lowrank.architectures import DEFAULT_TARGETS
from lowrank.config import LoraConfig, PeftConfig, PeftType
from lowrank.errors import LowrankError, LowrankWarning, TargetError
from lowrank.layer import LoraLayer
from lowrank.lora_model import LoraModel
from lowrank.targets import ALL_LINEAR
from lowrank.trainable_tokens import TrainableTokensWrapper

PeftError = LowrankError
PeftWarning = LowrankWarning
NoMatchingPeftModuleError = TargetError


class BaseTunerLayer(ABC):  # noqa: B024
    """What transformers and diffusers switch, merge and delete adapters in: LoRA's layers, and single rows."""


BaseTunerLayer.register(LoraLayer)
BaseTunerLayer.register(TrainableTokensWrapper)

PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType.LORA: LoraConfig}
PEFT_TYPE_TO_TUNER_MAPPING = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING = {PeftType.LORA: LoraModel.prefix}

INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING: dict[str, list[str] | str] = {
    model_type: names if isinstance(names, str) else list(names)
    for model_type, names in DEFAULT_TARGETS.items()
}
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}


def get_peft_config(config_dict: Mapping[str, Any]) -> LoraConfig:
    """The configuration in a dictionary with a `peft_type`. Raises as `PeftConfig.from_dict`."""
    return PeftConfig.from_dict(config_dict)
