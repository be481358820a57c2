from lowrank.functional import disable_input_dtype_casting, rescale_adapter_scale
from lowrank.hub import check_if_peft_model

__all__ = ["check_if_peft_model", "disable_input_dtype_casting", "rescale_adapter_scale"]
