"""Make one adapter of several: ΔW = Σ weight·ΔW, or what --method makes of it. No model is read.

Any mix of ranks, scalings (rsLoRA too) and targeted layers; PEFT and vLLM load the result. --method
linear is the sum exactly, of rank Σ r; svd (the default) its best approximation of rank --rank. The
table shows what that costs at each layer, relative to the sum.

  lowrank combine runs/intents runs/records runs/both --weights 0.7 0.3
  lowrank combine A B C OUT --weights 1 1 -0.5 --method ties_svd --rank 16 --density 0.3
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lowrank.cli.arguments import finite, share, whole

SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="an adapter's folder, or its name on the Hub"
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--weights", nargs="+", type=finite, required=True, metavar="W", help="one for each adapter"
    )
    parser.add_argument(
        "--method",
        default="svd",
        metavar="NAME",
        help="linear, cat, svd; ties, dare_linear, dare_ties, magnitude_prune (on the factors) or with _svd "
        "behind it (on ΔW); linear_factors (PEFT's linear)",
    )
    parser.add_argument(
        "--rank", type=whole(1), metavar="R", help="with svd (the highest among the adapters)"
    )
    parser.add_argument(
        "--energy",
        type=share,
        metavar="SHARE",
        help="with svd, for --rank: the share of ‖ΔW‖² to keep",
    )
    parser.add_argument(
        "--density",
        type=share,
        metavar="SHARE",
        help="of the entries that ties, dare_… and magnitude_prune keep",
    )
    parser.add_argument(
        "--majority-sign-method",
        choices=("total", "frequency"),
        default="total",
        help="how ties elects a sign (total)",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides what dare_… drops (0)")
    parser.add_argument(
        "--any-base", action="store_true", help="also adapters that were trained on different bases"
    )
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """The arguments that `combine` and `resize` have in common."""
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter in OUT")
    parser.add_argument("--all", action="store_true", help="every layer in the table")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from lowrank.adapter_file import read_adapter
    from lowrank.combine import combine

    check_out(args.out, args.adapters, args.overwrite)
    result = combine(
        [read_adapter(path) for path in args.adapters],
        args.weights,
        args.method,
        svd_rank=args.rank,
        energy=args.energy,
        density=args.density,
        majority_sign_method=args.majority_sign_method,
        seed=args.seed,
        check_base=not args.any_base,
        names=args.adapters,
    )
    return write_and_show(result, args)


def check_out(out: str, sources: list[str], overwrite: bool) -> None:
    """Raises CombineError if `out` is a source, or not empty and not to be overwritten."""
    from lowrank.errors import CombineError

    folder = Path(out)
    if any(Path(s).exists() and Path(s).resolve() == folder.resolve() for s in sources):
        raise CombineError(f"{out} is read: name another folder to write.")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise CombineError(f"{out} exists. Name another folder, or overwrite it (--overwrite).")


def write_and_show(result: Any, args: argparse.Namespace) -> int:
    """Write the adapter, print its errors as a table or as JSON, and return the exit status."""
    from lowrank.adapter_file import write_adapter
    from lowrank.combine import errors, total_error

    write_adapter(args.out, result)
    rows = errors(result)
    total = total_error(rows)
    params = sum(tensor.numel() for tensor in result.tensors.values())
    if args.json:
        made = result.metadata.get("combined") or result.metadata.get("extracted") or {}
        how = {key: value for key, value in made.items() if key != "layers"}
        layers = [row._asdict() for row in rows]
        written = {"out": args.out, **how, "params": params, "error": total, "layers": layers}
        json.dump(written, sys.stdout, indent=2, ensure_ascii=False)
        print()
        return 0
    _print(args.out, rows, total, params, every=args.all)
    return 0


def _print(out: str, rows: list[Any], total: float | None, params: int, every: bool) -> None:
    from rich.table import Table

    from lowrank.report.text import show
    from lowrank.report.words import number, percent

    exact = all(row.error == 0 for row in rows)
    if total is not None and not exact:
        table = Table(box=None, padding=(0, 1), header_style="dim")
        table.add_column("layer", overflow="fold")
        for column in ("r", "‖ΔW‖ meant", "lost"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows if every else rows[:SHOWN]:
            table.add_row(row.path, str(row.r), number(row.norm), percent(row.error))
        show(table)
        if len(rows) > SHOWN and not every:
            print(f" … and {len(rows) - SHOWN} more, none losing more (--all shows them)")
        print()
    ranks = sorted({row.r for row in rows})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    print(f" written  {out}: {len(rows)} layers, {rank}, {params:,} parameters")
    if total is None:
        print(" error    not known: the method works on the factors, and ΔW is what comes of it")
    elif exact:
        print(" error    none: the weighted sum of ΔW, up to float32's rounding")
    else:
        print(
            f" error    {percent(total)} of ‖ΔW‖ over all layers, {percent(rows[0].error)} at the worst"
        )
