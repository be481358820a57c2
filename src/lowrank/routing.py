"""Which rows of a batch go through which adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import RowsError

BASE = "__base__"  # a row without any adapter


class Routing:
    """One object that all layers of a model share. `names[i]` is the adapter of row i; None: no routing.

    `cache` holds what layers have made of their adapters for these rows (stacked factors). It is used
    only without autograd, and emptied when the routing ends.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] | None = None
        self.cache: dict[Any, Any] = {}

    @contextmanager
    def route(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, row i goes through adapter names[i]; afterwards, also after an error, all is as before."""
        before = self.names, self.cache
        self.names, self.cache = tuple(names), {}
        try:
            yield
        finally:
            self.names, self.cache = before


def blocks(x: Tensor, count: int, where: str) -> Tensor:
    """x as (count, rows of a block, features): its first dimension split into `count` equal runs.

    A batch of `count` rows, each with its positions; or with every row repeated in place (beams), or
    flattened with its positions. Raises RowsError if the first dimension does not divide.
    """
    if x.shape[0] % count:
        raise RowsError(
            f"{where} was given {tuple(x.shape)}, which does not divide into the {count} rows of adapter_names: this "
            "layer sees something else than the batch (positions, routed tokens). Leave it out of the adapters, or "
            "run the adapters one after another."
        )
    return x.reshape(count, -1, x.shape[-1])


def groups(names: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each adapter, in the order in which the adapters first appear; without the base's."""
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name != BASE:
            found.setdefault(name, []).append(row)
    return found


def index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)
