"""LoRA beside full fine-tuning: the records of two runs as one table and one report."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from lowrank import LoraConfig, plan
from lowrank.cli.opening import empty_model, model_path
from lowrank.cli.record import curves, module_rows
from lowrank.report.data import Fact, Metric, RunReport, Sample, Setting
from lowrank.report.html import write_report
from lowrank.report.words import amount
from lowrank.train.evaluate import spread

Record = dict[str, Any]  # what run.json holds

# what a training costs: words of its record
COSTS = {
    "trainable parameters": lambda r: f"{r['training']['trainable_params']:,}",
    "file": lambda r: amount(r["file_bytes"], "B"),
    "training time": lambda r: f"{r['training']['train_seconds']:.1f} s",
    "memory that training added": lambda r: amount(_added_bytes(r), "B"),
    "peak memory of the process": lambda r: amount(r["training"]["peak_bytes"], "B"),
}


def table(records: dict[str, Record]) -> Table:
    """What each training got, kept and cost."""
    lora, full = records["lora"], records["full"]
    found = Table(box=None, padding=(0, 1), header_style="dim")
    found.add_column("")
    for name in ("base", "LoRA", "full fine-tuning"):
        found.add_column(name, justify="right", no_wrap=True)
    for metric in metrics(lora, full):
        values = (metric.before, metric.after, metric.full)
        found.add_row(metric.name, *(_number(value, metric.format) for value in values))
    for name, words in COSTS.items():
        found.add_row(name, "", words(lora), words(full))
    return found


def metrics(lora: Record, full: Record) -> list[Metric]:
    rows = f"greedy answers to {lora['after']['answered']} test rows"
    skill = "loss on text like that of its pretraining; the rise is what was forgotten"

    def of(name: str, field: str, **more: Any) -> Metric:
        values = lora["before"][field], lora["after"][field], full["after"][field]
        return Metric(name, *values, **more)

    return [
        of("exact match", "exact_match", format=".1%", note=rows),
        of("loss on the test rows", "loss", higher_is_better=False),
        Metric(
            "base's own skill (loss)",
            lora["skill_before"],
            lora["skill_after"],
            full["skill_after"],
            higher_is_better=False,
            note=skill,
        ),
    ]


def report(folder: Path, records: dict[str, Record], verification: Any) -> Path:
    """One page on both runs; returns its path."""
    lora, full = records["lora"], records["full"]
    training = lora["training"]
    page = RunReport(
        title="Quickstart: LoRA on the embedded model",
        summary=f"{training['steps']} steps over {lora['data']['train']['rows']} rows, for the "
        "adapter and for every weight; the merged adapter verified.",
        created=lora["created"],
        command="lowrank quickstart",
        metrics=metrics(lora, full),
        losses=[
            *curves(_history(folder / "lora"), "LoRA, "),
            *curves(_history(folder / "full"), "full fine-tuning, "),
        ],
        samples=_samples(lora, full),
        modules=module_rows(_targets(lora)),
        trainable_params=training["trainable_params"],
        total_params=training["total_params"],
        costs=[
            Fact(name, f"LoRA {words(lora)}, full {words(full)}") for name, words in COSTS.items()
        ],
        settings=[Setting(s["name"], s["value"], s["source"]) for s in lora["settings"]],
        versions=lora["versions"],
        verification=verification,
    )
    return write_report(folder / "report.html", page)


def _targets(record: Record) -> list[Any]:
    settings = {s["name"]: s["value"] for s in record["settings"]}
    lora = {n.removeprefix("lora."): v for n, v in settings.items() if n.startswith("lora.")}
    return plan(empty_model(model_path(settings["model.path"])), LoraConfig(**lora))


def _samples(lora: Record, full: Record, most: int = 8) -> list[Sample]:
    sides = (lora["before"]["answers"], lora["after"]["answers"], full["after"]["answers"])
    return [
        Sample(
            base["prompt"],
            base["expected"],
            base["answer"],
            adapted["answer"],
            trained["answer"],
            base["exact"],
            adapted["exact"],
        )
        for base, adapted, trained in spread(zip(*sides, strict=True), most)
    ]


def _history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _added_bytes(record: Record) -> int:
    training = record["training"]
    return max(training["peak_bytes"] - training["start_bytes"], 0)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
