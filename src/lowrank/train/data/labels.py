"""The names of classes: found in the data, kept in the model's configuration."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowrank.errors import some
from lowrank.train.data.problems import DataError


def label_options(names: Iterable[str]) -> dict[str, Any]:
    """What a model's configuration says of these classes: by number where all are numbers, else by alphabet."""
    found = set(names)
    digits = all(name.lstrip("-").isdigit() for name in found)
    ordered = sorted(found, key=int) if digits else sorted(found)
    return {
        "num_labels": len(ordered),
        "id2label": dict(enumerate(ordered)),
        "label2id": {name: i for i, name in enumerate(ordered)},
    }


def names_of(options: Mapping[str, Any] | None) -> list[str]:
    """The classes in their order; empty if there are none. LABEL_0, which nobody named, is 0."""
    named = (options or {}).get("id2label") or {}
    names = [name for _, name in sorted((int(i), str(name)) for i, name in named.items())]
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return [str(i) for i in range(len(names))] if unnamed else names


def check_known(rows: Iterable[tuple[str, Iterable[str]]], names: Sequence[str]) -> None:
    """Raises DataError if rows, (where, its labels), have labels that are none of `names`."""
    known, first = set(names), dict[str, str]()
    for where, labels in rows:
        for label in labels:
            if label not in known:
                first.setdefault(label, where)
    if first:
        found = some([f"{label!r} ({where})" for label, where in first.items()])
        raise DataError(
            f"labels that the training rows do not have: {found}; they have {some(list(names))}.\n"
            "A class that was never seen cannot be told: leave such rows out, or train on some."
        )
