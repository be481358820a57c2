"""Data sets of other programs: their names here, and how their rows are read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.importing.config import Config, Unmapped

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
KEYS = tuple[str | int, ...]


class Reading(NamedTuple):
    """How rows are read: our settings of `data`, those that are not as by default."""

    shape: str | None = None
    columns: Mapping[str, str] = {}
    prompt_template: str | None = None
    chat_template: bool = True
    loss_on: str = "completion"

    def settings(self) -> dict[str, Any]:
        # a name that stays needs no mapping, and one that is mapped has to be there
        columns = {theirs: ours for theirs, ours in self.columns.items() if theirs != ours}
        given = {"shape": self.shape, "columns": columns, "prompt_template": self.prompt_template}
        found: dict[str, Any] = {f"data.{name}": value for name, value in given.items() if value}
        if not self.chat_template:
            found["data.chat_template"] = False
        if self.loss_on != "completion":
            found["data.loss_on"] = self.loss_on
        return found


class DataSet(NamedTuple):
    names: list[str]
    reading: Reading
    keys: KEYS  # where it stands in the configuration


def data_name(path: str, config: str | None = None, split: str | None = None) -> str:
    """A file or folder as it is; a data set on the hub with its part and split: `owner/name:part@split`.

    split: None or "train" for the one that is taken anyway.
    """
    local = Path(path).exists() or path.endswith(SUFFIXES) or path.startswith((".", "/", "~"))
    if local or path.count("/") != 1:
        return path
    part = f":{config}" if config else ""
    return f"{path}{part}" + (f"@{split}" if split and split != "train" else "")


def together(sets: Sequence[DataSet], config: Config, value_of: Any) -> dict[str, Any]:
    """The settings for several data sets. What is read in another way than the first is left out, and listed."""
    if not sets:
        return {}
    first, names = sets[0], list(sets[0].names)
    for other in sets[1:]:
        if other.reading == first.reading:
            names += other.names
        else:
            config.miss(
                other.keys,
                value_of(other),
                f"its rows are read in another way than those of {first.names[0]}, and a run reads all in one: "
                "write them anew in one shape",
            )
    return {"data.train": names[0] if len(names) == 1 else names, **first.reading.settings()}


def jinja(template: str, names: Mapping[str, str]) -> str:
    """`{field}` of Python's format as `{{ column }}`."""
    for field, column in names.items():
        template = template.replace(f"{{{field}}}", f"{{{{ {column} }}}}")
    if "{" in template.replace("{{", "").replace("{%", ""):
        raise Unmapped(f"a template with other fields than {', '.join(names)}")
    return template
