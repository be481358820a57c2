"""The page: whole in itself, everything in it, nothing from outside, and nothing unescaped."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_data import METRICS, VERIFICATION

from lowrank.report.chart import step_chart
from lowrank.report.data import (
    Curve,
    Fact,
    ModuleRow,
    RunReport,
    Sample,
    Setting,
    to_json,
)
from lowrank.report.html import page, write_report

EVIL = '<script>alert("x")</script> & so on'
RUN = RunReport(
    title=f"LoRA {EVIL}",
    summary="150 steps over 600 rows.",
    created="2026-11-22T04:20:00+00:00",
    command="lowrank train run.yaml",
    metrics=METRICS,
    losses=[
        Curve("train <loss>", list(range(1, 61)), [4 / step for step in range(1, 61)]),
        Curve("eval", [0, 30, 60], [4.0, math.nan, 0.1]),
    ],
    rewards=[Curve("margin", [1, 2], [0.0, 0.5])],
    samples=[Sample(EVIL, "expected", "", f"after {EVIL}", None, False, True)],
    modules=[ModuleRow("q_proj", "linear", "192 × 192", 8, 4, 12288)],
    trainable_params=12288,
    total_params=2_000_000,
    costs=[Fact("training time", "16.2 s", "150 steps")],
    settings=[
        Setting("lora.r", 8, "run.yaml"),
        Setting("output.dir", Path("runs"), "flag"),
        Setting("lora.target_modules", ["q_proj"], "default"),
    ],
    versions={"lowrank": "0.1.0"},
    verification=VERIFICATION,
)


class Page(HTMLParser):
    """Checks that elements nest, and collects the tags, attributes and text."""

    VOID = ("meta", "br", "path", "use", "rect")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_everything_is_on_the_page():
    text = Page(page(RUN)).text
    for words in (
        "150 steps over 600 rows.",
        "exact match ↑",
        "96.5%",
        "98.0%",
        "160 rows of the test part",
        "optimiser steps",
        "✓ right",
        "✗ wrong",
        "(empty)",
        "192 × 192",
        "12,288",
        "of 2,000,000 (0.61%)",
        "16.2 s",
        "✓ the same function, up to rounding",
        "base + adapter: 2.25, 56 tokens",
        '["q_proj"]',
        "run.yaml",
        "lowrank 0.1.0",
    ):
        assert words in text, words


def test_nothing_comes_from_outside_and_nothing_runs():
    source = page(RUN)
    found = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(found.tags)
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#"), (tag, name, value)
    style = re.sub(r"url\(#\w+\)", "", source)
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in source


def test_text_is_escaped():
    found = Page(page(RUN))
    assert found.text.count(EVIL) >= 3
    assert "script" not in found.tags


def test_an_empty_run_has_no_empty_sections():
    found = Page(page(RunReport(title="nothing yet")))
    assert "h2" not in found.tags
    assert "svg" not in found.tags


def test_a_failed_verification_says_why():
    wrong = dataclasses.replace(VERIFICATION.worst[0], present=0.0, problem="off by 1 ‖ΔW‖")
    failed = dataclasses.replace(VERIFICATION, passed=False, reasons=["a reason"], worst=[wrong])
    text = Page(page(dataclasses.replace(RUN, verification=failed))).text
    for words in ("✗ not the same function", "a reason", "off by 1 ‖ΔW‖"):
        assert words in text


def test_the_file_replaces_an_older_one_or_stays(tmp_path, monkeypatch):
    path = write_report(tmp_path / "deep" / "report.html", RUN)
    assert path.read_text(encoding="utf-8") == page(RUN)
    monkeypatch.setattr("lowrank.report.html.page", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(path, RUN)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_the_chart_takes_the_pages_colours_and_is_the_same_each_time():
    svg = step_chart(RUN.losses)
    assert svg == step_chart(RUN.losses)
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert 'aria-label="Loss, nats per token by optimiser steps: train &lt;loss&gt;, eval"' in svg
    assert "NaN" not in svg
    assert "nan" not in svg
    assert step_chart([]) == step_chart([Curve("none", [1], [math.inf])]) == ""


def test_losses_and_rewards_have_a_chart_each():
    found = Page(page(RUN))
    assert found.tags.count("svg") == 2
    names = [value for _, name, value in found.attributes if name == "aria-label"]
    assert names[1] == "Reward by optimiser steps: margin"
    assert Page(page(dataclasses.replace(RUN, rewards=[]))).tags.count("svg") == 1


def test_a_long_curve_is_thinned():
    steps = list(range(100_000))
    assert len(step_chart([Curve("train", steps, [1 + step % 7 for step in steps])])) < 60_000


def test_json_of_a_run():
    written = json.dumps(to_json(RUN), allow_nan=False)
    read = json.loads(written)
    assert read["losses"][1]["values"] == [4.0, None, 0.1]
    assert read["settings"][1]["value"] == "runs"
    assert read["verification"]["outputs"]["kl"] == 1.6e-4
