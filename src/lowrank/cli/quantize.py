"""Write a model folder with its linear layers in few bits, as transformers and bitsandbytes load it.

The files are streamed, one weight at a time. What it costs is printed: by how much the weights are off, and
with --data the loss before and after. Embeddings, norms and the output head stay as they are. A merged model
is quantised like any other: merge to 16 bits first, then quantise what was merged.

  lowrank quantize runs/intents-merged runs/intents-nf4 --to nf4 --double --data embedded:intents
"""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, name on the Hub, or embedded")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--to", required=True, choices=("nf4", "fp4", "int8"), help="the format")
    parser.add_argument(
        "--double", action="store_true", help="the scales of the 4-bit formats in 8 bits too"
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        metavar="NAME",
        help="layers that stay as they are, by the end of their path (the output head)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="JSONL",
        help="take the loss on these rows before and after; or embedded:NAME, its test part",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON")


def run(args: argparse.Namespace) -> int:
    from lowrank.cli.opening import OpeningError, model_path
    from lowrank.cli.verify import examples
    from lowrank.new_folder import check_out
    from lowrank.quantisation import Quantisation
    from lowrank.quantise_folder import quantise_folder
    from lowrank.report import text
    from lowrank.report.data import to_json

    if args.double and args.to == "int8":
        raise OpeningError("--double is for nf4 and fp4: int8 has one scale a row, in 32 bits")
    model = model_path(args.model)
    check_out(Path(args.out), [model], args.overwrite)
    block = None if args.to == "int8" else 64
    result = quantise_folder(
        model,
        args.out,
        Quantisation(args.to, block_size=block, double=args.double),
        skip=args.skip,
        overwrite=args.overwrite,
        inputs=examples(args.data, model, model, "test") if args.data else None,
    )
    if args.json:
        print(json.dumps(to_json(result), indent=2, ensure_ascii=False))
    else:
        text.show(text.quantised(result))
    return 0
