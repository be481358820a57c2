"""Rows as the model will read them, with what is learnt in colour; no weight is read.

WHAT is data (a file, a folder, a name on the hub, embedded:NAME) or a run's CONFIG.yaml. Printed: the
shape that the columns tell, the share of tokens that the loss looks at, how many rows are cut or
dropped, and some of the rows. Of the model only config and tokenizer are read.

  lowrank preview embedded:intents --model embedded
  lowrank preview run.yaml --loss_on assistant --rows 1 --skip 40
"""

import argparse
import json
from pathlib import Path
from typing import Any

from lowrank.cli.arguments import whole
from lowrank.cli.settings import add_flags, resolve

OWN = ("what", "rows", "skip", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lowrank preview WHAT --model MODEL [--rows N] [--SETTING X …]"
    parser.add_argument("what", metavar="WHAT", help="data, or CONFIG.yaml")
    parser.add_argument("--rows", type=whole(1), default=3, metavar="N", help="rows shown (3)")
    parser.add_argument("--skip", type=whole(0), default=0, metavar="N", help="rows before (0)")
    parser.add_argument("--json", action="store_true", help="the rows shown as JSON")
    add_flags(parser, ("model", "data", "train"))


def run(args: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(args).items() if name not in OWN}
    config = Path(args.what) if args.what.endswith((".yaml", ".yml")) else None
    if config is None:
        flags["data.train"] = [args.what]
    settings = resolve(config, flags, ("model.path", "data.train"))

    from lowrank.cli.opening import context_length, model_path, open_read, open_tokenizer
    from lowrank.cli.record import found_words
    from lowrank.model_folder import load_config
    from lowrank.report.rows import LEGEND, row_view
    from lowrank.report.text import fact_table, show
    from lowrank.train.data.rows import as_rows, rows_of
    from lowrank.train.data.shapes import Row
    from lowrank.train.tasks.table import TASKS

    data, path = settings.data, model_path(settings.model.path or "")
    tokenizer = open_tokenizer(path, settings.model.revision)
    length = context_length(load_config(path, settings.model.revision), data.max_length)
    task = TASKS[settings.train.task]
    found = open_read(data.train or [], "train", takes=task.takes, **data.reading)
    if task.takes is Row:  # of any other shape, what could be fine-tuned on
        named = [pair for row in found.rows[: data.limit] for pair in as_rows(row)]
    else:
        named = [("", row) for row in rows_of(task, found)[: data.limit]]
    encoded = task.prepare([row for _, row in named], tokenizer, settings, max_length=length)
    names = {id(row): name for name, row in named}
    shown: list[dict[str, Any]] = []
    in_tokens = getattr(encoded, "learnt", None) is None  # or it is a label beside them
    for i in range(len(encoded.rows))[args.skip : args.skip + args.rows]:
        row, example = encoded.rows[i], encoded.examples[i]
        for name, parts in encoded.parts(i, tokenizer):
            title = f"{row.where}{names.get(id(row), '')}{name}"
            if in_tokens and "labels" in example:
                learnt = sum(label >= 0 for label in example["labels"][1:])
                title = f"{learnt} of {len(example['input_ids'])} tokens learnt, {title}"
            shown.append({"row": title, "parts": parts})
    if args.json:
        out = {"shapes": found.shapes, "skipped": found.skipped, "unread": found.unread}
        print(json.dumps({**out, "rows": shown}, indent=2, ensure_ascii=False))
        return 0
    template = "the chat template" if tokenizer.chat_template and data.chat_template else "none"
    facts = [
        ("shape", found_words(found)),
        ("rows", encoded.summary),
        ("cut at", f"{length} tokens"),
        ("template", template),
        ("learnt", data.loss_on),
    ]
    show(fact_table(facts[: 5 if in_tokens else 3]))
    show("")
    for row_shown in shown:
        show(row_view(row_shown["row"], row_shown["parts"]))
    show(LEGEND)
    return 0
