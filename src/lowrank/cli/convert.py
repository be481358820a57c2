"""Write an adapter in another program's format, with the same ΔW at every layer. No model is read.

The format of IN is recognised: a folder of PEFT's (or one for each component of a pipeline), or its name
on the Hub; diffusers' pytorch_lora_weights.safetensors; a file of kohya's; MLX's folder; a GGUF LoRA.
OUT is a folder for peft, diffusers and mlx, a file for kohya (.safetensors) and gguf (.gguf). What the
format has no place for is refused by name, or left out with --drop.

  lowrank convert runs/intents intents.gguf --to gguf --base meta-llama/Llama-3.2-1B
  lowrank convert runs/intents intents-mlx --to mlx
  lowrank convert style.safetensors style --to peft
  lowrank convert style style.safetensors --to kohya
"""

import argparse
import json
import sys
import textwrap
from typing import Any

FORMATS = ("peft", "diffusers", "kohya", "mlx", "gguf")
KINDS = ("dora", "lora_bias", "embeddings", "convolutions", "saved", "unknown")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a file, a folder, or a name on the Hub")
    parser.add_argument("out", metavar="OUT", help="the folder or file to write")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    parser.add_argument(
        "--from", dest="source_format", choices=FORMATS, help="IN's, if not as recognised"
    )
    parser.add_argument(
        "--component",
        metavar="NAME",
        help="of a pipeline (unet, transformer, text_encoder, …): the one to take, or what IN is for",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base's folder or name on the Hub: gguf needs its config.json (the adapter's own word for it "
        "is the default), kohya takes module names from a pipeline's folder",
    )
    parser.add_argument("--dtype", choices=("f32", "f16"), help="of a GGUF file (f32)")
    parser.add_argument(
        "--drop",
        nargs="+",
        default=[],
        choices=KINDS,
        metavar="KIND",
        help=f"leave out what the format cannot hold: {', '.join(KINDS)}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from lowrank.formats import convert

    result = convert(
        args.source,
        args.out,
        args.to,
        source_format=args.source_format,
        component=args.component,
        base=args.base,
        dtype=args.dtype,
        drop=args.drop,
        overwrite=args.overwrite,
    )
    rows = {name or "adapter": _row(adapter) for name, adapter in result.adapters.items()}
    files = [str(path) for path in result.files]
    if args.json:
        written = {"from": result.source, "to": args.to, "files": files, "adapters": rows}
        json.dump(
            {**written, "dropped": result.dropped, "notes": result.notes}, sys.stdout, indent=2
        )
        print()
        return 0
    print(f" read     {args.source} ({result.source})")
    for name, row in rows.items():
        ranks = (
            "rank " + " and ".join(map(str, row["ranks"]))
            if len(row["ranks"]) < 3
            else "several ranks"
        )
        dora = ", DoRA" if row["dora"] else ""
        print(f" {name:<8} {row['layers']} layers, {ranks}{dora}, {row['params']:,} parameters")
    for kind, keys in result.dropped.items():
        print(
            f" dropped  {kind}: {len(keys)} tensors, {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        )
    for file in files:
        print(f" written  {file}")
    for note in result.notes:
        print(textwrap.fill(note, 78, initial_indent=" note     ", subsequent_indent=" " * 10))
    return 0


def _row(adapter: Any) -> dict[str, Any]:
    factors = [
        tensor
        for key, tensor in adapter.tensors.items()
        if key.endswith((".lora_A.weight", ".lora_embedding_A"))
    ]
    return {
        "layers": len(factors),
        "ranks": sorted({len(A) for A in factors}),
        "dora": adapter.config.use_dora,
        "params": sum(tensor.numel() for tensor in adapter.tensors.values()),
    }
