from lowrank.fused_experts import build_peft_weight_mapping

__all__ = ["build_peft_weight_mapping"]
