"""What a run leaves behind: its settings on the screen, run.json, the report."""

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lowrank.cli.settings import LORA_SHOWN, RunSettings
from lowrank.cli.training import Data, Result
from lowrank.report.data import Curve, Fact, Metric, ModuleRow, RunReport, Sample, Setting, to_json
from lowrank.report.html import write_report
from lowrank.report.rows import LEGEND, row_view
from lowrank.report.words import amount
from lowrank.train.data.packing import pack
from lowrank.train.data.rows import ReadData
from lowrank.train.data.task_shapes import shapes_for
from lowrank.train.evaluate import spread
from lowrank.train.metrics import METRICS
from lowrank.train.run.best import Best
from lowrank.train.settings import OF_TASKS
from lowrank.train.tasks.table import TASKS

REPORT = Path("reports/report.html")
PACKAGES = ("lowrank", "torch", "transformers", "accelerate", "tokenizers", "safetensors")


def settings_table(settings: RunSettings, folder: Path) -> RenderableType:
    """Every setting with its origin; of LoRA's many fields the common ones and those that were set."""
    given = Table(box=None, show_header=False, padding=(0, 1))
    given.add_column(no_wrap=True)
    given.add_column(overflow="fold")
    given.add_column(style="dim", no_wrap=True)
    defaults = []
    for name, value, origin in settings.listing():
        section, leaf = name.split(".", 1)
        if section == "lora" and settings.train.method == "full":
            continue
        if section == "train" and settings.train.task not in OF_TASKS.get(leaf, TASKS):
            continue
        if name == "output.dir":
            value = str(folder)
        if origin != "default":
            given.add_row(name, Text(_value(value), "bold"), origin)
        elif section != "lora" or leaf in LORA_SHOWN:
            # no break within one setting, so that a name stays beside its value
            defaults.append(f"{name}={_value(value)}".replace(" ", "\N{NO-BREAK SPACE}"))
    rest = Padding(Text("defaults: " + " ".join(defaults), "dim"), (1, 1, 0, 1))
    return Group(given, rest)


def data_lines(data: Data, settings: RunSettings) -> RenderableType:
    """How the rows were read, what of them is learnt, and one of them."""
    templated = data.tokenizer.chat_template and settings.data.chat_template
    template = "through the chat template" if templated else "as plain text"
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, rows in (("train", data.train), ("eval", data.eval), ("skill", data.skill)):
        if rows is not None:
            table.add_row(name, rows.summary)
    if settings.train.packing:
        count = len(pack(data.train.examples, data.train.max_length))
        full = data.train.tokens / (count * data.train.max_length)
        table.add_row("packed", f"into {count} rows, {full:.0%} full")
    table.add_row("shape", found_words(data.found))
    limit = f" up to {data.train.max_length} tokens a row"
    if "data.chat_template" not in TASKS[settings.train.task].unused:
        limit += f", prompts {template}"
    where = data.train.rows[0].where
    examples = [
        row_view(f"{where}{name}", parts, limit=500)
        for name, parts in data.train.parts(0, data.tokenizer)
    ]
    return Group("", table, limit, "", *examples, LEGEND, "")


def found_words(found: ReadData) -> str:
    """What the rows turned out to be, and what was left out of them."""
    known = shapes_for(found.takes)
    shapes = ", ".join(
        f"{name} ({', '.join(known[name].needs)})" + (f": {rows} rows" * (len(found.shapes) > 1))
        for name, rows in found.shapes.items()
    )
    unread = f"; not read: {', '.join(found.unread)}" if found.unread else ""
    skipped = f"\nskipped {found.problems}" if found.skipped else ""
    return shapes + unread + skipped


def write(
    settings: RunSettings, folder: Path, data: Data, result: Result, seconds: float
) -> RunReport:
    """run.json and the report; returns what the report holds."""
    report = run_report(settings, folder, data, result, seconds)
    training = to_json(result.training)
    del training["history"]  # it is in log.jsonl
    record = {
        "settings": report.settings,
        "versions": report.versions,
        "command": report.command,
        "created": report.created,
        "seed": settings.train.seed,
        "device": device_words(),
        "threads": torch.get_num_threads(),
        "data": {
            name: _counts(rows)
            for name, rows in (("train", data.train), ("eval", data.eval), ("skill", data.skill))
            if rows is not None
        },
        "seconds": seconds,
        "training": training,
        "before": result.before and result.before.record,
        "after": result.after and result.after.record,
        "skill_before": result.skill_before,
        "skill_after": result.skill_after,
        "file_bytes": weights_bytes(folder),
        "base_bytes": result.base_bytes,
        "quantisation": None if result.quantisation is None else result.quantisation.to_json(),
    }
    text = json.dumps(to_json(record), indent=2, ensure_ascii=False) + "\n"
    (folder / "run.json").write_text(text, encoding="utf-8")
    write_report(folder / REPORT, report)
    return report


def run_report(
    settings: RunSettings, folder: Path, data: Data, result: Result, seconds: float
) -> RunReport:
    training = result.training
    lora = settings.train.method == "lora"
    return RunReport(
        title=f"{'LoRA' if lora else 'Full fine-tuning'} of {_names(settings.model.path)} "
        f"on {_names(settings.data.train)}",
        summary=f"{training.steps} steps over {len(data.train.rows)} rows "
        f"({training.epochs:.3g} epochs), seed {settings.train.seed}.{_kept(training.best)}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(["lowrank", *sys.argv[1:]]),
        metrics=list(_metrics(result, lora)),
        losses=curves(training.history),
        rewards=curves(training.history, names=REWARD_CURVES),
        losses_in="nats per token" if TASKS[settings.train.task].says else "",
        samples=_samples(result, settings.eval.samples),
        modules=[*module_rows(result.targets), *result.heads],
        trainable_params=training.trainable_params,
        total_params=training.total_params,
        costs=[
            Fact("training", f"{training.train_seconds:.1f} s", _pace(result)),
            *([Fact("saved", f"step {training.best.step}", "the best")] if training.best else []),
            Fact("whole run", f"{seconds:.1f} s", "with loading, evaluations and saving"),
            Fact("peak memory", amount(training.peak_bytes, "B"), memory_words(training)),
            Fact("the base's weights", amount(result.base_bytes, "B"), _held(result)),
            Fact("adapter file" if lora else "weights", amount(weights_bytes(folder), "B")),
        ],
        settings=[Setting(*entry) for entry in settings.listing()],
        versions=versions(),
    )


def _kept(best: Best | None) -> str:
    """Which state was kept, where it need not be the last."""
    if best is None:
        return ""
    kind = METRICS[best.metric]
    return f" Saved is step {best.step}, the best by {kind.title} ({best.value:{kind.format}})."


# what is logged, and its name beside the others
LOSS_CURVES = {"loss": "train", "eval_loss": "eval"}
REWARD_CURVES = {
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
    **dict.fromkeys(("rewards/margins", "margin"), "margin"),
    **dict.fromkeys(("eval_rewards/margins", "eval_margin"), "margin, eval"),
    "reward": "mean",
    "eval_reward": "mean, eval",
}


def curves(
    history: list[dict[str, float]], prefix: str = "", names: Mapping[str, str] = LOSS_CURVES
) -> list[Curve]:
    """The curves in a log that `names` knows."""
    found = []
    for key, name in names.items():
        lines = [line for line in history if key in line]
        if lines:
            steps = [int(line["step"]) for line in lines]
            found.append(Curve(prefix + name, steps, [line[key] for line in lines]))
    return found


def module_rows(targets: list[Any]) -> list[ModuleRow]:
    """Targets of one name, kind, shape and rank together, in the model's order."""
    grouped: dict[tuple[str, str, str, int], list[Any]] = {}
    for t in targets:
        key = (t.path.rpartition(".")[2], t.kind.name, f"{t.out} × {t.in_}", t.r)
        grouped.setdefault(key, []).append(t)
    return [
        ModuleRow(name, kind, shape, r, len(group), sum(t.params for t in group))
        for (name, kind, shape, r), group in grouped.items()
    ]


def memory_words(training: Any) -> str:
    added = max(training.peak_bytes - training.start_bytes, 0)
    return f"of the {training.peak_of}; training added {amount(added, 'B')}"


def weights_bytes(folder: Path) -> int:
    """Bytes of the safetensors files at the folder's root: the adapter, or the model."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_words() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def _metrics(result: Result, lora: bool) -> Iterator[Metric]:
    def metric(name: str, before: float | None, after: float | None, **more: Any) -> Metric:
        adapted, full = (after, None) if lora else (None, after)
        return Metric(name, before=before, after=adapted, full=full, **more)

    before, after = result.before, result.after
    if before and after:
        for name, value in after.scores.items():
            kind = METRICS[name]
            yield metric(
                kind.title,
                before.scores.get(name),
                value,
                format=kind.format,
                higher_is_better=kind.higher_is_better,
                note=after.over(name),
            )
    if result.skill_before is not None:
        yield metric(
            "base's own skill (loss)",
            result.skill_before,
            result.skill_after,
            higher_is_better=False,
            note="on data.base_skill: how much was forgotten",
        )


def _samples(result: Result, count: int) -> list[Sample]:
    if not result.before or not result.after:
        return []
    pairs = zip(result.before.answers, result.after.answers, strict=True)
    return [
        Sample(b.prompt, b.expected, b.answer, a.answer, None, b.exact, a.exact)
        for b, a in spread(pairs, count)
    ]


def _held(result: Result) -> str:
    return "as loaded" if result.quantisation is None else f"in {result.quantisation}"


def _pace(result: Result) -> str:
    t = result.training
    return (
        f"{t.steps} steps, {t.tokens_per_second:,.0f} tokens/s, {torch.get_num_threads()} threads"
    )


def _counts(rows: Any) -> dict[str, int]:
    names = ("tokens", "supervised", "longest", "truncated", "dropped", "max_length")
    return {"rows": len(rows.rows), **{name: getattr(rows, name) for name in names}}


def _names(paths: list[str] | str | None) -> str:
    """Files by their last two parts: train.jsonl alone says little."""
    names = [paths] if isinstance(paths, str) else paths or []
    return ", ".join("/".join(Path(name).parts[-2:]) for name in names)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
