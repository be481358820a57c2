"""LoRA, from plan to proof: plan, train, inspect, merge, verify and ship low-rank adapters."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> the module that defines it, imported when the name is first used
_PUBLIC = {
    "Adapter": "adapter_file",
    "Lora": "lora",
    "LoraConfig": "config",
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
    "Target": "targets",
    "TaskType": "config",
    "convert": "formats",
    "create_loraplus_optimizer": "train.loraplus",
    "delta_weight": "lora",
    "get_peft_model": "peft",
    "get_peft_model_state_dict": "state",
    "inject_adapter_in_model": "lora_model",
    "merged_weight": "lora",
    "plan": "targets",
    "prepare_model_for_kbit_training": "lora_model",
    "read_adapter": "adapter_file",
    "rows": "lora_model",
    "set_peft_model_state_dict": "state",
    "speedup": "peft_speedup",
    "undo_speedup": "peft_speedup",
    "write_adapter": "adapter_file",
}

__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from lowrank.adapter_file import Adapter, read_adapter, write_adapter
    from lowrank.config import LoraConfig, LoraRuntimeConfig, PeftConfig, PeftType, TaskType
    from lowrank.errors import LowrankError
    from lowrank.formats import convert
    from lowrank.layer import LoraLayer
    from lowrank.lora import Lora, delta_weight, merged_weight
    from lowrank.lora_model import (
        LoraModel,
        inject_adapter_in_model,
        prepare_model_for_kbit_training,
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
    from lowrank.state import get_peft_model_state_dict, set_peft_model_state_dict
    from lowrank.targets import Target, plan
    from lowrank.train.loraplus import create_loraplus_optimizer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lowrank' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lowrank.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
