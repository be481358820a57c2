"""What does a QLoRA layer cost, forward and backward, with lowrank's nf4, and on bitsandbytes with lowrank and with PEFT?

One linear layer of each size, with its input requiring a gradient. The yardsticks are the frozen layers
alone: dense, lowrank's QuantisedLinear without bitsandbytes' kernels, and bitsandbytes' Linear4bit. All of
them alternate in one process. Nothing is timed before each adapted layer's output and gradients agree
with the dense product of the weight that the 4 bits stand for. Two lines tell how a weight is dequantised: by a
byte's two values at once, or with each half taken out by itself.

    python benchmarks/quantised_step.py                    # CPU, a minute
    python benchmarks/quantised_step.py --device cuda --dtype bfloat16 --sizes 4096 --tokens 4096
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
from torch import nn

import lowrank
from lowrank import Quantisation
from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.kernels import quantisation as kernels

NF4 = Quantisation("nf4", block_size=64, double=True)


class Model(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def bitsandbytes_layer(dense: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        dense.in_features, dense.out_features, bias=False, quant_type="nf4"
    ).to(dense.weight.dtype)
    layer.load_state_dict(dense.state_dict())
    return layer.to(dense.weight.device)


def adapted(library, layer: nn.Module, r: int) -> nn.Module:
    settings = library.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["layer"])
    model = library.get_peft_model(Model(layer), settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.train()


def subjects(size: int, args: argparse.Namespace) -> dict[str, nn.Module]:
    torch.manual_seed(args.seed)
    dense = nn.Linear(size, size, bias=False, device=args.device).to(getattr(torch, args.dtype))
    dense.requires_grad_(False)
    own = [QuantisedLinear.from_linear(dense, NF4) for _ in range(2)]
    return {
        "dense, frozen": dense,
        "nf4, frozen": own[0],
        "bitsandbytes, frozen": bitsandbytes_layer(dense).train(),
        "lowrank on nf4": adapted(lowrank, own[1], args.r),
        "lowrank on bitsandbytes": adapted(lowrank, bitsandbytes_layer(dense), args.r),
        "PEFT on bitsandbytes": adapted(peft, bitsandbytes_layer(dense), args.r),
    }


def step(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(g)
    return y.detach(), x.grad


def check(models: dict[str, nn.Module], size: int, args: argparse.Namespace) -> None:
    """Against the formula in float64; exits where one is off."""
    x, g = data(size, args, tokens=16)
    W = models["nf4, frozen"].dequantised().double()
    layer = models["lowrank on nf4"].base_model.model.layer
    with_adapter = W + layer.get_delta_weight("default").detach().double()
    for name, model in models.items():
        if name == "dense, frozen":
            continue
        M = W if "frozen" in name else with_adapter
        y, gradient = step(model, x, g)
        found = max(
            ((a.double() - b).norm() / b.norm()).item()
            for a, b in ((y, x.double() @ M.T), (gradient, g.double() @ M))
        )
        if found > (1e-5 if args.dtype == "float32" else 0.02):
            sys.exit(f"{name} is off by {found:.1e}; nothing is timed.")


def data(size: int, args: argparse.Namespace, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = getattr(torch, args.dtype)
    return tuple(torch.randn(1, tokens, size).to(args.device, dtype) for _ in range(2))  # type: ignore[return-value]


def alternated(
    runs: dict[str, Callable[[], object]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(args.warmup + args.repeats):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            synchronise(args)
            start = time.perf_counter()
            runs[name]()
            synchronise(args)
            if i >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def dequantising(
    models: dict[str, nn.Module], args: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    own, theirs = models["nf4, frozen"], models["bitsandbytes, frozen"].weight
    packed, dtype = own.packed, getattr(torch, args.dtype)
    values = (packed.codes, kernels.scales(packed), "nf4", 64, own.shape, dtype)
    return {
        "bitsandbytes' kernel": lambda: bnb.functional.dequantize_4bit(
            theirs.data, theirs.quant_state
        ),
        "a byte's two values": lambda: kernels.dequantise_blocks(*values),
        "half by half": lambda: kernels.dequantise_blocks_reference(*values),
    }


def show(title: str, seconds: dict[str, list[float]], unit: str) -> None:
    print(f"\n{title}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        low, _, high = statistics.quantiles(values, n=4)
        print(
            f"  {name:26}{median[name] * 1e3:9.2f} ms   {low * 1e3:7.2f}–{high * 1e3:.2f}"
            f"{median[name] / median[unit]:9.2f} × {unit}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[768, 2048])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    versions = {m.__name__: m.__version__ for m in (torch, bnb, peft, lowrank)}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{machine}; {named}; commit {commit or 'unknown'}; seed {args.seed}")
    print(f"{args.tokens} tokens, {args.dtype}, r={args.r}; {args.repeats} rounds, in turns")
    results: dict[str, dict] = {}
    for size in args.sizes:
        models = subjects(size, args)
        check(models, size, args)
        x, g = data(size, args, args.tokens)
        steps = alternated({n: partial(step, m, x, g) for n, m in models.items()}, args)
        show(f"forward + backward, {size} × {size}", steps, "bitsandbytes, frozen")
        weights = alternated(dequantising(models, args), args)
        show(f"dequantising, {size} × {size}", weights, "bitsandbytes' kernel")
        results[str(size)] = {"step_seconds": steps, "dequantise_seconds": weights}
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        found = {"settings": settings, "machine": machine, "versions": versions, "commit": commit}
        args.json.write_text(json.dumps({**found, "sizes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
