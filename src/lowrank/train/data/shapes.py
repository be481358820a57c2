"""The shapes that rows of data have: which columns tell one, and how a row of it is read."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from lowrank.errors import did_you_mean
from lowrank.train.data.conversations import (
    Message,
    Prompt,
    checked_text,
    messages_of,
    spoken,
    spoken_answer,
    text_of,
    tools_of,
)
from lowrank.train.data.problems import BadRow, DataError, kind_of


class Row(NamedTuple):
    """One example. Who asks is `prompt`, what is learnt is `answer`."""

    prompt: Prompt | None  # a conversation, a string, or None: all of it is text
    answer: str
    where: str  # "train.jsonl:17"
    reply: list[Message] | None = None  # the answer's turns, where there is more than its text
    tools: list[dict[str, Any]] | None = None

    @property
    def turns(self) -> list[Message]:
        """The answer as messages."""
        return self.reply or [{"role": "assistant", "content": self.answer}]


class Preference(NamedTuple):
    """Two answers to one prompt, of which the first is the better."""

    prompt: Prompt
    chosen: Prompt
    rejected: Prompt
    where: str
    tools: list[dict[str, Any]] | None = None


class Judged(NamedTuple):
    """An answer that somebody found good or bad."""

    prompt: Prompt
    completion: Prompt
    label: bool
    where: str
    tools: list[dict[str, Any]] | None = None


class Shape(NamedTuple):
    name: str
    needs: tuple[str, ...]  # columns
    read: Callable[[dict[str, Any], str], Any]  # a row of the type that a task takes
    also: tuple[str, ...] = ()  # columns that are read where there are some
    gives: type = Row


# --- reading one row --------------------------------------------------------------------------------


def _messages(columns: dict[str, Any], where: str) -> Row:
    return _conversation(messages_of(columns["messages"], "messages"), tools_of(columns), where)


def _sharegpt(columns: dict[str, Any], where: str) -> Row:
    return _conversation(spoken(columns), tools_of(columns), where)


def _alpaca(columns: dict[str, Any], where: str) -> Row:
    return Row(_instruction(columns), text_of(columns, "output", filled=True), where)


def _prompt_completion(columns: dict[str, Any], where: str) -> Row:
    prompt, completion = columns["prompt"], columns["completion"]
    if not isinstance(completion, list):
        return Row(prompt_in(columns), text_of(columns, "completion", filled=True), where)
    if not isinstance(prompt, list):
        raise BadRow(f"`completion` is a list of messages, and `prompt` is {kind_of(prompt)}")
    turns = messages_of(completion, "completion")
    return _conversation(
        [*messages_of(prompt, "prompt"), *turns], tools_of(columns), where, len(turns)
    )


def _only_text(columns: dict[str, Any], where: str) -> Row:
    return Row(None, text_of(columns, "text", filled=True), where)


def _squad(columns: dict[str, Any], where: str) -> Row:
    context = text_of(columns, "context", filled=True)
    question = text_of(columns, "question", filled=True)
    answers = answers_of(columns["answers"])
    if not answers:
        raise BadRow("`answers` is empty: a question without an answer")
    answer, start = answers[0]
    if start is not None and context[start : start + len(answer)] != answer:
        raise BadRow(f"`answers` says that {answer!r} is at {start} of `context`, and it is not")
    return Row(f"{context}\n\n{question}", answer, where)


def _summary(columns: dict[str, Any], where: str) -> Row:
    dialogue = text_of(columns, "dialogue", filled=True)
    return Row(dialogue, text_of(columns, "summary", filled=True), where)


def _text_label(columns: dict[str, Any], where: str) -> Row:
    label = columns["label"]
    if not isinstance(label, str | int):
        raise BadRow(f"`label` should be a string or a whole number, found {kind_of(label)}")
    labelled = {**columns, "label": str(label)}
    return Row(text_of(columns, "text", filled=True), text_of(labelled, "label", True), where)


def _preference(columns: dict[str, Any], where: str) -> Preference:
    return _pair(prompt_in(columns), columns, where)


def _sharegpt_preference(columns: dict[str, Any], where: str) -> Preference:
    turned = {name: spoken_answer(columns, name) for name in ("chosen", "rejected")}
    return _pair(spoken(columns), {**columns, **turned}, where)


def _alpaca_preference(columns: dict[str, Any], where: str) -> Preference:
    return _pair(_instruction(columns), columns, where)


def _implicit_preference(columns: dict[str, Any], where: str) -> Preference:
    for name in ("chosen", "rejected"):
        if not isinstance(columns[name], list):
            raise BadRow(
                f"without a `prompt`, `{name}` should be a list of messages that begins with it, "
                f"found {kind_of(columns[name])}"
            )
    return _pair(None, columns, where)


def _kto(columns: dict[str, Any], where: str) -> Judged:
    row = _prompt_completion(columns, where)
    assert row.prompt is not None
    completion: Prompt = row.reply or row.answer
    return Judged(row.prompt, completion, _verdict(columns), where, row.tools)


def _messages_kto(columns: dict[str, Any], where: str) -> Judged:
    row = _messages(columns, where)
    return Judged(row.prompt or [], row.turns, _verdict(columns), where, row.tools)


# a shape whose columns are all among another's is meant only where the other's are not all there
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("messages", ("messages",), _messages, ("tools",)),
        Shape("sharegpt", ("conversations",), _sharegpt, ("system", "tools")),
        Shape("alpaca", ("instruction", "output"), _alpaca, ("input", "system", "history")),
        Shape("prompt-completion", ("prompt", "completion"), _prompt_completion, ("tools",)),
        Shape("text", ("text",), _only_text),
        Shape("squad", ("question", "context", "answers"), _squad),
        Shape("summary", ("dialogue", "summary"), _summary),
        Shape("text-label", ("text", "label"), _text_label),
        Shape("preference", ("prompt", "chosen", "rejected"), _preference, ("tools",), Preference),
        Shape(
            "sharegpt-preference",
            ("conversations", "chosen", "rejected"),
            _sharegpt_preference,
            ("system", "tools"),
            Preference,
        ),
        Shape(
            "alpaca-preference",
            ("instruction", "chosen", "rejected"),
            _alpaca_preference,
            ("input", "system", "history"),
            Preference,
        ),
        Shape(
            "chosen-rejected", ("chosen", "rejected"), _implicit_preference, ("tools",), Preference
        ),
        Shape("kto", ("prompt", "completion", "label"), _kto, ("tools",), Judged),
        Shape("messages-kto", ("messages", "label"), _messages_kto, ("tools",), Judged),
    )
}
# names that data sets of the field have for these columns: suggested, never assumed
ELSEWHERE = {
    "prompt": ("question", "query", "problem", "source", "input", "instruction", "user"),
    "completion": ("answer", "response", "solution", "target", "output", "reply", "assistant"),
    "text": ("content", "document", "sentence", "body"),
    "label": ("category", "class", "intent", "target", "sentiment"),
    "dialogue": ("document", "article", "conversation"),
    "summary": ("highlights", "abstract", "tldr"),
    "messages": ("conversation", "chat", "dialog"),
    "chosen": ("preferred", "better", "accepted"),
    "rejected": ("dispreferred", "worse"),
    "tokens": ("words",),
    "tags": ("ner_tags", "labels", "pos_tags"),
    "anchor": ("query", "question", "sentence1", "premise"),
    "positive": ("answer", "passage", "document", "sentence2", "hypothesis"),
    "score": ("label", "similarity"),
}


# --- which shape ------------------------------------------------------------------------------------


def shape_of(
    columns: Collection[str], shapes: Mapping[str, Shape] = SHAPES, takes: type = Row
) -> Shape:
    """The one of `shapes` that rows with these columns have. Raises BadRow where none or several fit.

    takes: the type of row that is wanted, for what the error suggests.
    """
    there = set(columns)
    fitting = [shape for shape in shapes.values() if there.issuperset(shape.needs)]
    widest = [s for s in fitting if not any(set(s.needs) < set(other.needs) for other in fitting)]
    if len(widest) == 1:
        return widest[0]
    if widest:
        words = " and ".join(f"{s.name} ({', '.join(s.needs)})" for s in widest)
        raise BadRow(
            f"its columns ({', '.join(columns)}) fit {words}: say which with data.shape, "
            "or leave columns out"
        )
    raise BadRow(_no_shape(columns, {n: s for n, s in shapes.items() if s.gives is takes}))


def missing(shape: Shape, columns: Collection[str]) -> str:
    """What to say of a row that lacks columns of `shape`."""
    lacking = [name for name in shape.needs if name not in columns]
    names = " and ".join(f"`{name}`" for name in lacking)
    verb = "is" if len(lacking) == 1 else "are"
    hint = "".join(did_you_mean(name, set(columns) - set(shape.needs)) for name in lacking)
    return f"column {names} {verb} missing ({shape.name}); its columns: {_names(columns)}.{hint}"


def _no_shape(columns: Collection[str], shapes: Mapping[str, Shape]) -> str:
    there = set(columns)
    shares = {s.name: len(there & set(s.needs)) / len(s.needs) for s in shapes.values()}
    name, share = max(shares.items(), key=lambda item: item[1])
    if share > 0.5:
        return missing(shapes[name], columns)
    mapped = [(shape, _mapping(columns, shape)) for shape in shapes.values()]
    best, mapping = max(mapped, key=lambda pair: (len(pair[1]), -len(pair[0].needs)))
    if mapping:
        words = ", ".join(f"{theirs}: {ours}" for theirs, ours in mapping.items())
        return (
            f"no shape has these columns: {_names(columns)}. For {best.name} "
            f"({', '.join(best.needs)}) map them: data.columns: {{{words}}}"
        )
    if share:
        return missing(shapes[name], columns)
    needed = "; ".join(", ".join(shape.needs) for shape in shapes.values())
    return (
        f"no shape has these columns: {_names(columns)}. Shapes: {needed}. Name the columns anew "
        "with data.columns"
    )


def _mapping(columns: Collection[str], shape: Shape) -> dict[str, str]:
    """Columns that would make `shape` complete under other names; empty if some still lack."""
    mapping = {}
    for name in shape.needs:
        if name in columns:
            continue
        theirs = next(
            (c for c in ELSEWHERE.get(name, ()) if c in columns and c not in mapping), None
        )
        if theirs is None:
            return {}
        mapping[theirs] = name
    return mapping


def _names(columns: Iterable[str]) -> str:
    return ", ".join(columns) or "none"


# --- parts of a row ---------------------------------------------------------------------------------


def prompt_in(columns: Mapping[str, Any]) -> Prompt:
    prompt = columns["prompt"]
    return (
        messages_of(prompt, "prompt")
        if isinstance(prompt, list)
        else checked_text(prompt, "prompt")
    )


def _instruction(columns: Mapping[str, Any]) -> Prompt:
    """Instruction and input, a line each; with `system` or `history`, as a conversation."""
    asked = text_of(columns, "instruction")
    if columns.get("input"):
        asked = "\n".join(filter(None, (asked, text_of(columns, "input"))))
    if not asked.strip():
        raise BadRow("`instruction` is empty")
    before: list[Message] = []
    if columns.get("system"):
        before.append({"role": "system", "content": text_of(columns, "system")})
    for i, pair in enumerate(columns.get("history") or ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"`history[{i}]` should be [question, answer]")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            before.append({"role": role, "content": checked_text(said, f"history[{i}]")})
    return [*before, {"role": "user", "content": asked}] if before else asked


def answers_of(answers: Any) -> list[tuple[str, int | None]]:
    """SQuAD's answers, in any of its forms, each with the character at which it starts."""
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list):
            raise BadRow(f"`answers` should hold a list of texts, found {kind_of(texts)}")
        starts = starts if isinstance(starts, list) else []
        starts = starts + [None] * (len(texts) - len(starts))
        answers = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=False)]
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list):
        raise BadRow(f"`answers` should hold a list of texts, found {kind_of(answers)}")
    found = []
    for answer in answers:
        one = answer if isinstance(answer, dict) else {"text": answer}
        start = one.get("answer_start")
        start = start if isinstance(start, int) and not isinstance(start, bool) else None
        found.append((checked_text(one.get("text"), "answers", filled=True), start))
    return found


def _conversation(
    turns: list[Message], tools: list[dict[str, Any]] | None, where: str, answering: int = 1
) -> Row:
    """A row whose last `answering` turns are the answer."""
    prompt, reply = turns[:-answering], turns[-answering:]
    last = reply[-1]
    if last["role"] != "assistant":
        raise BadRow(f"the last message should be the assistant's, it is the {last['role']}'s")
    said = last["content"]
    if not said.strip() and not last.get("tool_calls"):
        raise BadRow("the assistant's last message is empty")
    if not prompt:
        raise BadRow("the conversation holds an answer and no question")
    plain = len(reply) == 1 and set(last) == {"role", "content"}
    answer = said if said.strip() else json.dumps(last["tool_calls"], ensure_ascii=False)
    return Row(prompt, answer, where, None if plain else reply, tools)


def _pair(prompt: Prompt | None, columns: Mapping[str, Any], where: str) -> Preference:
    """Both answers as the prompt is: text after text, messages after messages."""
    chosen, rejected = (_answer(columns[name], name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("`chosen` and `rejected`: one is text, the other messages")
    if chosen == rejected:
        raise BadRow("`chosen` and `rejected` are the same")
    if isinstance(chosen, str):
        assert prompt is not None
        if isinstance(prompt, str):
            return Preference(prompt, chosen, rejected, where, tools_of(columns))
        chosen, rejected = ([{"role": "assistant", "content": a}] for a in (chosen, rejected))
    assert isinstance(rejected, list)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    asked = chosen[:shared]  # what both begin with is the prompt, or goes on with it
    if isinstance(prompt, list):
        asked = asked if asked[: len(prompt)] == prompt else [*prompt, *asked]
    elif prompt is not None and not any(m["content"] == prompt for m in asked):
        asked = [{"role": "user", "content": prompt}, *asked]
    if not asked:
        raise BadRow("`chosen` and `rejected` share no first message, and there is no `prompt`")
    better, worse = chosen[shared:], rejected[shared:]
    for name, turns in (("chosen", better), ("rejected", worse)):
        if not turns or turns[-1]["role"] != "assistant":
            raise BadRow(f"the last message of `{name}` should be the assistant's, and its own")
    return Preference(asked, better, worse, where, tools_of(columns))


def _answer(value: Any, name: str) -> Prompt:
    return (
        messages_of(value, name)
        if isinstance(value, list)
        else checked_text(value, name, filled=True)
    )


def _verdict(columns: Mapping[str, Any]) -> bool:
    label = columns["label"]
    if isinstance(label, str) and label.lower() in ("true", "false"):  # out of a CSV
        return label.lower() == "true"
    if not isinstance(label, bool):
        raise BadRow(
            f"`label` should be true or false beside a completion, found {kind_of(label)}; "
            "data.shape names a shape without it"
        )
    return label


def check_shape(name: str, shapes: Mapping[str, Shape] = SHAPES) -> Shape:
    """The one of `shapes` with that name. Raises DataError with the nearest."""
    if name not in shapes:
        raise DataError(
            f"data.shape {name!r} is none of {', '.join(shapes)}.{did_you_mean(name, shapes)}"
        )
    return shapes[name]
