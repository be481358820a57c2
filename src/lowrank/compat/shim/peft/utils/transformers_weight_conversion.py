from lowrank.compat.weight_conversion import build_peft_weight_mapping

__all__ = ["build_peft_weight_mapping"]
