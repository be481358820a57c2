"""Give an adapter another rank: the best approximation of its ΔW, layer by layer. No model is read.

--rank is the same everywhere (a layer that has less keeps it); --energy lets each layer keep as many
singular values as hold that share of ‖ΔW‖². The table shows what is lost, relative to ΔW.

  lowrank resize runs/intents runs/intents-r4 --rank 4
  lowrank resize runs/intents runs/intents-small --energy 0.99
"""

import argparse

from lowrank.cli.arguments import share, whole
from lowrank.cli.combine import add_output, check_out, write_and_show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="its folder, or its name on the Hub")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--rank", type=whole(1), metavar="R", help="the new rank")
    wanted.add_argument("--energy", type=share, metavar="SHARE", help="of ‖ΔW‖², as 0.99")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    from lowrank.adapter_file import read_adapter
    from lowrank.combine import resize

    check_out(args.out, [args.adapter], args.overwrite)
    adapter = read_adapter(args.adapter)
    return write_and_show(resize(adapter, rank=args.rank, energy=args.energy), args)
