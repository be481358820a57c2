"""Data as records: the columns of every row, and the file and line where it stands."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.train.data.file_formats import FORMATS, TABLES, Layout, Lines, first_line, jsonl, needs
from lowrank.train.data.problems import BadFile, BadRow, Problems


class Record(NamedTuple):
    columns: dict[str, Any]
    where: str  # "train.jsonl:17"


def read_records(
    names: Iterable[str | Path], problems: Problems, layout: Layout, split: str = "train"
) -> Iterator[Record]:
    """The records of files, folders, datasets on disk and on the hub, in order.

    Of what has several splits, `split` is read. What cannot be read is added to `problems`.
    """
    for name in names:
        try:
            sources = sources_of(str(name), split)
        except BadFile as bad:
            problems.add_file(str(name), str(bad))
            continue
        for where, lines in sources:
            empty = True
            try:
                for line, columns in lines(layout):
                    empty = False
                    if isinstance(columns, BadRow):
                        problems.add(f"{where}:{line}", str(columns))
                    else:
                        yield Record(columns, f"{where}:{line}")
            except BadFile as bad:
                problems.add_file(where, str(bad), bad.line)
            else:
                if empty:
                    problems.add_file(where, "no rows; the file is empty")


def sources_of(name: str, split: str) -> list[tuple[str, Callable[[Layout], Lines]]]:
    """(what to call it, its lines) of every file behind `name`. Raises BadFile."""
    path = Path(name)
    if path.is_file():
        return [_file(path)]
    if path.is_dir():
        if any((path / mark).is_file() for mark in ("dataset_info.json", "dataset_dict.json")):
            return [(name, lambda layout: _dataset(_on_disk(path), None, split))]
        return [_file(p) for p in files_of(path, split)]
    hub = re.fullmatch(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<split>.+))?", name)
    if hub is None or Path(hub["id"]).suffix in FORMATS or name.startswith("."):
        raise BadFile("no such file")
    return [(name, lambda layout: _dataset(_on_hub(**hub.groupdict()), hub["split"], split))]


# what a file's name says about the split that it holds: the hub's own words
SPLITS = {
    "train": r"train(ing)?",
    "test": r"test(ing)?|eval(uation)?",
    "validation": r"val(id(ation)?)?|dev",
}


def files_of(folder: Path, split: str) -> list[Path]:
    """The data files in `folder`; where their names tell splits, those of `split` alone."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in FORMATS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise BadFile(f"no file in this folder ends in {', '.join(FORMATS)}")
    by_split = {
        kind: [
            path
            for path in files
            if re.search(rf"(?<![a-z])({words})(?![a-z])", _inside(path, folder))
        ]
        for kind, words in SPLITS.items()
    }
    if not any(by_split.values()):
        return files
    wanted = by_split[split] or (by_split["validation"] if split == "test" else [])
    if not wanted:
        raise BadFile(
            f"the names of its files tell splits, and none is {split!r}: "
            f"{', '.join(path.name for path in files[:9])}. Name the files themselves"
        )
    return wanted


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix().lower()


def _file(path: Path) -> tuple[str, Callable[[Layout], Lines]]:
    reader = FORMATS.get(path.suffix, jsonl if path.suffix == "" else None)
    if reader is None:
        raise BadFile(f"{path.suffix} is none of {', '.join(FORMATS)}")
    return str(path), lambda layout: _with_layout(reader, path, layout)


def _with_layout(reader: Callable[..., Lines], path: Path, layout: Layout) -> Lines:
    if reader in TABLES:
        return reader(path, layout)
    if layout.separator or layout.header:
        raise BadFile(
            "data.separator, and data.columns as a list, are for tables in text: "
            + ", ".join(suffix for suffix, table in FORMATS.items() if table in TABLES)
        )
    return reader(path)


def _on_disk(path: Path) -> Any:
    needs("datasets")
    from datasets import load_from_disk

    return load_from_disk(str(path))


def _on_hub(id: str, config: str | None, split: str | None) -> Any:
    needs("datasets")
    from datasets import load_dataset

    try:
        return load_dataset(id, config, split=split)
    except Exception as error:  # of many kinds: offline, no such name, a configuration to choose
        raise BadFile(
            f"no such file here, and no dataset of the hub: {first_line(error)}"
        ) from None


def _dataset(data: Any, chosen: str | None, split: str) -> Lines:
    """The rows of a Dataset, or of the split of a DatasetDict that is meant."""
    if isinstance(data, dict) and chosen is None:
        order = (split, "validation") if split == "test" else (split,)
        split = next((name for name in order if name in data), split)
        if split not in data:
            raise BadFile(f"no split {split!r}; it has {', '.join(data)}: name one as …@SPLIT")
        data = data[split]
    names = {  # classes as their names, as a file would have them
        column: feature.names
        for column, feature in data.features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    for number, row in enumerate(data, start=1):
        for column, labels in names.items():
            value = row[column]
            row[column] = labels[value] if isinstance(value, int) and value >= 0 else None
        yield number, row
