"""Start values of A and B. An initialisation is one function, written once on W (out, in).

Each takes `read` (gives W when it is called, for the initialisations that look at it), the shape
(out, in), r and the scaling, and returns A (r, in), B (out, r) in float32 and the change that it
makes to W, or None.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Start(NamedTuple):
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    base_change: Tensor | None = None  # (out, in), added to W


Init = Callable[[Callable[[], Tensor], tuple[int, int], int, float], Start]


def kaiming(read: Callable[[], Tensor], shape: tuple[int, int], r: int, scaling: float) -> Start:
    """A uniform in ±1/√in (Kaiming with a = √5, as nn.Linear starts), B zero: Hu et al. 2021's code."""
    out, in_ = shape
    A = torch.empty(r, in_, dtype=torch.float32)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return Start(A, _zeros(out, r))


def gaussian(read: Callable[[], Tensor], shape: tuple[int, int], r: int, scaling: float) -> Start:
    """A normal with standard deviation 1/r, B zero."""
    out, in_ = shape
    return Start(_normal(r, in_) / r, _zeros(out, r))


def random(read: Callable[[], Tensor], shape: tuple[int, int], r: int, scaling: float) -> Start:
    """A and B both as `kaiming` starts A, so that ΔW ≠ 0: `init_lora_weights=False`, for tests."""
    out, in_ = shape
    A, B = (torch.empty(shape, dtype=torch.float32) for shape in ((r, in_), (out, r)))
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    return Start(A, B)


def orthogonal(read: Callable[[], Tensor], shape: tuple[int, int], r: int, scaling: float) -> Start:
    """A and B in orthogonal subspaces of the rank dimension, neither zero, and ΔW = B·A = 0.

    The even and the odd rows of an orthogonal (r, r) matrix, each mixed by a random matrix over 10 (the
    scale PEFT uses). r must be even, which plan() checks.
    """
    out, in_ = shape
    Q = torch.linalg.qr(_normal(r, r)).Q
    A = (_normal(in_, r // 2) @ Q[0::2]).T / 10
    B = (_normal(out, r // 2) @ Q[1::2]) / 10
    return Start(A.contiguous(), B)


def embedding(read: Callable[[], Tensor], shape: tuple[int, int], r: int, scaling: float) -> Start:
    """A zero, B standard normal: how embeddings start (loralib, PEFT)."""
    out, in_ = shape
    return Start(_zeros(r, in_), _normal(out, r))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32)


INITS: dict[bool | str, Init] = {
    True: kaiming,
    False: random,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
}

# An embedding's zero factor is A: it is a table with a row for each token, and B is shared by all.
EMBEDDING_INITS: dict[bool | str, Init] = {**INITS, True: embedding, "gaussian": embedding}
