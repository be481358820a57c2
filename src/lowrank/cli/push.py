"""Upload the result of a run, or any adapter's folder, to the Hugging Face hub.

DIR is what `lowrank train` wrote: the adapter (or model), its tokenizer, the card (README.md) and the loss curves
are uploaded; run.json, log.jsonl, checkpoints and reports, which name files and show rows, are not. A new
repository is private, unless --public. The token is what `hf auth login` saved, or HF_TOKEN.

  lowrank push runs/intents owner/intents-lora
"""

import argparse
from pathlib import Path

from lowrank.cli.settings import SettingsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="what a run wrote")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the repository; made if need be")
    parser.add_argument("--public", action="store_true", help="a new repository is public")
    parser.add_argument("--message", default="Upload with lowrank", help="of the commit")


def run(args: argparse.Namespace) -> int:
    from lowrank.card import write_card
    from lowrank.config import CONFIG_NAME, LoraConfig
    from lowrank.push import PUSHED, check_push, push_folder

    config = args.folder / CONFIG_NAME
    if not config.is_file() and not any(args.folder.glob("*.safetensors")):
        raise SettingsError(f"{args.folder} holds no adapter and no model")
    repo_id = check_push(args.repo_id)
    if config.is_file():
        write_card(args.folder, LoraConfig.from_pretrained(args.folder))
    info = push_folder(
        args.folder,
        repo_id,
        private=not args.public,
        commit_message=args.message,
        files=PUSHED,
    )
    print(f" {info.repo_url}")
    return 0
