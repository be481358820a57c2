"""Start values of A and B. An initialisation is one function, written once on W (out, in).

Each takes `read` (gives W when it is called, for the initialisations that look at it), the shape
(out, in), r and the scaling, and returns a `Start`: A (r, in), B (out, r), both in float32, and whether
scaling·B·A is taken out of W.
"""

import math
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lowrank.init.start import Init, Start
from lowrank.init.weight import loftq, loftq_again, olora, pissa

__all__ = [
    "EMBEDDING_INITS",
    "INITS",
    "WAITS_FOR",
    "Init",
    "Start",
    "computed_again",
    "init_named",
    "loftq",
    "loftq_again",
    "of_experts",
    "taken_out",
]


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


def of_experts(init: Init, experts: int) -> Init:
    """`init` for each of several experts on its own: A (expert, r, in), B (expert, out, r)."""

    def stacked(
        read: Callable[[], Tensor], shape: tuple[int, int], r: int, scaling: float
    ) -> Start:
        starts = [init(lambda e=e: read()[e], shape, r, scaling) for e in range(experts)]  # type: ignore[misc]
        A, B = (
            torch.stack([start.A for start in starts]),
            torch.stack([start.B for start in starts]),
        )
        return Start(A, B, starts[0].taken_out)

    return stacked


def eva(read: Callable[[], Tensor], shape: tuple[int, int], r: int, scaling: float) -> Start:
    """Zeros, in the place of what `initialize_lora_eva_weights` will give (`WAITS_FOR`)."""
    out, in_ = shape
    return Start(_zeros(r, in_), _zeros(out, r))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32)


INITS: dict[bool | str, Init] = {
    True: kaiming,
    False: random,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
    "loftq": loftq,
    "eva": eva,
}

# Initialisations whose values come later, and from what; until then a layer does not run with the adapter.
WAITS_FOR: dict[bool | str, str] = {"eva": "initialize_lora_eva_weights(model, dataloader)"}

# An embedding's zero factor is A: it is a table with a row for each token, and B is shared by all.
EMBEDDING_INITS: dict[bool | str, Init] = {**INITS, True: embedding, "gaussian": embedding}

# Names whose start is taken out of W -> whether W alone gives that start again, here and in PEFT. Where
# it does not, the start has to be kept beside the adapter.
_TAKEN_OUT: dict[bool | str, bool] = {
    "pissa": True,
    "olora": True,
    "corda": False,
    "lora_ga": False,
}
_PISSA_NITER = re.compile(r"pissa_niter_(\d+)")


def init_named(name: bool | str, embedding: bool = False) -> Init:
    """The initialisation that `init_lora_weights=name` means, for an embedding or for any other layer."""
    iterations = _PISSA_NITER.fullmatch(name) if isinstance(name, str) else None
    if iterations:
        return partial(pissa, iterations=int(iterations[1]))
    return (EMBEDDING_INITS if embedding else INITS)[name]


def taken_out(name: bool | str) -> bool:
    """Whether `init_lora_weights=name` takes its start out of W."""
    return name in _TAKEN_OUT or (isinstance(name, str) and bool(_PISSA_NITER.fullmatch(name)))


def computed_again(name: bool | str) -> bool:
    """Whether the start that `name` took out of W follows from W, exactly, and for every library."""
    return _TAKEN_OUT.get(name, False)
