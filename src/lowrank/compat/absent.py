"""Names of PEFT that others import to ask `isinstance`, and that nothing of ours is an instance of."""

from typing import Any, NoReturn


class PeftMixedModel:
    """PEFT's model with adapters of several methods; lowrank does LoRA only."""

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "PeftMixedModel mixes adapter methods, and lowrank does LoRA only. "
            "Use PeftModel, or PEFT itself for other methods."
        )
