"""Weights of which several processes hold a part each (torch's DTensor)."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered if it is shared out; any other as it is. Collective: every process has to call it."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor
