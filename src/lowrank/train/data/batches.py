"""Examples of any task as tensors, and what a model's outputs for them say."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank.train.data.encode import IGNORE
from lowrank.train.evaluate import by_length, device_of, evaluating, in_order
from lowrank.train.run import processes

Example = dict[str, Any]
T = TypeVar("T")


def collate_padded(pad_id: int) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """A collator: what is a list becomes (rows, longest), filled up at the right; numbers become (rows,).

    Labels are filled up with IGNORE. Padding is known by position, from the attention mask that is made here.
    """
    fill = {"input_ids": pad_id, "labels": IGNORE}

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = {
            name: _padded([e[name] for e in examples], fill.get(name, 0)) for name in examples[0]
        }
        ones = [[1] * len(e["input_ids"]) for e in examples]
        return {**batch, "attention_mask": _padded(ones, 0)}

    return collate


def _padded(values: list[Any], filling: int) -> Tensor:
    if not isinstance(values[0], list):
        return torch.tensor(values)
    width = max(map(len, values))
    return torch.tensor([value + [filling] * (width - len(value)) for value in values])


def totalled(
    read: Callable[[Sequence[int], Any, Tensor], tuple[float, Sequence[T]]],
    model: nn.Module,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    batch_size: int,
) -> tuple[float, list[T]]:
    """A sum over all `examples`, and what is found of each, in their order; several processes divide them.

    read: (which examples, the model's output for them, their labels) → the sum over these, something for each.
    """
    device = device_of(model)

    def work(chosen: Sequence[int]) -> tuple[float, Sequence[T]]:
        batch = {k: v.to(device) for k, v in collate([examples[i] for i in chosen]).items()}
        labels = batch.pop("labels")
        return read(chosen, model(**batch), labels)

    alike = by_length([len(e["input_ids"]) for e in examples], batch_size)
    with evaluating(model):
        sums, found = zip(*processes.divided(work, alike, model), strict=True)
    return sum(sums), in_order(alike, found)
