"""Prove that a merged folder is the same function as base + adapter.

Every tensor of MERGED is compared with W + ΔW, computed in float64 from the files of BASE and
ADAPTER; and its outputs, computed by plain transformers in a process of its own, with those of
base + adapter, computed unmerged. What is lost is measured against what the adapter does.
BASE may be left out if the adapter names it. Exit status 1 if MERGED falls short.

  lowrank verify embedded runs/intents runs/intents-merged --data embedded:intents
"""

import argparse
import json
from pathlib import Path
from typing import Any

from lowrank.cli.arguments import part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser)
    parser.add_argument("merged", metavar="MERGED", help="the merged model's folder")
    add_evidence(parser)


def add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base",
        nargs="?",
        metavar="BASE",
        help="model folder, name on the Hub, or embedded (the one that the adapter names)",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter's folder")


def add_evidence(parser: argparse.ArgumentParser) -> None:
    """The arguments that `merge` and `verify` have in common."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="JSONL",
        help="compare on these rows, with perplexities; or embedded:NAME, its test part",
    )
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON")
    parser.add_argument(
        "--tolerance",
        type=part,
        default=0.1,
        metavar="SHARE",
        help="how much of the adapter's effect on the outputs rounding may cost (0.1: a tenth)",
    )


def run(args: argparse.Namespace) -> int:
    base = base_path(args)
    return verify_and_show(base, args.adapter, args.merged, args, evidence(args, base))


def base_path(args: argparse.Namespace) -> str:
    """The base's folder or name on the Hub: as given, or as the adapter names it."""
    from lowrank.cli.opening import OpeningError, adapter_base, model_path

    named = adapter_base(args.adapter)
    if named is None and Path(args.adapter).exists():
        raise OpeningError(
            f"{args.adapter} holds no adapter: there is no adapter_config.json in it"
        )
    base = args.base or named
    if not base:
        raise OpeningError(f"{args.adapter} does not name its base: give BASE before it")
    return model_path(base)


def evidence(args: argparse.Namespace, base: str) -> list[dict[str, Any]] | None:
    """The inputs to compare on, if --data names any; whatever cannot be read is said before the work."""
    return examples(args.data, args.adapter, base, "test") if args.data else None


def verify_and_show(
    base: str,
    adapter: str,
    merged: str,
    args: argparse.Namespace,
    inputs: Any,
    candidates: Any = None,
) -> int:
    """Verify, print the result, and return the exit status. candidates: if they are measured already."""
    from lowrank.report import text
    from lowrank.report.data import to_json
    from lowrank.verify import verify

    result = verify(
        base, adapter, merged, inputs=inputs, tolerance=args.tolerance, candidates=candidates
    )
    if args.json:
        print(json.dumps(to_json(result), indent=2, ensure_ascii=False))
    else:
        text.show(text.verification(result))
    return 0 if result.passed else 1


def examples(names: list[str], adapter: str, base: str, split: str) -> list[dict[str, Any]]:
    """Rows of data as token ids; split: which part of embedded data."""
    from lowrank.cli.opening import context_length, open_rows, open_tokenizer
    from lowrank.model_files import has_tokenizer
    from lowrank.model_folder import load_config
    from lowrank.train.data.encode import encode

    tokenizer = open_tokenizer(adapter if has_tokenizer(adapter) else base)
    length = context_length(load_config(base), None)
    return encode(open_rows(names, split), tokenizer, max_length=length).examples
