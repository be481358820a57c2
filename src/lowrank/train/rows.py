"""Training and evaluation rows from JSONL files, with every bad line reported at once."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.errors import LowrankError

SHOWN = 20  # problems listed in one error; the rest are counted
PLACES = 5  # lines named of one problem that many lines share


class DataError(LowrankError, ValueError):
    """Rows that cannot be trained on, by file and line."""


class Row(NamedTuple):
    """One example. Who asks is `prompt`, what is learnt is `answer`."""

    prompt: (
        list[dict[str, str]] | str | None
    )  # a conversation, a string, or None: all of it is text
    answer: str
    where: str  # "train.jsonl:17"


class BadRow(ValueError):
    """Why one line is not a row."""


def read_rows(paths: Sequence[str | Path]) -> list[Row]:
    """The rows of JSONL files, in order; blank lines are skipped.

    A line is an object with `messages` (the last one the assistant's), with `prompt` and
    `completion`, or with `text`; other columns are ignored.
    Raises DataError with file and line of every line that is none of these.
    """
    rows: list[Row] = []
    problems: dict[tuple[str, str], list[str]] = {}  # (file, what is wrong) -> its lines
    for path in map(Path, paths):
        if not path.is_file():
            problems[str(path), "no such file"] = []
            continue
        found = 0
        for where, line in _lines(path):
            found += 1
            try:
                rows.append(_row(_object(line), where))
            except BadRow as bad:
                problems.setdefault((str(path), str(bad)), []).append(where.rpartition(":")[2])
        if not found:
            problems[str(path), "no rows; the file is empty"] = []
    if problems:
        raise DataError(_report(problems, good=len(rows)))
    return rows


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{path}:{number}", line


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"broken JSON at column {error.colno}: {error.msg}") from None
    if not isinstance(value, dict):
        raise BadRow(f"expected an object {{…}}, found {_kind(value)} (JSONL is one object a line)")
    return value


def _row(columns: dict[str, Any], where: str) -> Row:
    if "messages" in columns:
        return _conversation(columns["messages"], where)
    if "prompt" in columns or "completion" in columns:
        missing = [name for name in ("prompt", "completion") if name not in columns]
        if missing:
            raise BadRow(f"column `{missing[0]}` is missing")
        prompt, completion = columns["prompt"], columns["completion"]
        return Row(_text(prompt, "prompt"), _text(completion, "completion", filled=True), where)
    if "text" in columns:
        return Row(None, _text(columns["text"], "text", filled=True), where)
    raise BadRow(
        "no `messages`, no `prompt` with `completion`, no `text`; "
        f"its columns: {', '.join(columns) or 'none'}"
    )


def _conversation(messages: Any, where: str) -> Row:
    if not isinstance(messages, list):
        raise BadRow(f"`messages` should be a list, found {_kind(messages)}")
    if not messages:
        raise BadRow("`messages` is empty")
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    *prompt, last = turns
    if last["role"] != "assistant":
        raise BadRow(f"the last message should be the assistant's, it is the {last['role']}'s")
    if not last["content"].strip():
        raise BadRow("the assistant's last message is empty")
    if not prompt:
        raise BadRow("`messages` holds an answer and no question")
    return Row(prompt, last["content"], where)


def _turn(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRow(f"`{name}` should be an object with role and content, found {_kind(message)}")
    for key in ("role", "content"):
        if key not in message:
            raise BadRow(f"`{name}` has no `{key}`")
    return {key: _text(message[key], f"{name}.{key}") for key in ("role", "content")}


def _text(value: Any, name: str, filled: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow(f"`{name}` should be a string, found {_kind(value)}")
    if filled and not value.strip():
        raise BadRow(f"`{name}` is empty")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _report(problems: dict[tuple[str, str], list[str]], good: int) -> str:
    """One line a problem; lines of a file that share one are named together."""
    count = sum(len(lines) or 1 for lines in problems.values())
    texts = [f"{count} bad {'line' if count == 1 else 'lines'} ({good} good)"]
    for (path, why), lines in list(problems.items())[:SHOWN]:
        more = f" and {len(lines) - PLACES} more lines" if len(lines) > PLACES else ""
        places = ", ".join(lines[:PLACES])
        texts.append(f"  {path}{':' if lines else ''}{places}{more}: {why}")
    if len(problems) > SHOWN:
        texts.append(f"  … and {len(problems) - SHOWN} more problems")
    return "\n".join(texts)
