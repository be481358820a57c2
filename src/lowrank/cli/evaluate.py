"""Loss, answers and the task's metrics of a base, a base with an adapter, or a merged folder.

MODEL is a model folder, a name on the Hub, `embedded`, or an adapter's folder (its base is then
the one that the adapter names). DATA is what `train` takes as data.eval: its test part is used.

  lowrank evaluate embedded --data embedded:intents
  lowrank evaluate embedded --adapter runs/intents --data embedded:intents --json
"""

import argparse
import json
from typing import Any, NamedTuple

from lowrank.cli.arguments import whole
from lowrank.cli.quantising import add_quantize, of_flags
from lowrank.cli.settings import (
    EVALUATING,
    READING,
    SettingsError,
    add_flags_of,
    given_flags,
    meaningless,
)
from lowrank.errors import listed
from lowrank.train.settings import OF_TASKS, DataSettings, EvalSettings, Sections, TrainSettings
from lowrank.train.tasks.table import TASKS

DEFAULT = EvalSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--adapter", metavar="DIR", help="the adapter's folder")
    parser.add_argument("--data", nargs="+", required=True, help="file(s), or embedded:NAME")
    parser.add_argument("--task", choices=TASKS, help="as trained, or as the model's class tells")
    add_flags_of(parser, (*READING, *EVALUATING))
    add_numbers(parser)
    parser.add_argument(
        "--samples", type=whole(0), default=DEFAULT.samples, metavar="N", help="answers shown"
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON, all answers too")


def add_numbers(parser: argparse.ArgumentParser) -> None:
    for name, default, least, text in (
        ("generate", DEFAULT.generate, 0, "rows that are answered, at even distances; 0: none"),
        ("max-new-tokens", DEFAULT.max_new_tokens, 1, "tokens an answer may have"),
        ("batch-size", DEFAULT.batch_size, 1, "rows at once"),
        ("max-length", None, 1, "tokens a row may have; as trained"),
    ):
        underscored = name.replace("-", "_")
        spellings = dict.fromkeys((f"--{name}", f"--{underscored}"))
        parser.add_argument(
            *spellings, type=whole(least), default=default, metavar="N", help=f"{text} ({default})"
        )
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_quantize(parser)
    parser.add_argument("--no-chat-template", action="store_true", help="prompts as they stand")


def run(args: argparse.Namespace) -> int:
    from lowrank.cli.opening import context_length, open_model, open_read, task_for
    from lowrank.report.data import to_json
    from lowrank.train.data.rows import rows_of

    settings = settings_of(args)
    task = TASKS[args.task] if args.task else task_for(args.model, args.adapter)
    if problems := meaningless((n for n in EVALUATING if hasattr(args, n)), task):
        raise SettingsError(listed(problems))
    found = open_read(args.data, "test", takes=task.takes, **settings.data.reading)
    rows = rows_of(task, found)
    opened = open_model(
        args.model,
        args.adapter,
        dtype=args.dtype,
        device=args.device,
        quantisation=of_flags(args),
        task_type=task.task_type,
    )
    length = context_length(opened.model.config, settings.data.max_length)
    config = opened.model.config
    like = {name: getattr(config, name, None) for name in ("id2label", "problem_type")}
    data = task.prepare(rows, opened.tokenizer, settings, max_length=length, like=like)
    result = task.evaluate(opened.model, opened.tokenizer, data, settings)
    if args.json:
        what: dict[str, Any] = {"model": opened.path, "adapter": opened.adapter, "task": task.name}
        what["data"] = args.data
        what["quantisation"] = opened.quantisation and opened.quantisation.to_json()
        print(json.dumps({**what, **to_json(result.record)}, indent=2, ensure_ascii=False))
    else:
        _print(opened, data, result, args.samples)
    return 0


def settings_of(args: argparse.Namespace) -> Sections:
    """What a task is told: the flags, and where these are silent what the adapter's run was told of the same."""
    run = run_of(args.model, args.adapter)
    data, numbers = (
        given_flags(args, tuple(n for n in (*READING, *EVALUATING) if n.startswith(section)))
        for section in ("data.", "eval.")
    )
    data["chat_template"] = not args.no_chat_template
    if args.max_length is not None:
        data["max_length"] = args.max_length
    data = {n: run[f"data.{n}"] for n in AS_TRAINED if f"data.{n}" in run} | data
    numbers |= {n: getattr(args, n) for n in ("batch_size", "generate", "max_new_tokens")}
    names = ("seed", *OF_TASKS)
    train = TrainSettings(**{n: run[f"train.{n}"] for n in names if f"train.{n}" in run})
    return Given(DataSettings(**data), train, EvalSettings(**numbers))


# how rows are cut, and what their labels are
AS_TRAINED = ("max_length", "max_target_length", "doc_stride", "problem_type")


def run_of(name: str, adapter: str | None) -> dict[str, Any]:
    """The settings that the adapter was trained with; empty without one."""
    from lowrank.adapter_file import read_adapter
    from lowrank.cli.opening import base_and_adapter

    adapter = base_and_adapter(name, adapter)[1]
    return {} if adapter is None else read_adapter(adapter).metadata.get("run", {})


class Given(NamedTuple):
    data: DataSettings
    train: TrainSettings
    eval: EvalSettings


def _print(opened, data, result, samples: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from lowrank.report.text import fact_table, show
    from lowrank.train.evaluate import spread
    from lowrank.train.metrics import METRICS

    name = opened.path if opened.adapter is None else f"{opened.path} + {opened.adapter}"
    show(Text(f" {name}", "bold"))
    facts = [
        *([("base", f"in {opened.quantisation}")] if opened.quantisation else []),
        ("data", data.summary),
    ]
    for metric, value in result.scores.items():
        kind = METRICS[metric]
        facts.append((kind.title, f"{value:{kind.format}} ({result.over(metric)})"))
    show(fact_table(facts))
    marks = {True: Text("✓", "green"), False: Text("✗", "red"), None: Text(" ")}
    for answer in spread(result.answers, samples):
        mark = marks[answer.exact]
        table = Table.grid(padding=(0, 1))
        table.add_column(width=10, style="dim")
        table.add_column(overflow="fold")
        table.add_row("", "")
        table.add_row(" asked", Text(answer.prompt.strip()))
        table.add_row(" expected", Text(answer.expected))
        table.add_row(Text(" ").append_text(mark).append(" answer"), Text(answer.answer))
        if answer.sampled is not None:
            table.add_row(" sampled", Text(answer.sampled))
        show(table)
