"""Training and evaluation rows, with every bad row reported at once."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowrank.errors import did_you_mean
from lowrank.train.data.conversations import Prompt
from lowrank.train.data.file_formats import Layout
from lowrank.train.data.problems import BadRow, DataError, Problems
from lowrank.train.data.records import Record, read_records
from lowrank.train.data.shapes import (
    Judged,
    Preference,
    Row,
    Shape,
    check_shape,
    missing,
    shape_of,
)
from lowrank.train.data.task_shapes import Asked, Labelled, Question, Related, Tagged, shapes_for
from lowrank.train.tasks.table import TASKS, Task


@dataclass(frozen=True)
class ReadData:
    """Rows of any shape, and how they were read."""

    rows: list[Any]  # Row, Preference, … : of the type that a task takes
    shapes: dict[str, int]  # name of a shape -> rows that have it
    unread: list[str]  # columns that the shapes of their rows do not have
    skipped: int  # bad rows that were left out
    problems: str  # what was wrong with them
    takes: type = Row  # what was asked for: shapes_for(takes) are those that `shapes` counts


def read_rows(paths: Sequence[str | Path], **options: Any) -> list[Row]:
    """The rows to be fine-tuned on, read with the options of `read_data`."""
    return supervised(read_data(paths, **options))


def supervised(data: ReadData) -> list[Row]:
    """Its rows, none of which says which of two answers is better, or whether one is good."""
    return rows_of(TASKS["sft"], data)


def rows_of(task: Task, data: ReadData) -> list[Any]:
    """Its rows, all of the type that `task` takes. Raises DataError if some are of another."""
    others = [row for row in data.rows if not isinstance(row, task.takes)]
    if others:
        fitting = [name for name, other in TASKS.items() if isinstance(others[0], other.takes)]
        raise DataError(
            f"{len(others)} of {len(data.rows)} rows are {PURPOSES[type(others[0])]} "
            f"({', '.join(data.shapes)}; the first: {others[0].where}), and train.task {task.name} "
            f"trains on {PURPOSES[task.takes]}.\n"
            + (f"Choose task: {' or '.join(fitting)}; or name " if fitting else "Name ")
            + "the columns it needs with data.columns, such as {chosen: completion}, or another shape "
            "with data.shape."
        )
    return data.rows


# what rows of each type hold
PURPOSES: dict[type, str] = {
    Row: "answers",
    Asked: "prompts",
    Preference: "pairs of a better and a worse answer",
    Judged: "answers that are judged good or bad",
    Labelled: "labelled texts",
    Tagged: "tagged words",
    Question: "questions with places of their answers",
    Related: "texts that belong together",
}


def as_rows(row: Row | Preference | Judged) -> list[tuple[str, Row]]:
    """What there is to read in it, as rows to fine-tune on, each with the name of its answer."""
    if isinstance(row, Row):
        return [("", row)]
    if isinstance(row, Judged):
        return [(f", {'good' if row.label else 'bad'}", _answering(row, row.completion))]
    return [
        (", chosen", _answering(row, row.chosen)),
        (", rejected", _answering(row, row.rejected)),
    ]


def _answering(row: Preference | Judged, answer: Prompt) -> Row:
    if isinstance(answer, str):
        return Row(row.prompt, answer, row.where, None, row.tools)
    return Row(row.prompt, answer[-1]["content"], row.where, answer, row.tools)


def read_data(
    paths: Sequence[str | Path],
    *,
    split: str = "train",
    shape: str | None = None,
    columns: Mapping[str, str] | Sequence[str] | None = None,
    separator: str | None = None,
    prompt_template: str | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    takes: type = Row,
) -> ReadData:
    """The rows of files, folders, datasets on disk (`datasets`) and names on the hub, in order.

    takes: the type of row that a task takes, which decides what shapes there are.
    shape: the name of one of them; None: told from the columns. columns: {column in the data: name here}, or
    the names of all columns where a table in text has no header. separator: of a table in text.
    prompt_template: Jinja over a row's columns, both names of them, in place of its prompt.
    Raises DataError with file and line of all that cannot be used; with on_bad_row="skip" only
    where a whole file cannot be read, or nothing is left.
    """
    known = shapes_for(takes)
    chosen = check_shape(shape, known) if shape is not None else None
    header = None if columns is None or isinstance(columns, Mapping) else list(columns)
    renamed = columns if isinstance(columns, Mapping) else {}
    prompt = prompt_of(prompt_template) if prompt_template is not None else None
    problems = Problems()
    rows: list[Any] = []
    shapes, unread = Counter[str](), dict[str, None]()
    for record in _unnested(read_records(paths, problems, Layout(separator, header), split)):
        try:
            found, names, row = _row(record, chosen or known, renamed, prompt, takes)
        except BadRow as bad:
            problems.add(record.where, str(bad))
        else:
            rows.append(row)
            shapes[found.name] += 1
            unread |= dict.fromkeys(names)
    if problems.files or (problems.found and (on_bad_row == "error" or not rows)):
        raise DataError(problems.report(len(rows)))
    report = problems.report(len(rows)) if problems.found else ""
    return ReadData(rows, dict(shapes.most_common()), list(unread), problems.rows, report, takes)


def _unnested(records: Iterable[Record]) -> Iterator[Record]:
    """A record a question, where one holds an article of SQuAD's own files: paragraphs, with questions in each."""
    for record in records:
        paragraphs = record.columns.get("paragraphs")
        if not isinstance(paragraphs, list) or "context" in record.columns:
            yield record
            continue
        for paragraph in paragraphs:
            asked = paragraph.get("qas") if isinstance(paragraph, dict) else None
            for question in asked if isinstance(asked, list) else [{}]:
                columns = question if isinstance(question, dict) else {}
                context = {k: paragraph[k] for k in ("context",) if k in (paragraph or {})}
                yield Record({**context, **columns}, record.where)


def _row(
    record: Record,
    shape: Shape | Mapping[str, Shape],
    renamed: Mapping[str, str],
    prompt: Callable[[dict[str, Any]], str] | None,
    takes: type,
) -> tuple[Shape, list[str], Any]:
    """The record's shape, the columns of which it makes nothing, and the row."""
    columns = _renamed(record.columns, renamed)
    if prompt is not None:
        columns = {**columns, "prompt": prompt({**record.columns, **columns})}
    shape = shape if isinstance(shape, Shape) else shape_of(columns, shape, takes)
    if any(name not in columns for name in shape.needs):
        raise BadRow(missing(shape, columns))
    row = shape.read(columns, record.where)
    if prompt is not None:
        if not isinstance(getattr(row, "prompt", None), str):
            raise BadRow(
                f"data.prompt_template writes one prompt, and rows of {shape.name} have none"
            )
        return shape, [], row._replace(prompt=columns["prompt"])
    return shape, [name for name in columns if name not in (*shape.needs, *shape.also)], row


def _renamed(columns: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    for theirs, ours in renamed.items():
        if theirs not in columns:
            hint = did_you_mean(theirs, columns)
            raise BadRow(
                f"no column `{theirs}` (data.columns); its columns: {', '.join(columns)}.{hint}"
            )
        if ours in columns and ours not in renamed:
            raise BadRow(
                f"data.columns names `{theirs}` {ours}, and there is a column `{ours}` already; "
                f"give that another name too"
            )
    return {renamed.get(name, name): value for name, value in columns.items()}


def prompt_of(template: str) -> Callable[[dict[str, Any]], str]:
    """The prompt that a Jinja template makes of a row's columns. Raises DataError if it is broken."""
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True
    )
    try:
        made = environment.from_string(template)
    except TemplateError as error:
        raise DataError(f"data.prompt_template is not Jinja: {error}") from None

    def render(columns: dict[str, Any]) -> str:
        try:
            return made.render(columns)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            names = ", ".join(columns)
            raise BadRow(f"data.prompt_template: {error}; its columns: {names}") from None

    return render
