"""How transformers has to rename an adapter's tensors while it loads them into a model of its own."""

from collections.abc import Sequence
from typing import Any


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """transformers' WeightRenamings from the keys of an adapter's file to the parameters in the model.

    weight_conversions: those of the base, whose renamings hold for the adapter too. Its other
    conversions (experts that are fused into one tensor) have no counterpart: an adapter for single
    experts does not fit fused ones, and transformers reports its tensors as unexpected.
    """
    from transformers.core_model_loading import WeightRenaming

    renamed = [
        WeightRenaming("base_model.model.", ""),
        WeightRenaming(r"(lora_(?:embedding_)?[AB])", rf"\1.{adapter_name}"),
        # the file has neither the adapter's name nor, for the magnitude, a `.weight`
        WeightRenaming(r"(lora_magnitude_vector)$", rf"\1.{adapter_name}.weight"),
    ]
    return renamed + [c for c in weight_conversions or () if isinstance(c, WeightRenaming)]
