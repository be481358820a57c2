"""What an adapter would be, without loading a weight: targets, parameters, bytes.

WHAT is a model folder, a name on the Hub, `embedded`, or a run's CONFIG.yaml. The model is built
from its config alone, on the meta device. Everything that does not fit is listed at once.

  lowrank plan embedded --lora.r 8 --target_modules q_proj v_proj
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from lowrank.cli.quantising import wanted
from lowrank.cli.settings import ELSEWHERE as ELSEWHERE
from lowrank.cli.settings import add_flags, resolve
from lowrank.train.tasks.table import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lowrank plan WHAT [--json] [--all] [--lora.FIELD X …]"
    parser.add_argument("what", metavar="WHAT", help="a model, or CONFIG.yaml")
    parser.add_argument("--json", action="store_true", help="every target as JSON")
    parser.add_argument("--all", action="store_true", help="every target, not grouped by name")
    parser.add_argument("--task", dest="train.task", default=argparse.SUPPRESS, metavar="X")
    add_flags(parser, ("model", "lora"))


def run(args: argparse.Namespace) -> int:
    own = ("what", "json", "all")
    flags = {name: value for name, value in vars(args).items() if name not in own}
    config = Path(args.what) if args.what.endswith((".yaml", ".yml")) else None
    if config is None:
        flags["model.path"] = args.what
    settings = resolve(config, flags, required=("model.path",))

    from lowrank import LoraConfig, plan, quantise_model
    from lowrank.cli.opening import empty_model, loaded_dtype, model_path
    from lowrank.layer_replication import replicate
    from lowrank.model_size import held_bytes
    from lowrank.report.words import amount
    from lowrank.targets import saved_modules, trained_rows

    lora = LoraConfig(**settings.lora)
    path, quantisation = model_path(settings.model.path or ""), wanted(settings)
    dtype = loaded_dtype(path, settings.model.dtype, settings.model.device, settings.model.revision)
    task = TASKS[settings.train.task]
    model = empty_model(path, settings.model.revision, task.task_type).to(dtype)
    whole = held_bytes(model)
    if quantisation is not None:
        quantise_model(model, dataclasses.replace(quantisation, backend="lowrank"))
    base = held_bytes(model)
    if lora.layer_replication:
        replicate(model, lora.layer_replication)
    targets = plan(model, lora)
    saved = {path: _size(model.get_submodule(path)) for path in saved_modules(model, lora)}
    rows = trained_rows(model, lora)
    trained = sum(t.params for t in targets) + sum(t.params for t in rows) + sum(saved.values())
    total = _size(model) + trained
    if args.json:
        found = _as_json(targets, saved, rows, trained, total)
        found |= {
            "base_bytes": base,
            "quantisation": None if quantisation is None else quantisation.to_json(),
        }
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(settings.model.path, targets, saved, rows, trained, total, every=args.all)
        print(f" the base: {amount(whole, 'B')} of weights in {str(dtype).removeprefix('torch.')}")
        if quantisation is not None:
            print(f"           {amount(base, 'B')} as {quantisation}")
    return 0


def _size(module: Any) -> int:
    from lowrank.bases.kinds import count_parameters

    return count_parameters(module)[1]


def _bytes(targets: list[Any], saved: dict[str, int], rows: list[Any]) -> int:
    """The size of the adapter's file, in float32."""
    return sum(t.bytes for t in targets) + 4 * (sum(saved.values()) + sum(t.params for t in rows))


def _as_json(
    targets: list[Any], saved: dict[str, int], rows: list[Any], trained: int, total: int
) -> dict[str, Any]:
    fields = ("path", "r", "scaling", "dropout", "method", "params", "bytes")
    return {
        "targets": [
            {**{f: getattr(t, f) for f in fields}, "kind": t.kind.name, "shape": [t.out, t.in_]}
            for t in targets
        ],
        "modules_to_save": saved,
        "trainable_tokens": [
            {"path": t.path, "rows": len(t.indices), "tied": list(t.tied), "params": t.params}
            for t in rows
        ],
        "trainable_params": trained,
        "total_params": total,
        "adapter_bytes": _bytes(targets, saved, rows),
    }


def _print(
    name: Any,
    targets: list[Any],
    saved: dict[str, int],
    rows: list[Any],
    trained: int,
    total: int,
    every: bool,
) -> None:
    from rich.table import Table
    from rich.text import Text

    from lowrank.report.text import show
    from lowrank.report.words import amount

    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("target", no_wrap=every, overflow="fold")
    table.add_column("kind", overflow="fold")
    counted = () if every else ("scaling", "layers")
    for column in ("out × in", "r", *counted, "parameters"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in _grouped(targets, every):
        t = group[0]
        table.add_row(
            t.path if every else t.path.rpartition(".")[2],
            t.kind.name if t.method == "lora" else f"{t.kind.name}, {t.method}",
            f"{t.out} × {t.in_}",
            str(t.r),
            *(() if every else (f"{t.scaling:g}", str(len(group)))),
            f"{sum(t.params for t in group):,}",
        )
    for path, params in saved.items():
        table.add_row(path, "saved whole", "", "", *[""] * len(counted), f"{params:,}")
    blank = ["", "", *[""] * len(counted)]
    for t in rows:
        table.add_row(t.path, f"{len(t.indices)} rows", *blank, f"{t.params:,}")
        for path in t.tied:
            table.add_row(path, "tied to it", *blank, "")
    size = amount(_bytes(targets, saved, rows), "B")
    show(Text(f" {name}", "bold"))
    show(table)
    print(
        f"\n {trained:,} trainable of {total:,} parameters ({trained / total:.4%}), "
        f"{size} in float32"
    )


def _grouped(targets: list[Any], every: bool) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for t in targets:
        alike = (t.path.rpartition(".")[2], t.kind.name, t.out, t.in_, t.r, t.scaling, t.method)
        groups.setdefault(t.path if every else alike, []).append(t)
    return list(groups.values())
