"""The turns of a conversation, and the tools beside them: OpenAI's messages and ShareGPT's, checked."""

import json
from collections.abc import Mapping
from typing import Any

from lowrank.errors import did_you_mean
from lowrank.train.data.problems import BadRow, kind_of

Message = dict[str, Any]  # {"role", "content"}, and what a template makes of further keys
Prompt = list[Message] | str
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def text_of(columns: Mapping[str, Any], name: str, filled: bool = False) -> str:
    return checked_text(columns[name], name, filled)


def checked_text(value: Any, name: str, filled: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow(f"`{name}` should be a string, found {kind_of(value)}")
    if "\0" in value:
        raise BadRow(f"`{name}` holds NUL bytes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        what = f"byte {code - 0xDC00:#04x}" if 0xDC80 <= code <= 0xDCFF else "half a character"
        raise BadRow(f"`{name}` is not UTF-8: {what} at {error.start}") from None
    if filled and not value.strip():
        raise BadRow(f"`{name}` is empty")
    return value


def messages_of(value: Any, name: str) -> list[Message]:
    """OpenAI's messages, checked; texts in parts are joined, arguments of tool calls are objects."""
    if not isinstance(value, list):
        raise BadRow(f"`{name}` should be a list, found {kind_of(value)}")
    if not value:
        raise BadRow(f"`{name}` is empty")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(
            f"`{name}` should be an object with role and content, found {kind_of(message)}"
        )
    # columns of Parquet hold every key of any message, most of them null
    kept = {key: value for key, value in message.items() if value is not None}
    if "role" not in kept:
        raise BadRow(f"`{name}` has no `role`")
    role = checked_text(kept["role"], f"{name}.role")
    if role not in ROLES:
        raise BadRow(
            f"`{name}.role` {role!r} is none of {', '.join(ROLES)}.{did_you_mean(role, ROLES)}"
        )
    calls = kept.get("tool_calls")
    if calls:
        kept["tool_calls"] = [_call(call, f"{name}.tool_calls") for call in _list(calls, name)]
    else:
        kept.pop("tool_calls", None)
    if "content" not in kept and not calls:
        raise BadRow(f"`{name}` has no `content`")
    kept["content"] = _content(kept.get("content", ""), f"{name}.content")
    return kept


def _content(value: Any, name: str) -> str:
    if not isinstance(value, list):
        return checked_text(value, name)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            found = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise BadRow(f"`{name}` has a part of type {found}; only text can be trained on")
    return "".join(checked_text(part.get("text"), name) for part in value)


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"`{name}` should be a list of {{'function': {{'name', 'arguments'}}}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI sends JSON in a string, templates expect an object
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise BadRow(f"`{name}` has broken JSON as arguments: {error.msg}") from None
    made = {"type": "function", "function": {**function, "arguments": arguments}}
    return {**{key: call[key] for key in ("id",) if call.get(key)}, **made}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"`{name}` should be a list, found {kind_of(value)}")
    return value


def tools_of(columns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = columns.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise BadRow(f"`tools` is broken JSON: {error.msg}") from None
    if not tools:
        return None
    if not all(isinstance(tool, dict) for tool in _list(tools, "tools")):
        raise BadRow("`tools` should be a list of objects, one a function")
    return tools


# who speaks in ShareGPT's files
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def spoken(columns: Mapping[str, Any]) -> list[Message]:
    """`conversations` as messages, after `system` where there is one."""
    turns = _list(columns["conversations"], "conversations")
    if not turns:
        raise BadRow("`conversations` is empty")
    said = [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    if columns.get("system"):
        said.insert(0, {"role": "system", "content": text_of(columns, "system")})
    return said


def _turn(turn: Any, name: str) -> Message:
    if isinstance(turn, dict) and "role" in turn:
        return _message(turn, name)
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        raise BadRow(f"`{name}` should be an object with from and value")
    speaker, value = (
        checked_text(turn["from"], f"{name}.from"),
        checked_text(turn["value"], f"{name}.value"),
    )
    if speaker == "function_call":
        try:
            calls = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(f"`{name}` is a function call of broken JSON: {error.msg}") from None
        calls = calls if isinstance(calls, list) else [calls]
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [_call(call, name) for call in calls],
        }
    if speaker not in SPEAKERS:
        hint = did_you_mean(speaker, SPEAKERS)
        raise BadRow(f"`{name}.from` {speaker!r} is none of {', '.join(SPEAKERS)}.{hint}")
    return {"role": SPEAKERS[speaker], "content": value}


def spoken_answer(columns: Mapping[str, Any], name: str) -> Any:
    answer = columns[name]
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    turns = answer if isinstance(answer, list) else [answer]
    return [_turn(turn, name) for turn in turns]
