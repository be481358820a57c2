"""Data as records: the columns of every row, and the file and line where it stands."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.errors import LowrankError, MissingExtraError

SHOWN = 20  # problems listed in one error; the rest are counted
PLACES = 5  # lines named of one problem that many lines share


class DataError(LowrankError, ValueError):
    """Rows that cannot be trained on, by file and line."""


class BadRow(LowrankError, ValueError):
    """Why one line is not a row."""


class BadFile(ValueError):
    """Why a file, or what follows a line of it, cannot be read."""

    def __init__(self, why: str, line: str | int = ""):
        super().__init__(why)
        self.line = line


class Record(NamedTuple):
    columns: dict[str, Any]
    where: str  # "train.jsonl:17"


class Problems:
    """What is wrong with the data; lines of a file that share a problem are named together."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[str]] = {}  # (file, what is wrong) -> its lines
        self.files: dict[tuple[str, str], list[str]] = {}  # the same, of what cannot be skipped

    def add(self, where: str, why: str) -> None:
        path, _, line = where.rpartition(":")
        self.found.setdefault((path, why), []).append(line)

    def add_file(self, path: str, why: str, line: str | int = "") -> None:
        self.files[path, why] = [str(line)] if line else []

    @property
    def rows(self) -> int:
        return sum(map(len, self.found.values()))

    def report(self, good: int) -> str:
        """One line a problem, under their count."""
        problems = {**self.files, **self.found}
        count = len(self.files) + self.rows
        texts = [f"{count} bad {'line' if count == 1 else 'lines'} ({good} good)"]
        for (path, why), lines in list(problems.items())[:SHOWN]:
            more = f" and {len(lines) - PLACES} more lines" if len(lines) > PLACES else ""
            places = ", ".join(lines[:PLACES])
            texts.append(f"  {path}{':' if lines else ''}{places}{more}: {why}")
        if len(problems) > SHOWN:
            texts.append(f"  … and {len(problems) - SHOWN} more problems")
        return "\n".join(texts)


class Layout(NamedTuple):
    """How a table without a shape of its own is cut into columns."""

    separator: str | None = None
    header: Sequence[str] | None = None  # names of the columns, where the file has none


# a line's place in its file, and its columns or why it has none
Lines = Iterator[tuple[int, "dict[str, Any] | BadRow"]]


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
    reader = FORMATS.get(path.suffix, _jsonl if path.suffix == "" else None)
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


# --- formats ----------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Lines:
    for number, line in _raw_lines(path):
        yield number, _tried(_json_object, line)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, without a byte order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _refuse_utf16(line)
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line


def _refuse_utf16(start: bytes) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadFile("it is UTF-16; write it anew in UTF-8 (iconv -f UTF-16 -t UTF-8)")


def _tried(read: Callable[[bytes], Any], line: bytes) -> Any:
    try:
        return read(line)
    except BadRow as bad:
        return bad


def _utf8(line: bytes) -> str:
    if b"\0" in line:
        raise BadRow("holds NUL bytes: cut off while it was written, or not text")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from None


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(_utf8(line))
    except json.JSONDecodeError as error:
        raise BadRow(f"broken JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise BadRow("broken JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise BadRow(
            f"expected an object {{…}}, found {kind_of(value)} (JSONL is one object a line)"
        )
    return value


def _json(path: Path) -> Lines:
    """A list of objects, an object with one list of them, or JSONL under this name."""
    text = _whole(path)
    start = _after_space(text, 0)
    if text[start : start + 1] == "[":
        yield from _items(text, start + 1)
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(path)
            return
        raise BadFile(_broken(error), error.lineno) from None
    if not isinstance(value, dict):
        raise BadFile(f"expected a list of objects, found {kind_of(value)}")
    lists = [name for name, held in value.items() if isinstance(held, list)]
    if len(lists) != 1:
        found = ", ".join(map(repr, lists)) or "none"
        raise BadFile(f"expected a list of objects, or an object with one list; its lists: {found}")
    at = re.compile(rf"{re.escape(json.dumps(lists[0], ensure_ascii=False))}\s*:\s*\[").search(text)
    if at is None:  # the name is written with escapes: the lines are not known
        yield from ((n, _as_row(item)) for n, item in enumerate(value[lists[0]], start=1))
    else:
        yield from _items(text, at.end())


def _items(text: str, at: int) -> Lines:
    """The items of a JSON list whose `[` ends at `at`, each with its line."""
    decode, line, counted = json.JSONDecoder().raw_decode, 1, 0
    at = _after_space(text, at)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decode(text, at)
        except json.JSONDecodeError as error:
            raise BadFile(_broken(error), error.lineno) from None
        yield line, _as_row(value)
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise BadFile("broken JSON: expected , or ] after an item; no more was read", line)


def _broken(error: json.JSONDecodeError) -> str:
    return f"broken JSON at column {error.colno}: {error.msg}; no more was read"


def _after_space(text: str, at: int) -> int:
    return re.compile(r"[ \t\r\n]*").match(text, at).end()  # type: ignore[union-attr]


def _as_row(value: Any) -> "dict[str, Any] | BadRow":
    if isinstance(value, dict):
        return value
    return BadRow(f"expected an object {{…}}, found {kind_of(value)}")


def _whole(path: Path) -> str:
    """The text of a file; bytes that are not UTF-8 stay as surrogates, for their row to be refused."""
    raw = path.read_bytes()
    _refuse_utf16(raw[:2])
    return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _csv(path: Path, layout: Layout) -> Lines:
    separator = layout.separator or {".tsv": "\t"}.get(path.suffix, ",")
    if len(separator) != 1:
        raise BadFile(f"data.separator {separator!r} of a CSV file should be one character")
    with _long_fields():
        rows = csv.reader(io.StringIO(_whole(path), newline=""), delimiter=separator, strict=True)
        header, line = list(layout.header or ()), 1
        while True:
            try:
                fields = next(rows, None)
            except csv.Error as error:
                yield line, BadRow(f"broken CSV: {error}")
                line = rows.line_num + 1
                continue
            if fields is None:
                return
            if not header:
                header = _header(fields, separator)
            elif fields:
                yield line, _fields(fields, header)
            line = rows.line_num + 1


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv refuses fields above 128 kB, which documents are."""
    old = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(old)


def _header(fields: list[str], separator: str) -> list[str]:
    names = [name.strip() for name in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadFile(f"its header names twice: {', '.join(map(repr, twice))}", 1)
    other = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    if other:
        raise BadFile(
            f"its header {names[0]!r} has no {separator!r}; data.separator: {other!r}?", 1
        )
    return names


def _fields(fields: list[str], header: Sequence[str]) -> "dict[str, Any] | BadRow":
    if len(fields) != len(header):
        return BadRow(f"{len(fields)} fields, and its header has {len(header)}")
    return dict(zip(header, fields, strict=True))


def _text(path: Path, layout: Layout) -> Lines:
    """A line each: a text, or fields between separators."""
    header = layout.header or (["text"] if layout.separator is None else None)
    if header is None:
        raise BadFile("its columns have no names; give them: data.columns: [prompt, completion]")
    for number, raw in _raw_lines(path):
        line = _tried(_utf8, raw)
        if isinstance(line, BadRow):
            yield number, line
            continue
        fields = line.split(layout.separator) if layout.separator else [line]
        yield number, _fields([field.strip() for field in fields], header)


def _parquet(path: Path) -> Lines:
    _needs("pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        batches = table.iter_batches(batch_size=1024)
        number = 0
        for batch in batches:
            for columns in batch.to_pylist():
                number += 1
                yield number, columns
    except (pyarrow.ArrowException, OSError) as error:
        raise BadFile(f"not Parquet: {_first_line(error)}") from None


FORMATS: dict[str, Callable[..., Lines]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
    ".parquet": _parquet,
}
TABLES = (_csv, _text)  # readers to which a Layout says something


# --- datasets ---------------------------------------------------------------------------------------


def _on_disk(path: Path) -> Any:
    _needs("datasets")
    from datasets import load_from_disk

    return load_from_disk(str(path))


def _on_hub(id: str, config: str | None, split: str | None) -> Any:
    _needs("datasets")
    from datasets import load_dataset

    try:
        return load_dataset(id, config, split=split)
    except Exception as error:  # of many kinds: offline, no such name, a configuration to choose
        raise BadFile(
            f"no such file here, and no dataset of the hub: {_first_line(error)}"
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


def _needs(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingExtraError(
            f"reading this needs {package}, which is not installed. "
            "Install it: pip install 'lowrank[data]'"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
