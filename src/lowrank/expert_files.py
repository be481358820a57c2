"""Fused experts as a checkpoint's files hold them, one expert's matrix at a time.

transformers 5 saves some as they are, one tensor of three dimensions, and others as a tensor for each expert and
each of the matrices that the model holds on top of each other (`experts.0.w1`, `experts.0.w3`, …).
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import listed
from lowrank.fused_experts import conversions_of, fusions
from lowrank.path_patterns import is_or_ends
from lowrank.tensor_files import Entry, opened, read_block


def experts_of(entry: Entry) -> list[Callable[[], Tensor]]:
    """What reads each matrix of a tensor that holds them all; a tensor of two dimensions is one matrix."""
    return [
        partial(_slice, entry, e) for e in range(entry.shape[0] if len(entry.shape) == 3 else 1)
    ]


def _slice(entry: Entry, e: int) -> Tensor:
    size = math.prod(entry.shape[-2:])
    with opened(entry.file) as file:
        return read_block(file, entry, e * size, (e + 1) * size).view(entry.shape[-2:])


def fused_from(
    model: Any, parameter: str, entries: Mapping[str, Entry]
) -> list[Callable[[], Tensor]] | str:
    """What reads each expert's matrix of `parameter`, (out, in), from the files' tensors that it is made of.

    entries: those, by their names in the files. A sentence where transformers does more than stack them.
    """
    fusion = next(
        (f for f in fusions(conversions_of(model)) if is_or_ends(parameter, f.parameter)), None
    )
    if fusion is None:
        return f"{parameter} is stored in another form than the model's, and not as one tensor an expert."
    by_expert: dict[int, dict[str, Entry]] = {}
    for key, entry in entries.items():
        match = re.search(r"\.(\d+)\.([^.]+)\.weight$", key)
        if match:
            by_expert.setdefault(int(match[1]), {})[match[2]] = entry
    count = 1 + max(by_expert, default=-1)
    lacking = [
        f"{e}.{name}"
        for e in range(count)
        for name in fusion.names
        if name not in by_expert.get(e, {})
    ]
    if lacking or not count:
        return (
            f"{parameter} is stored expert by expert, and some are not there. {listed(lacking[:3])}"
        )
    return [partial(_on_top, [by_expert[e][name] for name in fusion.names]) for e in range(count)]


def _on_top(entries: list[Entry]) -> Tensor:
    return torch.cat([entry.read() for entry in entries])
