"""Train an adapter (or, with --method full, every weight) on rows of data.

Settings come from defaults, then CONFIG.yaml with the sections model, lora, data, train, eval and
output, then flags. `lowrank preview` shows what of the rows would be learnt. The folder gets the
adapter, checkpoints, log.jsonl, run.json and reports/report.html.

  lowrank train run.yaml --lr 1e-4
  lowrank train --model embedded --data embedded:intents --eval embedded:intents
"""

import argparse
import time
from pathlib import Path

from lowrank.cli.quantising import wanted
from lowrank.cli.settings import ELSEWHERE as ELSEWHERE
from lowrank.cli.settings import RunSettings, SettingsError, add_flags, resolve
from lowrank.train.run import processes
from lowrank.train.run.optimizers import transformers_name
from lowrank.train.run.trackers import trackers

REQUIRED = ("model.path", "data.train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lowrank train [CONFIG.yaml] [--SETTING X …]"
    parser.add_argument("config", nargs="?", type=Path, help="YAML file", metavar="CONFIG.yaml")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(args).items() if name != "config"}
    if args.config and args.config.suffix not in (".yaml", ".yml", ""):
        raise SettingsError(f"{args.config} is data, not settings: give it as --data {args.config}")
    settings = resolve(args.config, flags, REQUIRED)
    transformers_name(settings.train.optimizer)  # what is missing is said before anything is read
    trackers(settings.train.report_to)
    wanted(settings)
    processes.sharing(settings.train)
    processes.begin(settings.model.device)
    folder = output_folder(settings, args.config)
    checkpoint = resume_from(settings, folder)
    processes.wait()  # until all have seen the folder as it was

    from lowrank import compat
    from lowrank.cli import publish, record, training
    from lowrank.report.text import show, summary

    publish.check(settings)
    started = time.perf_counter()
    show(record.settings_table(settings, folder))
    data = training.open_data(settings)
    show(record.data_lines(data, settings))
    with compat.standing_in():
        from lowrank.train.run.stopping import Stopped

        try:
            result = training.train(settings, data, folder, checkpoint)
        except Stopped as stopped:
            again = "" if args.config else " with the same settings"
            command = f"lowrank train {args.config or ''}".strip()
            print(f"\n {stopped}\n Go on{again}: {command} --resume")
            return stopped.status
    if not processes.first():
        processes.end()
        return 0
    report = record.write(settings, folder, data, result, time.perf_counter() - started)
    publish.write_card(settings, folder, report)
    show(summary(report))
    print(f"\n {folder / record.REPORT} shows more.")
    processes.end()  # the others need not wait for an upload
    return publish.push(settings, folder)


def output_folder(settings: RunSettings, config: Path | None) -> Path:
    """The folder to write; refuses one that holds something, unless told to replace or go on."""
    name = settings.output.dir or f"runs/{config.stem if config else settings.train.method}"
    folder = Path(name)
    if folder.is_file():
        raise SettingsError(f"output.dir {folder} is a file")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not settings.output.overwrite and not settings.output.resume:
        raise SettingsError(
            f"{folder} is not empty.\nChoose another with --output, go on with --resume, or replace "
            "the run in it with --overwrite."
        )
    return folder


def resume_from(settings: RunSettings, folder: Path) -> Path | None:
    resume = settings.output.resume
    if resume is False:
        return None
    from lowrank.train.run import checkpoints

    if resume == "auto" and not checkpoints.any_whole(folder):
        return None
    newest = resume in (True, "auto")
    found = checkpoints.newest_checkpoint(folder) if newest else checkpoints.whole(str(resume))
    checkpoints.check_same_run(found, checkpoints.of_settings(settings.train))
    return found
