"""The rows of tasks whose answer is no text: labels, tags, spans, and texts that belong together."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lowrank.train.data.conversations import checked_text, messages_of, text_of, tools_of
from lowrank.train.data.problems import BadRow, kind_of
from lowrank.train.data.shapes import SHAPES, Row, Shape, answers_of, prompt_in

Label = str | float | list[str]


class Labelled(NamedTuple):
    """A text, or two, and what it is: a class's name, several names, or a number."""

    text: str
    label: Label
    where: str
    pair: str | None = None


class Tagged(NamedTuple):
    """Words, and a tag for each."""

    words: list[str]
    tags: list[str]
    where: str


class Question(NamedTuple):
    """A question, and where in a text its answers stand: (what, from which character); none: it has no answer."""

    question: str
    context: str
    answers: list[tuple[str, int]]
    where: str


class Related(NamedTuple):
    """Two texts that mean the same, or as much the same as `score` says; and one that does not."""

    anchor: str
    positive: str
    where: str
    negative: str | None = None
    score: float | None = None


class Asked(Row):
    """A prompt; its answer is empty where there is none."""

    __slots__ = ()


# --- labels -----------------------------------------------------------------------------------------


def _text_label(columns: dict[str, Any], where: str) -> Labelled:
    pair = text_of(columns, "text_pair", filled=True) if columns.get("text_pair") else None
    return Labelled(
        text_of(columns, "text", filled=True), _label(columns["label"], "label"), where, pair
    )


def _prompt_completion(columns: dict[str, Any], where: str) -> Labelled:
    label = _label(columns["completion"], "completion")
    return Labelled(text_of(columns, "prompt", filled=True), label, where)


def _messages(columns: dict[str, Any], where: str) -> Labelled:
    """A conversation whose last message, the assistant's, names the class."""
    turns = messages_of(columns["messages"], "messages")
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise BadRow("the last message should be the assistant's, after another: it is the label")
    text = "\n".join(turn["content"] for turn in turns[:-1] if turn["content"].strip())
    return Labelled(
        checked_text(text, "messages", filled=True), _label(turns[-1]["content"], "label"), where
    )


def _label(value: Any, name: str) -> Label:
    if isinstance(value, list):
        return [str(_label(one, name)) for one in value]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if value - value != 0:
            raise BadRow(f"`{name}` is {value}: no number to learn")
        return value
    if not isinstance(value, str):
        raise BadRow(
            f"`{name}` should be a name, a list of them, or a number, found {kind_of(value)}"
        )
    return checked_text(value, name, filled=True).strip()


# --- tags -------------------------------------------------------------------------------------------


def _tokens_tags(columns: dict[str, Any], where: str) -> Tagged:
    words, tags = (_list(columns[name], name) for name in ("tokens", "tags"))
    if len(words) != len(tags):
        raise BadRow(
            f"{len(words)} `tokens` and {len(tags)} `tags`: there should be a tag for each"
        )
    if not words:
        raise BadRow("`tokens` is empty")
    return Tagged(
        [checked_text(w, "tokens", filled=True) for w in words], list(map(str, tags)), where
    )


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):  # a line of CSV
        return value.split()
    if not isinstance(value, list):
        raise BadRow(f"`{name}` should be a list, found {kind_of(value)}")
    for one in value:
        if not isinstance(one, str | int) or isinstance(one, bool):
            raise BadRow(f"`{name}` should hold strings, found {kind_of(one)}")
    return value


# --- spans ------------------------------------------------------------------------------------------


def _squad(columns: dict[str, Any], where: str) -> Question:
    context = text_of(columns, "context", filled=True)
    question = text_of(columns, "question", filled=True)
    found = []
    for text, start in answers_of(columns["answers"]):
        if start is None:
            raise BadRow(
                "`answers` does not say at which character of `context` an answer starts (answer_start)"
            )
        if context[start : start + len(text)] != text:
            raise BadRow(f"`answers` says that {text!r} is at {start} of `context`, and it is not")
        found.append((text, start))
    return Question(question, context, found, where)


# --- texts that belong together ---------------------------------------------------------------------


def _pair(columns: dict[str, Any], where: str) -> Related:
    texts = (text_of(columns, name, filled=True) for name in ("anchor", "positive"))
    negative = text_of(columns, "negative", filled=True) if columns.get("negative") else None
    anchor, positive = texts
    return Related(anchor, positive, where, negative)


def _scored(columns: dict[str, Any], where: str) -> Related:
    first, second = (text_of(columns, name, filled=True) for name in ("sentence1", "sentence2"))
    try:
        score = float(columns["score"])
    except (TypeError, ValueError):
        score = float("nan")
    if score - score != 0 or isinstance(columns["score"], bool):
        raise BadRow(f"`score` should be a number, found {columns['score']!r}")
    return Related(first, second, where, score=score)


# --- prompts ----------------------------------------------------------------------------------------


def _prompt_alone(columns: dict[str, Any], where: str) -> Asked:
    return Asked(prompt_in(columns), "", where, None, tools_of(columns))


def _asked(shape: Shape) -> Shape:
    """`shape`, of answered prompts, whose rows go for prompts too; any other as it is."""
    if shape.gives is not Row:
        return shape
    return shape._replace(
        read=lambda columns, where: Asked(*shape.read(columns, where)), gives=Asked
    )


def _table(gives: type, *shapes: Shape) -> dict[type, dict[str, Shape]]:
    return {gives: {shape.name: shape._replace(gives=gives) for shape in shapes}}


# by the type of rows that a task takes; all others are read as SHAPES says
TASK_SHAPES: dict[type, dict[str, Shape]] = {
    **_table(
        Labelled,
        Shape("text-label", ("text", "label"), _text_label, ("text_pair",)),
        Shape("prompt-completion", ("prompt", "completion"), _prompt_completion),
        Shape("messages", ("messages",), _messages),
    ),
    **_table(Tagged, Shape("tokens-tags", ("tokens", "tags"), _tokens_tags)),
    **_table(Question, Shape("squad", ("question", "context", "answers"), _squad, ("id", "title"))),
    **_table(
        Related,
        Shape("pair", ("anchor", "positive"), _pair, ("negative",)),
        Shape("scored-pair", ("sentence1", "sentence2", "score"), _scored),
    ),
    Asked: {
        **{name: _asked(shape) for name, shape in SHAPES.items()},
        "prompt": Shape("prompt", ("prompt",), _prompt_alone, ("tools",), Asked),
    },
}
SHAPE_NAMES = tuple(dict.fromkeys([*SHAPES, *(n for table in TASK_SHAPES.values() for n in table)]))


def shapes_for(takes: type) -> Mapping[str, Shape]:
    """The shapes in which rows of a type come."""
    return TASK_SHAPES.get(takes, SHAPES)
