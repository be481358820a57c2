"""Write base + adapter as one model folder that transformers loads, and verify it.

The folder holds weights, config, tokenizer, chat template, generation config and processor files;
it appears when it is complete. BASE may be left out if the adapter names it. Exit status 1 if the
merged folder does not pass the verification.

  lowrank merge embedded runs/intents runs/intents-merged --data embedded:intents
  lowrank merge runs/intents runs/intents-merged --dtype float32
  lowrank merge llama runs/intents runs/intents-merged --round-for intents.jsonl
"""

import argparse
import sys
from pathlib import Path

from lowrank.cli.verify import (
    add_evidence,
    add_folders,
    base_path,
    evidence,
    examples,
    verify_and_show,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser)
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the merged weights (the base's own; the sum is taken in float32 in any case)",
    )
    parser.add_argument(
        "--round-for",
        nargs="+",
        metavar="JSONL",
        help="round so that the outputs on rows like these stay near (the base is loaded and run on them); "
        "or embedded:NAME, its training part",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--no-verify", action="store_true", help="only write")
    add_evidence(parser)


def run(args: argparse.Namespace) -> int:
    from lowrank.cli.opening import OpeningError
    from lowrank.merge import check_out, merge_to_folder
    from lowrank.report import text

    if args.no_verify and (args.data or args.json):
        raise OpeningError(
            "--data and --json are for the verification, which --no-verify leaves out"
        )
    base = base_path(args)
    check_out(Path(args.out), [base, args.adapter], args.overwrite)
    inputs = evidence(args, base)
    covariances = None
    if args.round_for:
        from lowrank.merge_inputs import input_covariances

        covariances = input_covariances(
            base, args.adapter, examples(args.round_for, args.adapter, base, "train")
        )
    written = merge_to_folder(
        base,
        args.adapter,
        args.out,
        dtype=args.dtype,
        overwrite=args.overwrite,
        covariances=covariances,
    )
    text.show(text.merged(written), sys.stderr if args.json else None)
    if args.no_verify:
        return 0
    if not args.json:
        print()
    return verify_and_show(base, args.adapter, args.out, args, inputs)
