"""The tensors of one adapter at one layer: A, B, the magnitude, and their size along the rank."""

from torch import Tensor, nn

RANK_DIMENSION = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}


def with_rank(parameter: str, tensor: Tensor, r: int, experts: int = 1) -> Tensor:
    """The tensor of an adapter, cut to rank `r` or padded to it with zeros, which change nothing.

    parameter: its name within its layer, `lora_A.default.weight`. experts: how many it stacks. What has no
    rank comes back as it is.
    """
    dimension = RANK_DIMENSION.get(parameter.partition(".")[0])
    if dimension is None or tensor.ndim < 2 or tensor.shape[dimension] == r * experts:
        return tensor
    if experts > 1:  # (experts, r, in) and (out, r, experts), flattened
        apart = (experts, -1, tensor.shape[1]) if dimension == 0 else (len(tensor), -1, experts)
        each = _with_size(tensor.reshape(apart), 1, r)
        return each.reshape(-1, tensor.shape[1]) if dimension == 0 else each.flatten(1)
    return _with_size(tensor, dimension, r)


def _with_size(tensor: Tensor, dimension: int, r: int) -> Tensor:
    if tensor.shape[dimension] > r:
        return tensor.narrow(dimension, 0, r)
    shape = list(tensor.shape)
    shape[dimension] = r
    padded = tensor.new_zeros(shape)
    padded.narrow(dimension, 0, tensor.shape[dimension]).copy_(tensor)
    return padded


class Factor(nn.Module):
    """One named tensor of an adapter (A, B or the magnitude), so that its parameter ends in `.weight`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.weight.dtype}"
