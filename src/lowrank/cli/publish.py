"""What a run gives to others: its card, and its files on the hub."""

import sys
from pathlib import Path
from typing import Any

from lowrank.cli.settings import LORA_SHOWN, RunSettings
from lowrank.push import PUSHED, HubError, check_push, push_folder
from lowrank.report.card import About, write_run_card
from lowrank.report.data import RunReport

# beside those that were set: what a reader of a card looks for
SHOWN = ("epochs", "learning_rate", "batch_size", "gradient_accumulation_steps", "seed", "task")
# names of files and folders, which may be private
PRIVATE = ("model.path", "output.", "data.train", "data.eval", "data.base_skill", "eval.")


def check(settings: RunSettings) -> None:
    """That output.push can be written to, before anything is trained. Raises HubError."""
    if settings.output.push is not None:
        check_push(settings.output.push)


def write_card(settings: RunSettings, folder: Path, report: RunReport) -> None:
    """README.md and loss.png, unless a person wrote one."""
    pushed = (settings.output.push or "").rpartition("/")[2]
    about = About(
        name=pushed or folder.resolve().name,
        base=settings.model.path or "",
        data=_names(settings.data.train),
        evaluated_on=_names(settings.data.eval),
        task_type=settings.lora["task_type"],
        task=settings.train.task,
        adapter=settings.train.method == "lora",
        settings=_shown(settings),
    )
    if not write_run_card(folder, report, about):
        print(f" {folder / 'README.md'} was written or changed by somebody, and stays as it is.")


def push(settings: RunSettings, folder: Path) -> int:
    """Uploads what the run wrote, if it is told to; 1 where that fails, which takes nothing from the folder."""
    repo_id = settings.output.push
    if repo_id is None:
        return 0
    try:
        info = push_folder(folder, repo_id, private=settings.output.private, files=PUSHED)
    except HubError as error:
        public = "" if settings.output.private else " --public"
        print(
            f"lowrank train: the result is whole in {folder}, and was not pushed: {error}\n"
            f"To push it later: lowrank push {folder} {repo_id}{public}",
            file=sys.stderr,
        )
        return 1
    print(f" {info.repo_url}")
    return 0


def _shown(settings: RunSettings) -> dict[str, Any]:
    found = {}
    for name, value, origin in settings.listing():
        section, leaf = name.split(".", 1)
        if name.startswith(PRIVATE) or (section == "lora" and settings.train.method == "full"):
            continue
        common = leaf in (LORA_SHOWN if section == "lora" else SHOWN)
        if origin != "default" or (common and value is not False):
            found[name] = value
    return found


def _names(names: list[str] | str | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
