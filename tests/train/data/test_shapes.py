"""Every shape, by what its row becomes."""

from pathlib import Path

import pytest
from text import write_rows

from lowrank.train.data.file_formats import FORMATS
from lowrank.train.data.rows import DataError, Row, read_data, read_rows
from lowrank.train.data.shapes import SHAPES, Judged, Preference


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
# shape -> rows of it, each with what it is read as
READ = {
    "messages": [
        ({"messages": [user("a"), assistant("b")]}, Row([user("a")], "b", "")),
        (  # as Parquet has it: every key of any message; texts in parts
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}], "name": None},
                    {**assistant("b"), "reasoning_content": "c"},
                ]
            },
            Row([user("a")], "b", "", [{**assistant("b"), "reasoning_content": "c"}]),
        ),
        (  # arguments as OpenAI sends them, in a string
            {
                "messages": [
                    user("1 + 1"),
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "x", "function": {"name": "add", "arguments": '{"a": 1}'}}
                        ],
                    },
                    {"role": "tool", "content": "2", "tool_call_id": "x"},
                    assistant("two"),
                ],
                "tools": TOOLS,
            },
            Row(
                [
                    user("1 + 1"),
                    {**assistant(""), "tool_calls": [{"id": "x", **CALL}]},
                    {"role": "tool", "content": "2", "tool_call_id": "x"},
                ],
                "two",
                "",
                None,
                TOOLS,
            ),
        ),
    ],
    "sharegpt": [
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "b"},
                ],
                "system": "s",
                "tools": '[{"type": "function", "function": {"name": "add"}}]',
            },
            Row(
                [
                    system("s"),
                    user("a"),
                    {**assistant(""), "tool_calls": [CALL]},
                    {"role": "tool", "content": "2"},
                ],
                "b",
                "",
                None,
                TOOLS,
            ),
        ),
    ],
    "alpaca": [
        ({"instruction": "a", "input": "", "output": "b"}, Row("a", "b", "")),
        ({"instruction": "a", "output": "b"}, Row("a", "b", "")),
        ({"instruction": "a", "input": "i", "output": "b"}, Row("a\ni", "b", "")),
        (
            {"instruction": "a", "output": "b", "system": "s", "history": [["q", "r"]]},
            Row([system("s"), user("q"), assistant("r"), user("a")], "b", ""),
        ),
    ],
    "prompt-completion": [
        ({"prompt": "a", "completion": "b", "id": 7}, Row("a", "b", "")),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, Row([user("a")], "b", "")),
        (
            {"prompt": [user("a")], "completion": [assistant("b"), user("c"), assistant("d")]},
            Row([user("a")], "d", "", [assistant("b"), user("c"), assistant("d")]),
        ),
    ],
    "text": [({"text": "a"}, Row(None, "a", ""))],
    "squad": [
        (
            {
                "context": "xay",
                "question": "q",
                "answers": {"text": ["a", "b"], "answer_start": [1, 2]},
            },
            Row("xay\n\nq", "a", ""),
        ),
        ({"context": "c", "question": "q", "answers": ["a"]}, Row("c\n\nq", "a", "")),
        (
            {"context": "xay", "question": "q", "answers": [{"text": "a", "answer_start": 1}]},
            Row("xay\n\nq", "a", ""),
        ),
    ],
    "summary": [({"dialogue": "a", "summary": "b"}, Row("a", "b", ""))],
    "text-label": [
        ({"text": "a", "label": "b"}, Row("a", "b", "")),
        ({"text": "a", "label": 3}, Row("a", "3", "")),
    ],
    "preference": [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Preference("a", "b", "c", "")),
        (
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            Preference([user("a")], [assistant("b")], [assistant("c")], ""),
        ),
        (  # the answers begin with the prompt
            {
                "prompt": "a",
                "chosen": [user("a"), assistant("b")],
                "rejected": [user("a"), assistant("c")],
            },
            Preference([user("a")], [assistant("b")], [assistant("c")], ""),
        ),
    ],
    "sharegpt-preference": [
        (
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {"from": "gpt", "value": "c"},
            },
            Preference([user("a")], [assistant("b")], [assistant("c")], ""),
        )
    ],
    "alpaca-preference": [
        (
            {"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"},
            Preference("a\ni", "b", "c", ""),
        )
    ],
    "chosen-rejected": [
        (
            {
                "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
            },
            Preference(
                [user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")], ""
            ),
        )
    ],
    "kto": [
        ({"prompt": "a", "completion": "b", "label": True}, Judged("a", "b", True, "")),
        ({"prompt": "a", "completion": "b", "label": "False"}, Judged("a", "b", False, "")),
    ],
    "messages-kto": [
        (
            {"messages": [user("a"), assistant("b")], "label": False},
            Judged([user("a")], [assistant("b")], False, ""),
        )
    ],
}


def test_every_shape_is_tried():
    assert READ.keys() == SHAPES.keys()


@pytest.mark.parametrize(
    ("shape", "columns", "read"), [(shape, *row) for shape, rows in READ.items() for row in rows]
)
def test_a_row_of_each_shape(tmp_path, shape, columns, read):
    path = write_rows(tmp_path / "rows.jsonl", columns)
    for named in (None, shape):
        data = read_data([path], shape=named)
        assert data.rows == [read._replace(where=f"{path}:1")]
        assert data.shapes == {shape: 1}


def test_the_shape_can_be_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b", "text": "c"})
    with pytest.raises(DataError, match=r"fit prompt-completion .* and text .* data\.shape"):
        read_data([path])
    data = read_data([path], shape="text")
    assert data.rows[0].answer == "c"
    assert data.unread == ["prompt", "completion"]
    with pytest.raises(DataError, match="column `messages` is missing"):
        read_data([path], shape="messages")
    with pytest.raises(DataError, match="Did you mean 'alpaca'"):
        read_data([path], shape="alpacca")


def test_columns_get_other_names(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", {"question": "a", "answer": "b", "id": 1})
    names = {"question": "prompt", "answer": "completion"}
    data = read_data([path], columns=names)
    assert data.rows == [Row("a", "b", f"{path}:1")]
    assert data.unread == ["id"]
    with pytest.raises(DataError, match=r"no column `qestion`.* Did you mean 'question'"):
        read_data([path], columns={"qestion": "prompt"})
    with pytest.raises(DataError, match="there is a column `id` already"):
        read_data([path], columns={"question": "id"})
    assert read_rows([path], columns={**names, "id": "question"})[0].prompt == "a"


def test_a_prompt_is_written_by_a_template(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", {"question": "a", "answer": "b", "n": [1, 2]})

    def prompt(template, columns=None):
        return read_rows(
            [path], columns=columns or {"answer": "completion"}, prompt_template=template
        )[0].prompt

    assert prompt("Q: {{ question }}{% for i in n %} {{ i }}{% endfor %}\n") == "Q: a 1 2\n"
    # a column goes by both its names
    both = {"answer": "completion", "question": "asked"}
    assert prompt("{{ question }}{{ asked }}", both) == "aa"
    with pytest.raises(DataError, match=r":1: data\.prompt_template: 'qestion' is undefined"):
        prompt("{{ qestion }}")
    with pytest.raises(DataError, match="is not Jinja"):
        prompt("{{ question")
    # a template is data too: it reaches no Python
    with pytest.raises(DataError, match="unsafe"):
        prompt("{{ question.__class__.__mro__ }}")
    talk = write_rows(tmp_path / "talk.jsonl", {"messages": [user("a"), assistant("b")]})
    with pytest.raises(DataError, match="rows of messages have none"):
        read_rows([talk], prompt_template="x")


def test_preferences_are_not_fine_tuned_on(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(
        DataError, match=r"1 of 1 rows are pairs of a better and a worse answer \(preference;"
    ):
        read_rows([path])
    assert read_rows([path], columns={"chosen": "completion"}) == [Row("a", "b", f"{path}:1")]


def test_the_page_has_every_shape_and_format():
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("|"))
    assert [name for name in (*SHAPES, *FORMATS) if f"`{name}`" not in rows] == []
