"""Weights of which several processes hold a part each (torch's DTensor)."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered if it is shared out; any other as it is. Collective: every process has to call it."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def shared_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor`, whole in every process, shared out as `parameter` is. Collective."""
    if not hasattr(parameter, "full_tensor") or hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    there = tensor.to(parameter.device)
    return distribute_tensor(there, parameter.device_mesh, parameter.placements)
