"""Every example runs from its first line to its last, in a folder of its own."""

from pathlib import Path

import programs
import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def test_the_examples_readme_lists_every_file():
    listed = (EXAMPLES[0].parent / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in EXAMPLES[0].parent.iterdir() if f"`{path.name}`" not in listed]
    assert missing == ["README.md"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_is_short(path, tmp_path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
    done = programs.run(["python", path], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
