"""Make a LoRA of the difference of two full checkpoints: TUNED − BASE, layer by layer. No model is built.

--rank is the same everywhere; --energy lets each layer keep as many singular values as hold that share of
‖ΔW‖². The table shows what is lost, relative to ΔW. What differs and is no matrix of the layers (norms,
biases, embeddings) is listed, and with --save-rest held whole by the adapter.

  lowrank extract llama llama-tuned adapter --rank 32
  lowrank extract llama llama-tuned adapter --energy 0.95 --target-modules q_proj v_proj --save-rest
"""

import argparse
import sys
from typing import Any

from lowrank.cli.arguments import share, whole
from lowrank.cli.combine import add_output, check_out, write_and_show

SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="model folder, name on the Hub, or embedded")
    parser.add_argument("tuned", metavar="TUNED", help="the same model, tuned")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--rank", type=whole(1), metavar="R", help="of every layer")
    wanted.add_argument("--energy", type=share, metavar="SHARE", help="of ‖ΔW‖², as 0.95")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="which layers (all-linear: every linear layer but the output head)",
    )
    parser.add_argument(
        "--target-parameters",
        nargs="+",
        default=[],
        metavar="NAME",
        help="which bare parameters, as experts.gate_up_proj experts.down_proj",
    )
    parser.add_argument(
        "--save-rest", action="store_true", help="hold whole what differs and cannot be a LoRA"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the randomised SVD (0)")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    from lowrank.cli.opening import model_path
    from lowrank.extract import extract

    base, tuned = model_path(args.base), model_path(args.tuned)
    check_out(args.out, [base, tuned], args.overwrite)
    words = args.target_modules
    result = extract(
        base,
        tuned,
        rank=args.rank,
        energy=args.energy,
        target_modules="all-linear" if words == ["all-linear"] else words,
        target_parameters=args.target_parameters,
        save_rest=args.save_rest,
        seed=args.seed,
    )
    status = write_and_show(result.adapter, args)
    show_rest(result, sys.stderr if args.json else sys.stdout, args.all, args.save_rest)
    return status


def show_rest(result: Any, file: Any, every: bool, saving: bool) -> None:
    """What differs and is in no layer of the adapter."""
    from lowrank.report.words import percent

    if not result.rest:
        return
    lost = [row for row in result.rest if not row.saved]
    what = (
        "held whole" if not lost else "not captured" if len(lost) == len(result.rest) else "beside"
    )
    some = f"{len(result.rest)} tensors that differ and are in no layer of the adapter:"
    if len(result.rest) == 1:
        some = "1 tensor that differs and is in no layer of the adapter:"
    print(f" {what:<8} {some}", file=file)
    shown = result.rest if every else result.rest[:SHOWN]
    for row in shown:
        change = "another size" if row.change is None else f"by {percent(row.change)}"
        print(f"   {row.name}  {change}{'' if row.saved else '  (not captured)'}", file=file)
    if len(shown) < len(result.rest):
        print(f"   … and {len(result.rest) - len(shown)} more (--all shows them)", file=file)
    if lost and saving:
        print(
            "   These are stored in another form than the model's: no adapter holds them", file=file
        )
    elif lost:
        print("   --save-rest holds whole what the model has in this form", file=file)
