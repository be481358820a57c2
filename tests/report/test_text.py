"""What a terminal shows: right at 80 columns, and plain when piped."""

import dataclasses
import io
import re

import pytest
from report_data import METRICS, VERIFICATION
from rich.console import Console
from rich.text import Text

from lowrank.merge import MergedFolder, Rounding
from lowrank.report import text
from lowrank.report.data import Fact, RunReport
from lowrank.report.rows import row_view
from lowrank.report.words import amount, number, percent


def shown(result):
    file = io.StringIO()
    text.show(result, file)
    return file.getvalue()


def right(lines):
    assert "\x1b" not in lines
    for line in lines.splitlines():
        assert len(line) <= 80
        assert line == line.rstrip()
    return " ".join(lines.split())


def test_a_verification_that_passed():
    words = right(shown(text.verification(VERIFICATION)))
    assert words.startswith("PASSED runs/merged = embedded + runs/lora")
    assert "48 of 48 hold what they should (35 changed by the adapter, 13 the base's)" in words
    assert "5.8% of the adapter's change of the weights; most at" in words
    assert "base 21.5, base + adapter 2.25, merged 2.26 (56 tokens)" in words
    assert "logits, rms 0.0258 0.456 5.7%" in words
    assert "! Rounding to bfloat16" in words


def test_a_verification_that_failed():
    wrong = dataclasses.replace(VERIFICATION.worst[0], present=0.0, problem="off by 1 ‖ΔW‖")
    failed = dataclasses.replace(
        VERIFICATION, passed=False, reasons=["a [bold]reason[/bold]"], worst=[wrong]
    )
    words = right(shown(text.verification(failed)))
    assert words.startswith("FAILED")
    assert "0.00 off by 1 ‖ΔW‖" in words
    assert "✗ a [bold]reason[/bold]" in words  # brackets are the user's, not markup


def test_without_outputs():
    assert "against" not in shown(
        text.verification(dataclasses.replace(VERIFICATION, outputs=None))
    )


def test_a_merged_folder():
    folder = MergedFolder(
        path="runs/merged",
        base="embedded",
        adapter="runs/lora",
        task="CAUSAL_LM",
        dtype="bfloat16",
        total_bytes=3_939_696,
        untied=True,
        tokenizer=None,
        rounding=[Rounding("model.layers.0.self_attn.q_proj.weight", "bfloat16", 0.125, 2.0, 0.03)],
        overall_rounding=0.058,
    )
    words = right(shown(text.merged(folder)))
    assert "runs/merged (3.9 MB, bfloat16)" in words
    assert "most at model.layers.0.self_attn.q_proj.weight: 12.5%" in words
    assert "untied" in words
    assert "none: neither base nor adapter has one" in words


def test_a_summary():
    data = RunReport(
        title="a run",
        metrics=METRICS,
        trainable_params=1000,
        total_params=20_000,
        costs=[Fact("time", "16 s", "2 threads")],
        verification=VERIFICATION,
    )
    words = right(shown(text.summary(data)))
    assert "exact match 0.0% 96.5% 98.0%" in words
    assert "1,000 of 20,000 (5.00%)" in words
    assert "time 16 s (2 threads)" in words
    assert "merged and verified passed" in words
    assert right(shown(text.summary(RunReport(title="nothing yet")))) == "nothing yet"


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0%"), (1, "100%"), (0.125, "12.5%"), (0.0031, "0.31%"), (0.00002, "0.0020%"),
     (1e-9, "0.00001% or less"), (None, "–"), (float("inf"), "–")],
)  # fmt: skip
def test_percent(value, written):
    assert percent(value) == written


def test_numbers_and_amounts():
    assert number(None) == number(float("nan")) == "–"
    assert number(0.12345, ".1%") == "12.3%"
    assert [amount(v, "B") for v in (0, 999, 1000, 1234567, 123e9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.2 MB",
        "123 GB",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_a_row_is_coloured_and_marked(width):
    """Every character once, the learnt ones green and between marks, at any width."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system="standard")
    parts = [("asked " * 30, False), ("answered " * 12 + "</s>", True)]
    console.print(row_view("row 1", parts))
    said = out.getvalue()
    assert all(len(Text.from_ansi(line)) <= width for line in said.splitlines())
    green = "".join(re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", said))
    assert green.split() == ["⟦answered", *["answered"] * 11, "</s>⟧"]
    assert said.count("asked") == 30
    console.print(row_view("row 2", [("x" * 500, True)], limit=100))
    assert "401 characters" in " ".join(Text.from_ansi(out.getvalue()).plain.split())
