"""What README and docs/ show is run: Python blocks as programs, `lowrank` lines in the shell, page by page."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs
import pytest

from lowrank import LoraConfig
from lowrank.config_problems import REFUSED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^```(python|sh|yaml (?P<name>\S+))\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of the page's blocks; a `yaml NAME` block is a file of that name."""
    text = page.read_text(encoding="utf-8")
    return [(match[1], match["code"]) for match in BLOCK.finditer(text)]


FRESH = {"compat"}  # the page about imports: in processes that begin with none


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_every_block_of_the_page_runs(page, tmp_path):
    """One folder a page: later blocks may use what earlier ones made."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for words in commands(page, tmp_path):
        done: Any
        if words[0] != "bash" and page.stem not in FRESH:
            done = programs.run(words, tmp_path)
        else:
            words = [sys.executable, *words[1:]] if words[0] == "python" else words
            done = subprocess.run(
                words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
        assert done.returncode == 0, f"{words[-1]}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def commands(page: Path, folder: Path) -> Iterator[list[str]]:
    """The page's blocks as commands to run in turn: Python up to the next shell block is one program."""
    program = ""
    for language, code in [*blocks(page), ("sh", "")]:
        if language.startswith("yaml "):
            (folder / language.split()[1]).write_text(code, encoding="utf-8")
        elif language == "python":
            program += code
        else:
            if program:
                yield ["python", "-c", program]
                program = ""
            lines = [line for line in code.splitlines() if not line.startswith(("make ", "git "))]
            if page.stem not in FRESH and all(
                re.match(r"lowrank [^>|$]*$", line) for line in lines
            ):
                yield from map(shlex.split, lines)
            elif lines:
                yield ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]


def test_pages_link_to_files_that_exist():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_configuration_page_has_every_field():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))
    missing = [f.name for f in dataclasses.fields(LoraConfig) if f"`{f.name}`" not in rows]
    assert missing == []


def test_configuration_page_says_refused_of_what_is_refused():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    said = {
        name
        for row in rows
        if row[3].strip().startswith("refused")
        for name in re.findall(r"`(\w+)`", row[1])
    }
    assert said == set(REFUSED)
