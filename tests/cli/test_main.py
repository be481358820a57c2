"""The program as a user starts it: a process of its own."""

import os
import subprocess
import sys

import pytest

from lowrank.cli import COMMANDS, main


def run(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "lowrank.cli", *words], capture_output=True, text=True, **options
    )


def test_help_imports_no_torch():
    code = (
        "import sys; from lowrank.cli import main; status = main(['--help']); "
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"  {name} " in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lowrank 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: lowrank COMMAND"),
        (["trian"], "no command 'trian'. Did you mean 'train'"),
        (
            ["train", "--lerning_rate", "3"],
            "unknown argument --lerning_rate. Did you mean '--learning_rate'",
        ),
        (["train"], "model.path is missing"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "rows.jsonl"], "give it as --data rows.jsonl"),
        (
            ["resize", "a", "b", "--energi", "1"],
            "unknown argument --energi. Did you mean '--energy'",
        ),
        (["resize", "a", "b", "--rank", "0"], "0 is not a whole number of at least 1"),
        (["combine", "a", "b", "--weights", "nan"], "nan is not a finite number"),
        (["generate", "embedded", "hi", "--max-new-tokens", "-1"], "-1 is not a whole number"),
        (["generate", "embedded", "hi", "--temperature", "-1"], "-1 is not a number of at least 0"),
        (["evaluate"], "the following arguments are required: --data"),
        (["plan", "./nothing-here"], "there is no model folder ./nothing-here"),
    ],
)
def test_usage_errors_end_with_2_and_a_sentence(words, message, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "quickstart"])
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"lowrank {name}" in capsys.readouterr().out


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m lowrank.cli train --help | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
