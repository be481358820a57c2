"""The optimisers of `train.optimizer`: transformers' names for them, and who brings them."""

import importlib.util
from typing import NamedTuple

from lowrank.errors import MissingExtraError


class Optimizer(NamedTuple):
    transformers: str  # TrainingArguments' `optim`
    bitsandbytes: bool = True  # whether bitsandbytes brings it


# 8 bit: the state in 8 bits by blocks (Dettmers et al. 2022); paged: the state moves to the CPU when a GPU
# runs out of memory (QLoRA, §3); on a CPU paged is as if it were not
OPTIMIZERS = {
    "adamw": Optimizer("adamw_torch_fused", bitsandbytes=False),
    "adafactor": Optimizer("adafactor", bitsandbytes=False),
    "adamw_8bit": Optimizer("adamw_bnb_8bit"),
    "paged_adamw": Optimizer("paged_adamw_32bit"),
    "paged_adamw_8bit": Optimizer("paged_adamw_8bit"),
    "lion": Optimizer("lion_32bit"),
    "lion_8bit": Optimizer("lion_8bit"),
    "paged_lion_8bit": Optimizer("paged_lion_8bit"),
}


def transformers_name(name: str) -> str:
    """transformers' name of one of OPTIMIZERS. Raises MissingExtraError where its package is missing."""
    optimizer = OPTIMIZERS[name]
    if optimizer.bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        without = [name for name, row in OPTIMIZERS.items() if not row.bitsandbytes]
        raise MissingExtraError(
            f"train.optimizer {name} is bitsandbytes', which is not installed: pip install 'lowrank[bnb]'.\n"
            f"Without it: {' or '.join(without)}."
        )
    return optimizer.transformers
