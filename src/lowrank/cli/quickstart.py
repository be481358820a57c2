"""The whole job on the model in this package: no arguments, no network, about two minutes.

Trains an adapter and, for comparison, every weight (same rows, same steps), each in a process of
its own; merges the adapter, verifies the merged folder, answers a prompt, writes the report.
Everything lands in ./quickstart, or in quickstart-2 and so on where that exists.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from lowrank.errors import LowrankError

TASK = "embedded:intents"
EPOCHS = 5
ANSWERS = 160  # prompts that are answered before and after a training
RECIPE = """\
# {title}: lowrank train {name}.yaml
model:
  path: embedded
{lora}data:
  train: {task}
  eval: {task}
  base_skill: embedded
train:
  method: {name}
  learning_rate: 5.0e-4
  {length}
  batch_size: 8
eval:
  generate: {answers}
  max_new_tokens: 16
output:
  dir: {folder}
"""
# a high alpha at a low rate forgot less than the reverse, for the same score: docs/quickstart.md
LORA = "lora:\n  r: 8\n  lora_alpha: 64\n  target_modules: all-linear\n"
# what is in the folder, and what --overwrite removes of it
PARTS = ("lora", "full", "merged", "lora.yaml", "full.yaml", "lora.txt", "full.txt", "report.html")
RUNS = {"lora": ("LoRA", LORA), "full": ("full", "")}  # what differs between the two


class QuickstartError(LowrankError, RuntimeError):
    """A step of the quickstart failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("quickstart"), metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quickstart")
    parser.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="stop each training early, and answer fewer prompts",
    )


def run(args: argparse.Namespace) -> int:
    # one thread, here and in the processes started from here: the model is tiny, so that a second
    # thread costs more than it brings, and the other core has the other training; and no network
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    folder = make_folder(args.output, args.overwrite, args.max_steps)
    print_plan(folder)
    records = train_both(folder)

    from lowrank.cli import comparison  # from here on with torch
    from lowrank.report.text import show

    verification = merge_and_verify(folder)
    answer(folder)
    report = comparison.report(folder, records, verification)
    head("result", f"after {records['lora']['training']['steps']} steps each")
    show(comparison.table(records))
    seconds = time.perf_counter() - started
    print(f"\n {folder}/ holds it all, in {seconds:.0f} s: lora/ the adapter, full/, merged/,")
    print(f" and {report}. To do one part again:\n")
    print(f"   lowrank train {folder / 'lora.yaml'} --lr 1e-3 --output {folder / 'mine'}")
    return 0 if verification.passed else 1


def make_folder(wanted: Path, overwrite: bool, max_steps: int | None) -> Path:
    """`wanted`, emptied of an earlier quickstart if so told; else the first of -2, -3, … that is free."""
    folder = wanted
    if overwrite:
        for part in PARTS:
            path = folder / part
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    else:
        numbers = itertools.count(2)
        while folder.exists():
            folder = wanted.with_name(f"{wanted.name}-{next(numbers)}")
    folder.mkdir(parents=True, exist_ok=True)
    length = f"epochs: {EPOCHS}" if max_steps is None else f"max_steps: {max_steps}"
    for name, (title, lora) in RUNS.items():
        text = RECIPE.format(
            name=name,
            title=title,
            lora=lora,
            length=length,
            answers=ANSWERS if max_steps is None else ANSWERS // 10,
            task=TASK,
            folder=folder / name,
        )
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def print_plan(folder: Path) -> None:
    from lowrank.cli import main

    head("plan", "which layers get an adapter")
    if main(["plan", str(folder / "lora.yaml")]):
        raise QuickstartError("the plan failed")


def train_both(folder: Path) -> dict[str, dict[str, Any]]:
    """Both trainings, each alone in a process with one thread; side by side where there are two cores."""
    side_by_side = _cores() > 1
    how = "side by side" if side_by_side else "one after the other"
    head("train", f"LoRA, and every weight: same rows, steps and rate; {how}")
    waiting = list(RUNS)
    running: dict[str, subprocess.Popen] = {}
    progress = Progress(folder)
    try:
        while waiting or running:
            while waiting and len(running) < (2 if side_by_side else 1):
                name = waiting.pop(0)
                running[name] = _start(folder, name)
            time.sleep(0.5)
            progress.show()
            for name in [name for name, process in running.items() if process.poll() is not None]:
                _check(folder, name, running.pop(name).returncode)
    finally:
        for process in running.values():
            process.terminate()
    progress.show(last=True)
    return {name: json.loads((folder / name / "run.json").read_text()) for name in RUNS}


def merge_and_verify(folder: Path) -> Any:
    from lowrank.cli.opening import model_path, open_rows, open_tokenizer
    from lowrank.merge import merge_to_folder
    from lowrank.report.text import merged, show
    from lowrank.report.text import verification as verification_text
    from lowrank.train.data.encode import encode
    from lowrank.verify import verify

    base, adapter, out = model_path("embedded"), folder / "lora", folder / "merged"
    head("merge", "base and adapter become one folder that transformers loads by itself")
    show(merged(merge_to_folder(base, adapter, out, overwrite=True)))
    head("verify", "in a fresh process: is the merged folder the same function?")
    rows = encode(open_rows(TASK, "test"), open_tokenizer(base), max_length=256)
    result = verify(base, adapter, out, inputs=rows.examples)
    show(verification_text(result))
    return result


def answer(folder: Path) -> None:
    """The first test prompts to the base and to the merged folder."""
    from lowrank.cli.opening import open_model, open_rows
    from lowrank.train.evaluate import answer_rows, asked_text

    head("generate", "the merged folder answers prompts that were in no training row")
    rows = open_rows(TASK, "test")[:2]
    said = {}
    for name, path in (("base", "embedded"), ("merged", str(folder / "merged"))):
        opened = open_model(path, device="cpu")
        said[name] = answer_rows(opened.model, opened.tokenizer, rows, max_new_tokens=16)
    for i, row in enumerate(rows):
        print(textwrap.fill(asked_text(row), 79, initial_indent=" ", subsequent_indent=" "))
        for name, text in (("expected", row.answer), *((n, said[n][i]) for n in said)):
            print(textwrap.fill(f"   {name:<9} {text}", 79, subsequent_indent=" " * 13))


def head(name: str, text: str) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{name:<9}{plain} {text}\n", flush=True)


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = self.printed = time.perf_counter()
        self.terminal = sys.stdout.isatty()

    def show(self, last: bool = False) -> None:
        now = time.perf_counter()
        if not self.terminal and not last and now - self.printed < 10:
            return
        self.printed = now
        parts = [f"{RUNS[name][0]} {self._where(name)}" for name in RUNS]
        line = f" {now - self.started:3.0f} s  " + "   ".join(f"{part:<31}" for part in parts)
        print(
            f"\r{line[:79]}" if self.terminal else line.rstrip(),
            end="" if self.terminal and not last else "\n",
            flush=True,
        )

    def _where(self, name: str) -> str:
        """The last step that the training's own output names."""
        try:
            lines = (self.folder / f"{name}.txt").read_text().splitlines()
        except OSError:
            return "starting"
        steps = [line for line in lines if line.startswith("step") and "lr" in line]
        return steps[-1].partition("  lr")[0].replace("  ", " ") if steps else "starting"


def _start(folder: Path, name: str) -> subprocess.Popen:
    with (folder / f"{name}.txt").open("w") as file:
        return subprocess.Popen(
            _command("train", folder / f"{name}.yaml"),
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def _check(folder: Path, name: str, status: int) -> None:
    if status:
        tail = (folder / f"{name}.txt").read_text().strip().splitlines()[-12:]
        raise QuickstartError(
            f"training {RUNS[name][0]} ended with status {status}:\n" + "\n".join(tail)
        )


def _command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "lowrank.cli", *map(str, words)]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
