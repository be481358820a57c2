"""Rows as the text that a model reads, and which characters of it are learnt."""

import json
import re
from collections.abc import Iterable
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from lowrank.train.data.conversations import Message, Prompt
from lowrank.train.data.problems import BadRow, DataError
from lowrank.train.data.shapes import Row

LossOn = Literal["completion", "assistant", "last", "all"]


class Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # of characters that are learnt, in order, none inside another
    templated: bool  # the text brings its own special tokens
    closed: bool = True  # the text's end is an answer's end: the end token is learnt after it
    marked: dict[str, Any] | None = None  # what the template is given, which marks what is learnt


def rendered(
    row: Row, tokenizer: Any, loss_on: LossOn = "completion", template: bool = True
) -> Rendered:
    """The text of `row`, and what of it is learnt with `loss_on`.

    completion: the answer; of several turns those of the assistant. assistant: every turn of the
    assistant, in the prompt too. last: its last turn. all: everything, as always of `text`.
    A message with weight 0 is not learnt (OpenAI's field). Raises BadRow where the chat template
    refuses the row, or renders it so that an answer's place in it cannot be told.
    """
    if row.prompt is None:
        return Rendered(row.answer, [(0, len(row.answer))], False)
    if not has_template(row.prompt, tokenizer, template):
        text = f"{row.prompt}{row.answer}"
        return Rendered(text, [(0 if loss_on == "all" else len(row.prompt), len(text))], False)
    asked = turns_of(row.prompt)
    turns = [*asked, *row.turns]
    first = {"assistant": 0, "last": len(turns) - 1}.get(loss_on, len(asked))
    learnt = [
        k
        for k, turn in enumerate(turns)
        if k >= first and turn["role"] == "assistant" and turn.get("weight", 1) != 0
    ]
    closed = learnt[-1:] == [len(turns) - 1]
    if loss_on == "all":
        text, _ = _last_turn(turns, row, tokenizer)
        return Rendered(text, [(0, len(text))], True)
    if learnt == [len(turns) - 1]:
        text, start = _last_turn(turns, row, tokenizer)
        return Rendered(text, [(start, len(text))], True)
    whole = render(turns, tokenizer, row.tools)
    if loss_on == "assistant" and has_marks(tokenizer) and len(learnt) == _answers(turns):
        _check_said(learnt[-1], turns, whole)
        return Rendered(whole, [], True, closed, {"conversation": turns, "tools": row.tools})
    spans = [_span(k, turns, whole, row, tokenizer) for k in learnt]
    return Rendered(whole, spans, True, closed)


def prompt_text(
    prompt: Prompt | None,
    tokenizer: Any,
    chat_template: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The text a model is given before it answers; a string is a user's turn if there is a template."""
    if prompt is None:
        return ""
    if not has_template(prompt, tokenizer, chat_template):
        return prompt  # type: ignore[return-value]  # a conversation without a template has raised
    return render(turns_of(prompt), tokenizer, tools, answer_next=True)


def render(
    turns: list[Message],
    tokenizer: Any,
    tools: list[dict[str, Any]] | None = None,
    answer_next: bool = False,
) -> str:
    """`turns` through the chat template. Raises BadRow with the template's own words if it refuses."""
    from jinja2 import TemplateError

    tried: list[Exception] = []
    for given in (turns, _arguments_as_text(turns)):
        try:
            return tokenizer.apply_chat_template(
                given, tools=tools, tokenize=False, add_generation_prompt=answer_next
            )
        except (TemplateError, TypeError, ValueError) as error:
            tried.append(error)
    raise BadRow(f"the chat template refuses it: {tried[0]}")


def _arguments_as_text(turns: list[Message]) -> list[Message]:
    """For templates that write the arguments of tool calls as they stand (DeepSeek-V3's)."""

    def call(made: dict[str, Any]) -> dict[str, Any]:
        function = made["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {**made, "function": {**function, "arguments": arguments}}

    return [
        {**turn, "tool_calls": [call(made) for made in turn["tool_calls"]]}
        if "tool_calls" in turn
        else turn
        for turn in turns
    ]


def turns_of(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def has_template(prompt: Prompt | None, tokenizer: Any, chat_template: bool) -> bool:
    """Whether `prompt` goes through the tokenizer's chat template."""
    if prompt is None:
        return False
    usable = chat_template and bool(tokenizer.chat_template)
    if not usable and not isinstance(prompt, str):
        raise DataError(
            "these rows hold conversations, which need a chat template: "
            + ("data.chat_template is false" if not chat_template else "this tokenizer has none")
            + ".\nUse prompt/completion rows, or a tokenizer with a chat template."
        )
    return usable


def has_marks(tokenizer: Any) -> bool:
    """Whether the chat template marks the assistant's words with {% generation %}."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)) is not None


def _answers(turns: Iterable[Message]) -> int:
    return sum(turn["role"] == "assistant" for turn in turns)


def _last_turn(turns: list[Message], row: Row, tokenizer: Any) -> tuple[str, int]:
    """The whole text, and where in it the last turn begins: right after what a model is given."""
    head = render(turns[:-1], tokenizer, row.tools, answer_next=True)
    whole = render(turns, tokenizer, row.tools)
    if whole.startswith(head):
        _check_said(len(turns) - 1, turns, whole[len(head) :])
        return whole, len(head)
    # a template that renders the prompt in another way once an answer follows (it drops an old
    # thinking part, say): train on what the model will see when it has to answer
    said, end = _said(turns[-1], whole)
    if not said:
        raise BadRow(_unclear(len(turns) - 1, "the answer is not in it as it stands"))
    return head + said + end, len(head)


def _span(k: int, turns: list[Message], whole: str, row: Row, tokenizer: Any) -> tuple[int, int]:
    """Where in `whole` turn `k` stands: after what a model is given, up to the end of the turn."""
    head = render(turns[:k], tokenizer, row.tools, answer_next=True)
    upto = render(turns[: k + 1], tokenizer, row.tools)
    if not whole.startswith(head):
        raise BadRow(_unclear(k, "what comes before this one changes once more follows"))
    start = len(head)
    if upto.startswith(head) and whole.startswith(upto):
        _check_said(k, turns, whole[start : len(upto)])
        return start, len(upto)
    # a thinking part that only the last answer has, say, or an end of the whole conversation: the
    # answer is the same, and so is what ends it
    said, end = _said(turns[k], upto)
    if said and whole.startswith(said, start):
        pairs = zip(end, whole[start + len(said) :], strict=False)
        shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        # up to a whole token that ends it: what follows may begin alike
        marks = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        ends = [shared.rfind(mark) + len(mark) for mark in marks if mark in shared]
        if ends:
            return start, start + len(said) + max(ends)
    raise BadRow(_unclear(k, "this one changes once more follows"))


def _said(turn: Message, text: str) -> tuple[str, str]:
    """What the turn says, as it stands last in `text`, and what comes after it; empty if it does not."""
    said = turn["content"].strip()
    _, found, end = text.rpartition(said) if said else ("", "", "")
    return found, end


def _check_said(k: int, turns: list[Message], text: str) -> None:
    """Some templates take the content of a message in parts alone, and leave out a string."""
    words = turns[k]["content"].split()
    if words and words[-1] not in text:
        raise BadRow(f"the chat template leaves out what message {k + 1} says")


def _unclear(k: int, why: str) -> str:
    return (
        f"message {k + 1} has no clear place in what the chat template renders: {why}. "
        "Use data.loss_on: last, or a template with {% generation %} marks"
    )
