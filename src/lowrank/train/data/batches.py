"""Examples of any task as tensors, and a model's outputs for them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.train.data.encode import IGNORE
from lowrank.train.evaluate import device_of, evaluating

Example = dict[str, Any]


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


def outputs(
    model: nn.Module,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    batch_size: int,
) -> Iterator[tuple[list[int], Any, Tensor]]:
    """(which examples, the model's output for them, their labels), a batch of like length at a time."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    device = device_of(model)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {k: v.to(device) for k, v in collate([examples[i] for i in chosen]).items()}
            labels = batch.pop("labels")
            yield chosen, model(**batch), labels
