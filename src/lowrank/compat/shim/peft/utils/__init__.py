from lowrank import (
    PeftType,
    TaskType,
    cast_mixed_precision_params,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
    replace_lora_weights_loftq,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from lowrank.adapter_file import PICKLE_NAME as WEIGHTS_NAME
from lowrank.adapter_file import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from lowrank.compat.absent import bloom_model_postprocess_past_key_value, shift_tokens_right
from lowrank.compat.names import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    NoMatchingPeftModuleError,
    PeftError,
    PeftWarning,
)
from lowrank.config import CONFIG_NAME
from lowrank.functional import get_submodules as _get_submodules
from lowrank.saved_module import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from lowrank.trainable_tokens import TrainableTokensWrapper

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "TrainableTokensWrapper",
    "_get_submodules",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
]
