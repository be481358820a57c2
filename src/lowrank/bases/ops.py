"""How a weight meets the input, split in two: `down` with A and `up` with B.

For every op, `up(down(x, A), B)` is what the layer itself, without its bias, would give with the weight
B·A. `down` also applies LoRA's dropout, which acts on the layer's input.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.kernels.dropout_linear import dropout_linear
from lowrank.kernels.low_rank_add import low_rank_add


class Op(NamedTuple):
    # base layer, x, A (r, in), dropout -> h
    down: Callable[[Any, Tensor, Tensor, nn.Module], Tensor]
    # base layer, h, B (out, r) -> y
    up: Callable[[Any, Tensor, Tensor], Tensor]
    # base layer -> which dimension of y is `out`: bias and magnitude follow it
    channel: Callable[[Any], int]
    floating: bool  # whether x is floating point, and so sets the dtype of the product
    # y, h, B, scaling -> y + scaling·up(h, B) in one step, where there is a faster way
    up_onto: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None


def _linear_down(base: Any, x: Tensor, A: Tensor, dropout: nn.Module) -> Tensor:
    if type(dropout) is nn.Dropout and dropout.training and 0 < dropout.p < 1:
        return dropout_linear(x, A, dropout.p)
    return F.linear(dropout(x), A)


def _linear_up(base: Any, h: Tensor, B: Tensor) -> Tensor:
    return F.linear(h, B)


def _lookup_down(base: Any, x: Tensor, A: Tensor, dropout: nn.Module) -> Tensor:
    h = F.embedding(x, A.T, padding_idx=base.padding_idx)
    if isinstance(dropout, nn.Identity):
        return h
    # x stands for one-hot rows: dropping a row's only non-zero entry drops the token's whole h
    return h * dropout(torch.ones_like(h[..., :1]))


def _lookup_up(base: Any, h: Tensor, B: Tensor) -> Tensor:
    y = F.linear(h, B)
    scale = getattr(base, "embed_scale", None)  # Gemma 3 scales its embeddings in forward
    if isinstance(scale, Tensor):  # which the layer rounds to its dtype
        scale = scale.to(y)
    return y if scale is None else y * scale


def _convolution_down(base: Any, x: Tensor, A: Tensor, dropout: nn.Module) -> Tensor:
    kernel = A.reshape(A.shape[0], *base.weight.shape[1:])
    if base.groups > 1:  # each group of the input meets all of A
        kernel = kernel.repeat(base.groups, *[1] * (kernel.ndim - 1))
    # the layer's own stride, padding, dilation, padding_mode and groups
    return base._conv_forward(dropout(x), kernel, None)  # (batch, groups·r, *positions)


def _convolution_up(base: Any, h: Tensor, B: Tensor) -> Tensor:
    positions = base.weight.ndim - 2
    convolution = (F.conv1d, F.conv2d, F.conv3d)[positions - 1]
    return convolution(h, B.reshape(*B.shape, *[1] * positions), groups=base.groups)


def _last(base: Any) -> int:
    return -1


def _before_positions(base: Any) -> int:
    return 1 - base.weight.ndim  # from the end: a convolution also takes an input without a batch


LINEAR = Op(_linear_down, _linear_up, channel=_last, floating=True, up_onto=low_rank_add)
LOOKUP = Op(_lookup_down, _lookup_up, channel=_last, floating=False)
CONVOLUTION = Op(_convolution_down, _convolution_up, channel=_before_positions, floating=True)
