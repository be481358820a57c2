"""‖W + ΔW‖ for DoRA's forward, worked out again only where something in it has changed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowrank.lora import Lora, merged_weight_norm, row_squares

_ATTRIBUTE = "_lowrank_row_squares"


def known_norm(
    known: dict[str, Any], name: str, held: Tensor, read: Callable[[], Tensor], lora: Lora
) -> Tensor:
    """‖W + ΔW‖ by row (out,), float32 at least, as `merged_weight_norm` has it.

    known: what the layer remembers, by the adapter's name. held: the parameter that holds W. read: gives
    W (out, in). ‖w‖² of a frozen W is kept, and so is the whole norm of a frozen adapter: then W is not
    read at all. A change in place, or of the parameter, is seen by torch's count of changes and the
    address; one through `.data`, which torch does not count, is not. Compiled code remembers nothing.
    """
    if torch.compiler.is_compiling() or not _watched(held):
        return merged_weight_norm(read(), lora)
    squares = _kept_row_squares(held, read)
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


def _kept_row_squares(held: Any, read: Callable[[], Tensor]) -> Tensor:
    """On the parameter itself, so that it goes when the parameter goes."""
    found = getattr(held, _ATTRIBUTE, None)
    if found is None or found[0] != _state(held):
        with torch.inference_mode(False):
            found = (_state(held), row_squares(read()))
        setattr(held, _ATTRIBUTE, found)
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
