"""A configuration of another program: its keys with their lines, and what became of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.errors import LowrankError


class ImportingError(LowrankError, ValueError):
    """A configuration that cannot be read, or is of no program that is known."""


class Unmapped(ValueError):
    """Why a key is not translated. matters: whether that changes what is learnt."""

    def __init__(self, why: str, matters: bool = True):
        super().__init__(why)
        self.matters = matters


class Mapped(NamedTuple):
    name: str  # of our setting: "lora.r"
    value: Any
    source: str  # "lora_rank, line 7" or "lora_rank, which is 8 by default"


class NotMapped(NamedTuple):
    key: str  # "datasets.0.shards"
    value: Any
    where: str  # "sft.yaml:12"
    why: str
    matters: bool


@dataclass
class Config:
    """What the file says, and under it what the program takes where the file says nothing."""

    path: Path
    written: dict[str, Any]  # keys without a value are left out: they say nothing
    lines: Mapping[tuple[str | int, ...], int]  # of every key, the nested ones too
    program: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None  # the base that is put in place of the file's
    task: str | None = None  # what the user says that the file is for
    mapped: dict[str, Mapped] = field(default_factory=dict)
    missed: list[NotMapped] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        """The value in force: the file's, or the program's own."""
        return self.written.get(key, self.defaults.get(key))

    def where(self, *keys: str | int) -> str:
        """ "sft.yaml:12": the line of the key, or of the nearest one around it."""
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return f"{self.path.name}:{self.lines[keys]}" if keys else self.path.name

    def miss(self, keys: tuple[str | int, ...], value: Any, why: str, matters: bool = True) -> None:
        name = ".".join(map(str, keys))
        self.missed.append(NotMapped(name, value, self.where(*keys), why, matters))

    def remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)


def read_config(path: Path) -> Config:
    """The keys of a YAML or JSON file with their lines. Raises ImportingError."""
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        value = loader.construct_document(root) if root else None
    except FileNotFoundError:
        raise ImportingError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ImportingError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ImportingError(f"{place}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ImportingError(f"{path}: expected keys and values, such as `learning_rate: 1e-4`")
    lines: dict[tuple[str | int, ...], int] = {}
    _lines(root, (), lines)
    return Config(path, {key: held for key, held in value.items() if held is not None}, lines)


def _lines(
    node: Any, above: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]
) -> None:
    import yaml

    if isinstance(node, yaml.MappingNode):
        for key, held in node.value:
            lines[(*above, key.value)] = key.start_mark.line + 1
            _lines(held, (*above, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, held in enumerate(node.value):
            lines[(*above, i)] = held.start_mark.line + 1
            _lines(held, (*above, i), lines)
