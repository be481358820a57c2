"""Write base + adapter as one model folder that transformers loads, and verify it.

The folder holds weights, config, tokenizer, chat template, generation config and processor files;
it appears when it is complete. BASE may be left out if the adapter names it. Exit status 1 if the
merged folder does not pass the verification.

An adapter that was trained on a quantised base can be merged onto that base's weights dequantised, as
training saw them, or onto the original ones. Both are measured (on --data, else on made-up inputs); the
one with the lower loss is written, the dequantised where that is not clear. --onto decides without.

  lowrank merge embedded runs/intents runs/intents-merged --data embedded:intents
  lowrank merge runs/intents runs/intents-merged --dtype float32
  lowrank merge llama runs/intents runs/intents-merged --round-for intents.jsonl
  lowrank merge llama runs/qlora runs/qlora-merged --onto original
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

QUANTISED = {
    "nf4": ("nf4", 64, False),
    "nf4-double": ("nf4", 64, True),
    "fp4": ("fp4", 64, False),
    "fp4-double": ("fp4", 64, True),
    "int8": ("int8", None, False),
}


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
    parser.add_argument(
        "--onto",
        choices=("dequantised", "original"),
        help="the weights under an adapter trained on a quantised base (measured, see above)",
    )
    parser.add_argument(
        "--trained-on",
        choices=sorted(QUANTISED),
        help="how its base was quantised, for an adapter whose file does not say it (PEFT's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--no-verify", action="store_true", help="only write")
    add_evidence(parser)


def run(args: argparse.Namespace) -> int:
    from lowrank.cli.opening import OpeningError
    from lowrank.merge import merge_to_folder
    from lowrank.new_folder import check_out
    from lowrank.quantisation import Quantisation
    from lowrank.report import text

    if args.no_verify and args.json:
        raise OpeningError("--json is for the verification, which --no-verify leaves out")
    base = base_path(args)
    measures = not args.onto and (args.trained_on or _trained_quantised(args.adapter))
    if args.no_verify and args.data and not measures:
        raise OpeningError(
            "--data is for the verification, which --no-verify leaves out (and for the choice that --onto makes)"
        )
    check_out(Path(args.out), [base, args.adapter], args.overwrite)
    inputs = evidence(args, base)
    trained_on = None
    if args.trained_on:
        format, block_size, double = QUANTISED[args.trained_on]
        trained_on = Quantisation(format, "bitsandbytes", block_size, double)
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
        onto=args.onto,
        inputs=inputs,
        trained_on=trained_on,
    )
    text.show(text.merged(written, candidates=args.no_verify), sys.stderr if args.json else None)
    if args.no_verify:
        return 0
    if not args.json:
        print()
    return verify_and_show(base, args.adapter, args.out, args, inputs, written.candidates)


def _trained_quantised(adapter: str) -> bool:
    from lowrank.adapter_file import read_adapter
    from lowrank.quantised_base import METADATA_KEY

    return bool(read_adapter(adapter).metadata.get(METADATA_KEY))
