"""‖W + ΔW‖ for DoRA's forward, worked out again only where something in it has changed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowrank.lora import Lora, merged_weight_norm, row_squares

_ATTRIBUTE = "_lowrank_row_squares"


def known_norm(layer: Any, name: str, lora: Lora) -> Tensor:
    """‖W + ΔW‖ by row (out,), float32 at least, as `merged_weight_norm` has it.

    layer: the LoraLayer, which remembers it by the adapter's name. ‖w‖² of a frozen W is kept, and so is the whole
    norm of a frozen adapter: then W is not read at all. A change in place, or of the parameter, is seen by torch's
    count of changes and the address; one through `.data`, which torch does not count, is not. Compiled code
    remembers nothing.
    """
    known, held, read = layer.norms, layer.unmerged_parameter(), layer.unmerged_weight
    if torch.compiler.is_compiling() or not _watched(held):
        return merged_weight_norm(read(), lora)
    squares = _kept_row_squares(layer, held)
    if not (_watched(lora.A) and _watched(lora.B)):
        known.pop(name, None)
        return merged_weight_norm(read(), lora, squares)
    scaling = lora.scaling
    state = (
        id(squares),
        _state(lora.A),
        _state(lora.B),
        _state(scaling) if isinstance(scaling, Tensor) else scaling,
    )
    found = known.get(name)
    if found is None or found[0] != state:
        with torch.inference_mode(False):
            norm = merged_weight_norm(read(), lora, squares)
        # what is named by its address is kept alive, so that nothing else can have that address
        found = known[name] = (state, norm, squares, lora)
    return found[1]


def _kept_row_squares(layer: Any, held: Any) -> Tensor:
    """On the parameter itself, so that it goes when the parameter goes; an embedding's rows are a tied head's columns."""
    kept: dict[Any, tuple] = vars(held).setdefault(_ATTRIBUTE, {})
    found = kept.get(layer.kind.hold)
    if found is None or found[0] != _state(held):
        with torch.inference_mode(False):
            found = kept[layer.kind.hold] = (_state(held), row_squares(layer.unmerged_weight()))
    return found[1]


def _watched(tensor: Tensor) -> bool:
    """Whether a change of `tensor` can be seen. Some optimizers write to what they train behind torch's back."""
    plain = isinstance(tensor, nn.Parameter) or type(tensor) is Tensor
    return (
        plain
        and not is_traceable_wrapper_subclass(tensor)
        and not tensor.requires_grad
        and not tensor.is_inference()
    )


def _state(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    return tensor._version, tensor.data_ptr(), tensor.dtype
