"""The files of a model folder, or of a repository on the Hub: where each lies, and each tensor in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from lowrank.errors import ModelFolderError
from lowrank.tensor_files import Entry, entries

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def file_of(source: str | Path, name: str, revision: str | None = None) -> str | None:
    """Where a file of a folder, or of a repository on the Hub, lies here; None if it has no such file."""
    from transformers.utils import cached_file

    return cached_file(
        str(source),
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def has_tokenizer(source: str | Path, revision: str | None = None) -> bool:
    """Whether a tokenizer lies in the folder (or repository)."""
    names = ("tokenizer_config.json", "tokenizer.json")
    return any(file_of(source, name, revision) for name in names)


class Stored(NamedTuple):
    """What the safetensors files of a model hold."""

    tensors: dict[str, Entry]
    metadata: dict[str, dict[str, str]]  # by the file's name

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.tensors.values())


def stored_tensors(folder: str | Path, revision: str | None = None) -> Stored | None:
    """Where each tensor of a folder, or of a repository on the Hub, lies; None without safetensors files."""
    names = [WEIGHTS]
    if file_of(folder, WEIGHTS, revision) is None:
        index = file_of(folder, INDEX, revision)
        if index is None:
            return None
        try:
            places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFolderError(
                f"{index} is broken, or has no weight_map of file names: {error!r}"
            ) from error
    found = Stored({}, {})
    for name in names:
        path = file_of(folder, name, revision)
        if path is None:
            raise ModelFolderError(f"{folder} lacks {name}, which its {INDEX} names.")
        tensors, metadata = entries(Path(path))
        found.tensors.update(tensors)
        found.metadata[name] = metadata
    return found
