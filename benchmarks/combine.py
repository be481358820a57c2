"""How long does it take to combine two adapters of a 7B model, and what would a dense SVD take?

Two adapters with random factors for every linear layer of a Llama-2-7B-shaped model (32 blocks of seven layers)
are combined by "svd". Beside it, one layer's sum is formed and decomposed by torch.linalg.svd, and its time is
scaled up to all layers by out·in·min(out, in), which is how the cost of a dense SVD grows. Nothing is timed
before the two agree on a smaller layer.

    python benchmarks/combine.py                     # half a minute, most of it the one dense SVD
    python benchmarks/combine.py --blocks 2 --side 512
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from lowrank import Adapter, LoraConfig
from lowrank.combine import combine

HIDDEN, INNER = 4096, 11008
LAYERS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def adapter(shapes: dict[str, tuple[int, int]], r: int, seed: int) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (out, in_) in shapes.items():
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(r, in_, generator=random)
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, r, generator=random)
    names = sorted({path.rpartition(".")[2] for path in shapes})
    return Adapter(LoraConfig(r=r, lora_alpha=2 * r, target_modules=names), tensors, {})


def delta(found: Adapter, path: str) -> torch.Tensor:
    key = f"base_model.model.{path}"
    B, A = found.tensors[f"{key}.lora_B.weight"], found.tensors[f"{key}.lora_A.weight"]
    return found.config.lora_alpha / found.config.r * (B @ A)


def dense(pair: list[Adapter], path: str, r: int) -> torch.Tensor:
    """The best approximation of the sum by way of the (out, in) matrix."""
    U, S, Vh = torch.linalg.svd(
        0.7 * delta(pair[0], path) + 0.3 * delta(pair[1], path), full_matrices=False
    )
    return U[:, :r] * S[:r] @ Vh[:r]


def check(r: int) -> float:
    """The largest difference of the two ways, relative to the result; raises if they do not agree."""
    pair = [adapter({"x": (300, 200)}, r, seed) for seed in (1, 2)]
    wanted = dense(pair, "x", r)
    found = delta(combine(pair, [0.7, 0.3], "svd", svd_rank=r, check_base=False), "x")
    off = ((found - wanted).norm() / wanted.norm()).item()
    if off > 1e-5:
        raise SystemExit(f"the two ways differ by {off:.2g}: nothing is timed")
    return off


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--side", type=int, default=2048, help="of the square layer for the dense SVD"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    off = check(args.r)
    shapes = {
        f"model.layers.{i}.{name}": shape
        for i in range(args.blocks)
        for name, shape in LAYERS.items()
    }
    pair = [adapter(shapes, args.r, seed) for seed in (1, 2)]
    times = [
        seconds(lambda: combine(pair, [0.7, 0.3], "svd", svd_rank=args.r, check_base=False))
        for _ in range(args.repeats)
    ]
    square = [adapter({"x": (args.side, args.side)}, args.r, seed) for seed in (1, 2)]
    one = seconds(lambda: dense(square, "x", args.r))
    ours = min(
        seconds(lambda: combine(square, [0.7, 0.3], "svd", svd_rank=args.r, check_base=False))
        for _ in range(args.repeats)
    )
    scaled = one * sum(out * in_ * min(out, in_) for out, in_ in shapes.values()) / args.side**3
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    result = {
        "layers": len(shapes),
        "r": args.r,
        "seconds": statistics.median(times),
        "seconds_all": times,
        "one_square_layer": {"side": args.side, "factor_seconds": ours, "dense_seconds": one},
        "dense_seconds_scaled": scaled,
        "difference": off,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
        "commit": commit,
    }
    print(f"torch {torch.__version__}, {result['threads']} threads, {result['machine']}")
    print(f"{len(shapes)} layers, two adapters of rank {args.r} -> rank {args.r}")
    print(
        f"  factor space  {result['seconds']:8.1f} s  (of {', '.join(f'{t:.1f}' for t in times)})"
    )
    print(
        f"  dense SVD     {scaled:8.0f} s  (scaled from one layer of {args.side} × {args.side}: {one:.1f} s)"
    )
    print(f"  that layer    {ours * 1e3:8.1f} ms in factor space, {one / ours:.0f} times less")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
