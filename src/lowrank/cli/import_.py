"""Translate a configuration of Axolotl, LLaMA-Factory, TRL or mlx-lm into a file for `lowrank train`.

CONFIG is YAML or JSON; which program's it is, is told from its keys. Printed (or written with --output): the
settings, each with the key and line that it comes from. Every other key is listed with the reason. Where a key
that changes what is learnt has no counterpart, the status is 0 and the list says so; --strict makes it 1.

  lowrank import axolotl.yml --output run.yaml
  lowrank import sft.yaml --from trl --task dpo --strict
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lowrank.cli.settings import SettingsError, known_settings, resolve
from lowrank.cli.values import Wrong, check_value
from lowrank.errors import LowrankError
from lowrank.importing.config import Unmapped
from lowrank.train.settings import OF_TASKS
from lowrank.train.tasks.table import TASKS

FROM = ("axolotl", "llama-factory", "trl", "mlx-lm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML or JSON file")
    parser.add_argument("--from", dest="program", choices=FROM, help="whose it is, if not as told")
    parser.add_argument("--model", metavar="X", help="another base in place of the file's")
    parser.add_argument("--task", metavar="X", help="what a file of TRL's is for: sft, dpo, …")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the settings to FILE")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument(
        "--strict", action="store_true", help="status 1 if a key that matters was not translated"
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON")


def run(args: argparse.Namespace) -> int:
    from lowrank.files import write_text
    from lowrank.importing import translate
    from lowrank.importing.written import as_yaml, missed_lines, shown

    if args.output and args.output.exists() and not args.overwrite:
        raise SettingsError(f"{args.output} exists. Choose another --output, or --overwrite it.")
    config = translate(args.config, args.program, args.model, args.task)
    mapped = _accepted(config)
    text = as_yaml(config, mapped, config.missed)
    _check(text)
    matter = [row for row in config.missed if row.matters]
    if args.output:
        write_text(args.output, text)
    if args.json:
        settings = {m.name: {"value": m.value, "source": m.source} for m in mapped}
        missed = [{**row._asdict(), "value": shown(row)} for row in config.missed]
        found = {"from": config.program, "settings": settings, "not_translated": missed}
        print(json.dumps({**found, "notes": config.remarks}, indent=2, ensure_ascii=False))
    elif args.output:
        print(f" {args.output}: {len(mapped)} settings out of {config.program}'s {args.config}")
        for note in config.remarks:
            print(f" note: {note}")
        print("\n".join(f" {line}" for line in missed_lines(config.missed)))
    else:
        print(text, end="")
    if matter:
        count = f"{len(matter)} key{'s' * (len(matter) > 1)}"
        print(
            f"lowrank import: {count} that may change the result: "
            f"{', '.join(row.key for row in matter)}; not translated",
            file=sys.stderr,
        )
    return 1 if matter and args.strict else 0


def _accepted(config: Any) -> list[Any]:
    """What our settings take; the rest joins what was not translated."""
    kept = []
    task = config.mapped["train.task"].value if "train.task" in config.mapped else "sft"
    for entry in config.mapped.values():
        key = entry.source.split(",")[0]
        try:
            kept.append(entry._replace(value=_checked(entry.name, entry.value, task)))
        except Unmapped as unmapped:
            if key in config.written:
                config.miss((key,), config.written[key], str(unmapped), unmapped.matters)
    full = any(m.name == "train.method" and m.value == "full" for m in kept)
    return [m for m in kept if not (full and m.name.startswith("lora.") and "not set" in m.source)]


def _checked(name: str, value: Any, task: str) -> Any:
    """The value as the setting has it. Raises Unmapped where there is no such setting, or not with this task."""
    known = known_settings()
    if name not in known:
        raise Unmapped(f"lowrank has no setting {name}")
    tasks = OF_TASKS.get(name.removeprefix("train."), (task,))
    if task not in tasks or (task in TASKS and name in TASKS[task].unused):
        raise Unmapped(f"{name} has no meaning where {task} is trained", matters=False)
    try:
        return check_value(value, known[name].type)
    except Wrong as wrong:
        raise Unmapped(f"{name} {wrong}") from None


def _check(text: str) -> None:
    """What is printed is what `train` reads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "translated.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            resolve(path, {}, ())
        except LowrankError as error:
            raise SettingsError(f"the settings do not go together here:\n{error}") from None
