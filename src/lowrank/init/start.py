"""What an initialisation is: the type of its function, and of its result."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lowrank.lora import Lora


class Start(NamedTuple):
    """The start values of one adapter at one weight, in matrix form.

    taken_out: scaling·B·A is taken out of W, so that the model starts as its base: training then moves the
    adapter from this start, ΔW = scaling·(B·A − B₀·A₀).
    base: a weight that takes W's place while the adapter is there, in W's dtype.
    less: what was taken out of W before it was rounded to that; None: nothing.
    """

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    taken_out: bool = False
    base: Tensor | None = None  # (out, in)
    less: Lora | None = None


# `read` gives W (out, in) when it is called; the shape (out, in); r; the scaling. What else an
# initialisation needs (a covariance, a gradient, a number of bits) is bound to it beforehand.
Init = Callable[[Callable[[], Tensor], tuple[int, int], int, float], Start]
