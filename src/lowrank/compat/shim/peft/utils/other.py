from lowrank import cast_mixed_precision_params, prepare_model_for_kbit_training
from lowrank.adapter_file import PICKLE_NAME as WEIGHTS_NAME
from lowrank.adapter_file import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from lowrank.compat.names import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from lowrank.config import CONFIG_NAME
from lowrank.functional import fsdp_auto_wrap_policy
from lowrank.functional import get_submodules as _get_submodules
from lowrank.saved_module import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from lowrank.trainable_tokens import TrainableTokensWrapper

__all__ = [
    "CONFIG_NAME",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "_get_submodules",
    "cast_mixed_precision_params",
    "fsdp_auto_wrap_policy",
    "prepare_model_for_kbit_training",
]
