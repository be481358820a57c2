"""How many bytes the tensors of a model hold, quantised weights too."""

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def held_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that the model holds, with the scales of quantised ones; what is shared counts once.

    On the meta device: what they would be.
    """
    held = itertools.chain(model.parameters(), model.buffers())
    # LLM.int8's scales of the rows move here at the first forward
    states = (getattr(getattr(module, "state", None), "SCB", None) for module in model.modules())
    found = [part for tensor in (*held, *states) for part in _parts(tensor)]
    return sum({part.data_ptr() or id(part): part.nbytes for part in found}.values())


def _parts(tensor: Any) -> Iterator[Tensor]:
    """A tensor's own numbers, and what a quantised one keeps beside its codes."""
    if not isinstance(tensor, Tensor):
        return
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)  # bitsandbytes' 4 bits
    beside = state.as_dict().values() if state is not None else [getattr(tensor, "SCB", None)]
    yield from (one for one in beside if isinstance(one, Tensor))
