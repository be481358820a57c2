"""The lines of data files, as columns: JSON, tables in text, Parquet."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.errors import MissingExtraError
from lowrank.train.data.problems import BadFile, BadRow, kind_of


class Layout(NamedTuple):
    """How a table without a shape of its own is cut into columns."""

    separator: str | None = None
    header: Sequence[str] | None = None  # names of the columns, where the file has none


# a line's place in its file, and its columns or why it has none
Lines = Iterator[tuple[int, "dict[str, Any] | BadRow"]]


def jsonl(path: Path) -> Lines:
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
            yield from jsonl(path)
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
    needs("pyarrow")
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
        raise BadFile(f"not Parquet: {first_line(error)}") from None


def needs(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingExtraError(
            f"reading this needs {package}, which is not installed. "
            "Install it: pip install 'lowrank[data]'"
        )


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


FORMATS: dict[str, Callable[..., Lines]] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
    ".parquet": _parquet,
}
TABLES = (_csv, _text)  # readers to which a Layout says something
