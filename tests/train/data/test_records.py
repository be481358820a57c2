"""Every format that data comes in, each with what can be wrong with it."""

import json
import os
from pathlib import Path

import pytest

from lowrank.cli.settings import resolve
from lowrank.train.data.rows import DataError, Row, read_data, read_rows
from lowrank.train.data.shapes import Judged, Preference
from lowrank.train.tasks.table import TASKS

PAIRS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]
LINES = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
TABLE = "prompt,completion\n" + "".join(f"p{i},c{i}\n" for i in range(3))
# name -> content, and the lines of the three rows
FILES = {
    "rows.jsonl": (LINES, "1 2 3"),
    "rows.ndjson": (LINES, "1 2 3"),
    "rows": (LINES, "1 2 3"),
    "named.json": (LINES, "1 2 3"),  # JSONL under the other name
    "list.json": (json.dumps(PAIRS, indent=1), "2 6 10"),
    "in_one_line.json": (json.dumps(PAIRS), "1 1 1"),
    "held.json": (json.dumps({"version": 2, "data": PAIRS}, indent=1), "4 8 12"),
    "rows.csv": (TABLE, "2 3 4"),
    "rows.tsv": (TABLE.replace(",", "\t"), "2 3 4"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
def test_three_rows_of_each_format(tmp_path, name, start):
    content, lines = FILES[name]
    path = tmp_path / name
    path.write_bytes(start + content.replace("\n", "\r\n").encode())
    assert read_rows([path]) == [
        Row(f"p{i}", f"c{i}", f"{path}:{line}") for i, line in enumerate(lines.split())
    ]


def test_quoted_fields_have_commas_lines_and_length(tmp_path):
    path = tmp_path / "rows.csv"
    long = "x" * 200_000
    path.write_text(f'prompt,completion\n"a, ""b""\n\u2028c",{long}\n\nd,e\n', encoding="utf-8")
    first, second = read_rows([path])
    assert (first.prompt, first.answer) == ('a, "b"\n\u2028c', long)
    assert (first.where, second.where) == (f"{path}:2", f"{path}:5")


def test_text_by_the_line_and_tables_without_a_header(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("a || b\n\nc||d\n")
    assert [row.answer for row in read_rows([path])] == ["a || b", "c||d"]
    rows = read_rows([path], separator="||", columns=["prompt", "completion"])
    assert rows == [Row("a", "b", f"{path}:1"), Row("c", "d", f"{path}:3")]
    with pytest.raises(DataError, match="its columns have no names"):
        read_rows([path], separator="||")
    table = tmp_path / "rows.csv"
    table.write_text("a;b\n")
    rows = read_rows([table], separator=";", columns=["prompt", "completion"])
    assert [(row.prompt, row.answer) for row in rows] == [("a", "b")]


# name -> (content, what is said)
BAD = {
    "broken.json": (b'[{"text": "a"},\n {"text": }]', "broken.json:2: broken JSON at column 11"),
    "cut.json": (b'[{"text": "a"},\n {"text": "b"}', "cut.json:2: broken JSON: expected , or ]"),
    "two.json": (b'{"a": [], "b": []}', "an object with one list; its lists: 'a', 'b'"),
    "number.json": (b"3", "expected a list of objects, found a number"),
    "items.json": (b'[{"text": "a"},\n3]', "items.json:2: expected an object {…}, found a number"),
    "bytes.json": (b'[{"text": "a"},\n{"text": "\xff"}]', "bytes.json:2: `text` is not UTF-8: byte 0xff at 0"),
    "short.csv": (b"text,label\na,b\nc\n", "short.csv:3: 1 fields, and its header has 2"),
    "quote.csv": (b'text\n"a\n', "quote.csv:2: broken CSV: unexpected end of data"),
    "bytes.csv": (b"text\na\nb\xe4\n", "bytes.csv:3: `text` is not UTF-8: byte 0xe4 at 1"),
    "nul.csv": (b"text\na\nb\0\n", "nul.csv:3: `text` holds NUL bytes"),
    "twice.csv": (b"text,text\na,b\n", "twice.csv:1: its header names twice: 'text'"),
    "semicolon.csv": (b"prompt;completion\na;b\n", "semicolon.csv:1: its header 'prompt;completion' has no ','; data.separator: ';'?"),
    "header.csv": (b"text\n", "header.csv: no rows"),
    "wide.jsonl": ('{"text": "ä"}'.encode("utf-16"), "wide.jsonl: it is UTF-16"),
    "wide.csv": ("text\nä".encode("utf-16"), "wide.csv: it is UTF-16"),
    "bad.parquet": (b"PAR1 or not", "bad.parquet: not Parquet"),
    "rows.xlsx": (b"PK", "rows.xlsx: .xlsx is none of .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_with_its_place(tmp_path, name):
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows([tmp_path / name])
    assert said in str(caught.value)
    assert str(caught.value).startswith("1 bad line (")


def test_bad_rows_are_skipped_where_that_is_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES.encode() + b'{"prompt": \n{"prompt": "a", "completion": ""}\n')
    data = read_data([path], on_bad_row="skip")
    assert (len(data.rows), data.skipped) == (3, 2)
    assert f"{path}:4: broken JSON" in data.problems
    assert f"{path}:5: `completion` is empty" in data.problems
    # what cannot be read at all is never skipped, nor is everything
    with pytest.raises(DataError, match="no such file"):
        read_data([path, tmp_path / "missing.jsonl"], on_bad_row="skip")
    (tmp_path / "broken.json").write_text('[{"text": "a"}, {')
    with pytest.raises(DataError, match="no more was read"):
        read_data([path, tmp_path / "broken.json"], on_bad_row="skip")
    path.write_text("{}\n")
    with pytest.raises(DataError, match="no shape"):
        read_data([path], on_bad_row="skip")


def test_a_folder_is_read_by_the_splits_that_its_names_tell(tmp_path):
    for name in ("a.jsonl", "b/c.csv", "README.md", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES if name.endswith("jsonl") else TABLE)
    assert len(read_rows([tmp_path])) == 6
    for name, count in (("train-00000-of-1.jsonl", 1), ("dev.jsonl", 2)):
        (tmp_path / name).write_text(LINES[: len(LINES) // 3 * count])
    assert len(read_rows([tmp_path])) == 1
    assert len(read_rows([tmp_path], split="test")) == 2  # there is no test part
    (tmp_path / "test.jsonl").write_text(LINES)
    assert len(read_rows([tmp_path], split="test")) == 3
    (tmp_path / "train-00000-of-1.jsonl").unlink()
    with pytest.raises(DataError, match=r"none is 'train': a\.jsonl, c\.csv"):
        read_rows([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file in this folder ends in"):
        read_rows([tmp_path / "empty"])


def test_parquet_and_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    classes = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    train = datasets.Dataset.from_list(PAIRS)
    test = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=classes)
    train.to_parquet(tmp_path / "rows.parquet")
    assert read_rows([tmp_path / "rows.parquet"]) == [
        Row(f"p{i}", f"c{i}", f"{tmp_path}/rows.parquet:{i + 1}") for i in range(3)
    ]
    both = datasets.DatasetDict({"train": train, "validation": test})
    train.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "both")
    for name in ("one", "both"):
        assert [row.prompt for row in read_rows([tmp_path / name])] == ["p0", "p1", "p2"]
    answers = [("a", "yes"), ("b", "no")]  # classes go by their names
    rows = read_rows([tmp_path / "both"], split="test")
    assert [(row.prompt, row.answer) for row in rows] == answers

    def load(name, config, split):
        assert (name, config) == ("org/name", "part")
        return both if split is None else both[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_rows(["org/name:part"])) == 3
    assert read_rows(["org/name:part@validation"])[0].where == "org/name:part@validation:1"
    del both["validation"]
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        read_rows(["org/name:part"], split="test")

    def fail(*_, **__):
        raise ConnectionError("no net\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"no dataset of the hub: no net$"):
        read_rows(["org/name"])


EXAMPLES = Path(__file__).parents[3] / "examples"
REAL = Path(os.environ.get("LOWRANK_REAL_DATA", ""))


@pytest.mark.skipif("LOWRANK_REAL_DATA" not in os.environ, reason="LOWRANK_REAL_DATA is not set")
def test_files_from_the_field():
    def read(name, **options):
        return read_data([REAL / name], **options)

    gsm = {"question": "prompt", "answer": "completion"}
    assert len(read("gsm8k", columns=gsm).rows) == 7473
    assert len(read("gsm8k", columns=gsm, split="test").rows) == 1319
    banking = read("banking77", columns={"category": "label"})
    assert (len(banking.rows), banking.shapes) == (10003, {"text-label": 10003})
    e2e = read("e2e/valid.txt", separator="||", columns=["prompt", "completion"])
    assert len(e2e.rows) == 4672
    assert read("instructions/alpaca_en_demo.json").shapes == {"alpaca": 999}
    pairs = read("instructions/dpo_en_demo.json").rows
    assert len(pairs) == 300
    assert all(isinstance(pair, Preference) for pair in pairs)
    judged = read("instructions/kto_en_demo.json").rows
    assert all(isinstance(row, Judged) for row in judged)
    assert len({row.label for row in judged}) == 2


@pytest.mark.parametrize(
    ("name", "rows", "shape"),
    [
        ("gsm8k", 7473, "prompt-completion"),
        ("alpaca", 999, "alpaca"),
        ("banking77", 10003, "text-label"),
        ("e2e", 4672, "prompt-completion"),
        ("dpo", 300, "sharegpt-preference"),
        ("kto", 300, "messages-kto"),
    ],
)
def test_settings_of_the_examples(name, rows, shape, monkeypatch):
    """They can be read, and so can the files they name, where those are at hand."""
    settings = resolve(EXAMPLES / f"{name}.yaml", {}, ("model.path", "data.train"))
    if "LOWRANK_REAL_DATA" in os.environ:
        monkeypatch.chdir(REAL)
        takes = TASKS[settings.train.task].takes
        data = read_data([settings.data.train], **settings.data.reading, takes=takes)
        assert data.shapes == {shape: rows}
        assert data.rows[0][0]
