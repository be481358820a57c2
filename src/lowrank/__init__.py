"""LoRA, from plan to proof: plan, train, inspect, merge, verify and ship low-rank adapters."""

import importlib
from typing import TYPE_CHECKING, Any

from lowrank.compat import append_if_no_peft

__version__ = "0.1.0"

# name -> the module that defines it, imported when the name is first used
_PUBLIC = {
    "Adapter": "adapter_file",
    "AutoPeftModel": "auto",
    "AutoPeftModelForCausalLM": "auto",
    "AutoPeftModelForFeatureExtraction": "auto",
    "AutoPeftModelForQuestionAnswering": "auto",
    "AutoPeftModelForSeq2SeqLM": "auto",
    "AutoPeftModelForSequenceClassification": "auto",
    "AutoPeftModelForTokenClassification": "auto",
    "CordaConfig": "init_config",
    "EvaConfig": "init_config",
    "Lora": "lora",
    "LoftQConfig": "init_config",
    "LoraConfig": "config",
    "LoraGAConfig": "init_config",
    "LoraLayer": "layer",
    "LoraModel": "lora_model",
    "LoraRuntimeConfig": "config",
    "LowrankError": "errors",
    "PeftConfig": "config",
    "PeftModel": "peft",
    "PeftModelForCausalLM": "peft",
    "PeftModelForFeatureExtraction": "peft",
    "PeftModelForQuestionAnswering": "peft",
    "PeftModelForSeq2SeqLM": "peft",
    "PeftModelForSequenceClassification": "peft",
    "PeftModelForTokenClassification": "peft",
    "PeftType": "config",
    "Quantisation": "quantisation",
    "QuantizationConfig": "quantizer",
    "Target": "targets",
    "TaskType": "task_types",
    "cast_mixed_precision_params": "functional",
    "check_hotswap_configs_compatible": "hotswap",
    "convert": "formats",
    "create_loraplus_optimizer": "train.run.loraplus",
    "delta_weight": "lora",
    "get_base_model_state_dict": "state",
    "get_eva_state_dict": "calibration.eva",
    "get_layer_status": "status",
    "get_model_status": "status",
    "get_peft_config": "compat.names",
    "get_peft_model": "peft",
    "get_peft_model_state_dict": "state",
    "hotswap_adapter": "hotswap",
    "hotswap_adapter_from_state_dict": "hotswap",
    "initialize_lora_eva_weights": "calibration.eva",
    "inject_adapter_in_model": "adding",
    "load_peft_weights": "adapter_file",
    "merged_weight": "lora",
    "plan": "targets",
    "prepare_model_for_compiled_hotswap": "hotswap",
    "prepare_model_for_kbit_training": "preparing",
    "preprocess_corda": "calibration.corda",
    "preprocess_loraga": "calibration.lora_ga",
    "quantise_model": "quantising",
    "read_adapter": "adapter_file",
    "replace_lora_weights_loftq": "loftq",
    "rows": "lora_model",
    "set_base_model_state_dict": "state",
    "set_peft_model_state_dict": "state",
    "speedup": "peft_speedup",
    "undo_speedup": "peft_speedup",
    "write_adapter": "adapter_file",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from lowrank.adapter_file import Adapter, load_peft_weights, read_adapter, write_adapter
    from lowrank.adding import inject_adapter_in_model
    from lowrank.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from lowrank.calibration.corda import preprocess_corda
    from lowrank.calibration.eva import get_eva_state_dict, initialize_lora_eva_weights
    from lowrank.calibration.lora_ga import preprocess_loraga
    from lowrank.compat.names import get_peft_config
    from lowrank.config import (
        LoraConfig,
        LoraRuntimeConfig,
        PeftConfig,
        PeftType,
    )
    from lowrank.errors import LowrankError
    from lowrank.formats import convert
    from lowrank.functional import cast_mixed_precision_params
    from lowrank.hotswap import (
        check_hotswap_configs_compatible,
        hotswap_adapter,
        hotswap_adapter_from_state_dict,
        prepare_model_for_compiled_hotswap,
    )
    from lowrank.init_config import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
    from lowrank.layer import LoraLayer
    from lowrank.loftq import replace_lora_weights_loftq
    from lowrank.lora import Lora, delta_weight, merged_weight
    from lowrank.lora_model import (
        LoraModel,
        rows,
    )
    from lowrank.peft import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from lowrank.peft_speedup import speedup, undo_speedup
    from lowrank.preparing import prepare_model_for_kbit_training
    from lowrank.quantisation import Quantisation
    from lowrank.quantising import quantise_model
    from lowrank.quantizer import QuantizationConfig
    from lowrank.state import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from lowrank.status import get_layer_status, get_model_status
    from lowrank.targets import Target, plan
    from lowrank.task_types import TaskType
    from lowrank.train.run.loraplus import create_loraplus_optimizer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lowrank' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lowrank.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


append_if_no_peft()
