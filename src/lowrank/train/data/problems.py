"""What is wrong with data, by file and line."""

from typing import Any

from lowrank.errors import LowrankError

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


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
