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
        # saved modules that were disabled; transformers enables LoRA layers alone, and they enable these
        self.disabled_copies: list[Any] = []
        # activated LoRA: by adapter, its invocation tokens; where it starts in each row of this forward;
        # where the forward's positions end, and how many they are; the output whose backward is to come
        self.invocations: dict[str, tuple[int, ...]] = {}
        self.starts: dict[str, Tensor] = {}
        self.end = self.length = 0
        self.awaited: Any = None

    def activation(self, name: str, h: Tensor, rows: list[int] | None) -> Tensor | None:
        """1 where the adapter acts on h (*, positions, r), 0 where it does not; None: it acts everywhere.

        rows: those of the batch that h holds, None for all. Each may stand in h several times (beams).
        """
        if name not in self.invocations:
            return None
        if name not in self.starts:
            raise RowsError(
                f"Adapter {name!r} is an activated LoRA: it acts from its invocation on, so it has to see the token ids. "
                "Run it through PeftModel's forward or generate."
            )
        starts = self.starts[name].to(h.device)
        starts = starts if rows is None else starts[index(rows, h)]
        length = h.shape[-2] if h.ndim > 2 else self.length
        found = h.numel() // max(1, h.shape[-1] * length)
        if found % len(starts) or found * length * h.shape[-1] != h.numel():
            raise RowsError(
                f"Adapter {name!r} is an activated LoRA, and a layer was given {tuple(h.shape[:-1])}, which are not the "
                f"{length} positions of {len(starts)} rows: leave that layer out of the adapter."
            )
        positions = torch.arange(self.end - length, self.end, device=h.device)
        on = positions >= starts.repeat_interleave(found // len(starts))[:, None]
        return on.to(h.dtype).view(*h.shape[:-1], 1)

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
    runs(x.shape, x.shape[0], count, where)
    return x.reshape(count, -1, x.shape[-1])


def runs(shape: Sequence[int], length: int, count: int, where: str) -> int:
    """How many of `length` entries each of `count` rows has. Raises RowsError, with the tensor's shape, if that is no number."""
    if length % count:
        raise RowsError(
            f"{where} was given {tuple(shape)}, which does not divide into the {count} rows of adapter_names: this "
            "layer sees something else than the batch (positions, routed tokens). Leave it out of the adapters, or "
            "run the adapters one after another."
        )
    return length // count


def groups(names: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each adapter, in the order in which the adapters first appear; without the base's."""
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name != BASE:
            found.setdefault(name, []).append(row)
    return found


def index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)
