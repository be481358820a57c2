from lowrank import LoraModel as BaseTuner
from lowrank.compat.names import BaseTunerLayer
from lowrank.functional import (
    cast_adapter_dtype,
    delete_adapter,
    set_adapter,
    set_requires_grad,
)

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "cast_adapter_dtype",
    "delete_adapter",
    "set_adapter",
    "set_requires_grad",
]
