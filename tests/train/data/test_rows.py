import json

import pytest
from text import write_rows

from lowrank.train.data.rows import DataError, read_data, read_rows
from lowrank.train.data.shapes import Judged, Preference, Row

GOOD = {"prompt": "2 + 2?", "completion": "4"}


def test_the_three_shapes(tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "p", "completion": "c", "other": 1},
        b"",
        {"text": "t"},
    )
    rows = read_rows([path])
    assert [(row.prompt, row.answer) for row in rows] == [
        ([{"role": "user", "content": "a"}], "b"),
        ("p", "c"),
        (None, "t"),
    ]
    assert rows[-1].where == f"{path}:4"


BAD = {
    b'{"prompt": "a", "completion": "b"': "broken JSON at column",
    b"[1, 2]": "expected an object {…}, found a list",
    b'{"text": "\xff"}': "not UTF-8: byte 0xff at 10",
    b'{"question": "a", "answer": "b"}': "map them: data.columns: {question: prompt, answer: completion}",
    b'{"prompt": "a", "answer": "b"}': "map them: data.columns: {answer: completion}",
    b'{"question": "a", "context": "b", "answer": "c"}': "column `answers` is missing (squad); its columns: question, context, answer. Did you mean 'answer'?",
    b'{"text": "a", "messages": []}': "fit messages (messages) and text (text): say which with data.shape",
    rb'{"text": "a\u0000"}': "`text` holds NUL bytes",
    b'{"text": "a\x00"}': "holds NUL bytes: cut off",
    rb'{"text": "\ud800"}': "`text` is not UTF-8: half a character at 0",
    b'{"prompt": "a"}': "column `completion` is missing",
    b'{"prompt": 3, "completion": "b"}': "`prompt` should be a string, found a number",
    b'{"prompt": "a", "completion": " "}': "`completion` is empty",
    b'{"prompt": "a", "completion": null}': "`completion` should be a string, found null",
    b'{"text": ""}': "`text` is empty",
    b'{"messages": "a"}': "`messages` should be a list, found a string",
    b'{"messages": []}': "`messages` is empty",
    b'{"messages": [{"role": "user", "content": "a"}]}': "it is the user's",
    b'{"messages": [{"role": "usr", "content": "a"}]}': "Did you mean 'user'?",
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "a part of type image_url",
    b'{"conversations": [{"from": "humn", "value": "a"}]}': "Did you mean 'human'?",
    b'{"conversations": [{"from": "human", "value": 3}]}': "`conversations[0].value` should be a string",
    b'{"instruction": " ", "input": "", "output": "b"}': "`instruction` is empty",
    b'{"instruction": "a", "output": ""}': "`output` is empty",
    b'{"question": "a", "context": "b", "answers": {"text": [], "answer_start": []}}': "a question without an answer",
    b'{"question": "a", "context": "bcd", "answers": {"text": ["d"], "answer_start": [1]}}': "says that 'd' is at 1 of `context`, and it is not",
    b'{"text": "a", "label": null}': "`label` should be a string or a whole number, found null",
    b'{"prompt": "a", "completion": "b", "label": 2}': "`label` should be true or false beside a completion",
    b'{"prompt": "a", "chosen": "b", "rejected": "b"}': "`chosen` and `rejected` are the same",
    b'{"messages": [{"role": "assistant", "content": "a"}]}': "an answer and no question",
    b'{"messages": [{"role": "user"}]}': "`messages[0]` has no `content`",
    b'{"messages": ["a"]}': "`messages[0]` should be an object",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: BAD[line])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line):
    path = write_rows(tmp_path / "rows.jsonl", *[GOOD] * 16, line, GOOD)
    with pytest.raises(DataError) as caught:
        read_rows([path])
    assert f"{path}:17: " in str(caught.value)
    assert BAD[line] in str(caught.value)


def test_all_bad_lines_of_all_files_come_together(tmp_path):
    first = write_rows(tmp_path / "first.jsonl", GOOD, b"{", b"[]")
    second = write_rows(tmp_path / "second.jsonl", {"a": 1})
    empty = write_rows(tmp_path / "empty.jsonl")
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(DataError) as caught:
        read_rows([first, second, empty, missing])
    text = str(caught.value)
    for part in ("5 bad lines (1 good)", f"{first}:2", f"{first}:3", f"{second}:1"):
        assert part in text
    assert f"{empty}: no rows" in text
    assert f"{missing}: no such file" in text


def test_lines_that_share_a_problem_are_named_together(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", *[{"colour": "a"}] * 3, GOOD, *[b"[]"] * 90)
    with pytest.raises(DataError) as caught:
        read_rows([path])
    head, first, second = str(caught.value).splitlines()
    assert head == "93 bad lines (1 good)"
    assert first.startswith(
        f"  {path}:1, 2, 3: no shape has these columns: colour. Shapes: messages;"
    )
    assert second.startswith(f"  {path}:5, 6, 7, 8, 9 and 85 more lines: expected an object")


@pytest.mark.parametrize(
    ("takes", "expected"),
    [
        (Row, "Shapes: messages; conversations; instruction, output; prompt, completion; text;"),
        (Preference, "{query: prompt, better: chosen, worse: rejected}"),
        (Judged, "Shapes: prompt, completion, label; messages, label."),
    ],
)
def test_the_shapes_that_are_suggested_are_those_that_the_task_takes(tmp_path, takes, expected):
    path = write_rows(tmp_path / "rows.jsonl", {"query": "a", "better": "b", "worse": "c"})
    with pytest.raises(DataError) as caught:
        read_data([path], takes=takes)
    assert expected in str(caught.value)


def test_a_flood_of_problems_is_counted(tmp_path):
    lines = [{f"column {i}": 1} for i in range(100)]
    with pytest.raises(DataError, match="… and 80 more problems"):
        read_rows([write_rows(tmp_path / "rows.jsonl", *lines)])


def test_a_byte_order_mark_and_windows_line_ends_are_no_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert len(read_rows([path])) == 1
