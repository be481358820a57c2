"""What does it cost to train adapters on fused experts (target_parameters)?

Forward and backward of one mixture-of-experts block as transformers has it, in training: without adapters (the
gradient of the input only), with lowrank, with PEFT, in turn. Nothing is timed before the gradients of A and B of the
two agree. Peak memory is taken with --device cuda.

    python benchmarks/experts.py
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

import lowrank

SUBJECTS = ["base", "lowrank", "peft"]


def build(subject: str, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=1,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        num_local_experts=args.experts,
        num_experts_per_tok=2,
    )
    config._experts_implementation = args.implementation
    model = MixtralForCausalLM(config).to(args.device, getattr(torch, args.dtype))
    if subject == "base":
        return model.requires_grad_(False).train()
    library = {"lowrank": lowrank, "peft": peft}[subject]
    names = ["experts.gate_up_proj", "experts.down_proj"]
    settings = library.LoraConfig(
        r=args.r, lora_alpha=2 * args.r, target_modules=[], target_parameters=names
    )
    adapted = library.get_peft_model(model, settings)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return adapted.train()


def block(model: torch.nn.Module) -> torch.nn.Module:
    return next(m for m in model.modules() if type(m).__name__ == "MixtralSparseMoeBlock")


def step(module: torch.nn.Module, x: torch.Tensor) -> None:
    for parameter in module.parameters():
        parameter.grad = None
    y = module(x)
    y.backward(torch.ones_like(y) / y.numel())


def inputs(args: argparse.Namespace) -> torch.Tensor:
    x = torch.randn(1, args.tokens, args.hidden, generator=torch.Generator().manual_seed(1))
    return x.to(args.device, getattr(torch, args.dtype)).requires_grad_()


def check_agreement(modules: dict[str, torch.nn.Module], args: argparse.Namespace) -> float:
    """The largest difference of a gradient, as a share of it. Exits if the two libraries differ."""
    found = {}
    for subject in ("lowrank", "peft"):
        step(modules[subject], inputs(args))
        named = modules[subject].named_parameters()
        found[subject] = {n: p.grad.float() for n, p in named if p.grad is not None}
    ours, theirs = found["lowrank"], found["peft"]
    worst = max(float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items())
    if ours.keys() != theirs.keys() or worst > (1e-4 if args.dtype == "float32" else 0.05):
        sys.exit(f"the gradients differ by {worst:.2e} of their size; nothing is timed.")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--implementation", default="grouped_mm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    modules = {subject: block(build(subject, args)) for subject in SUBJECTS}
    difference = check_agreement(modules, args)
    seconds: dict[str, list[float]] = {subject: [] for subject in SUBJECTS}
    peak: dict[str, int] = {}
    for i in range(args.repeats + 3):
        for subject in SUBJECTS[i % 3 :] + SUBJECTS[: i % 3]:
            x = inputs(args)
            if args.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            step(modules[subject], x)
            if args.device == "cuda":
                torch.cuda.synchronize()
                peak[subject] = torch.cuda.max_memory_allocated() - before
            if i >= 3:
                seconds[subject].append(time.perf_counter() - start)

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    print(f"{platform.processor() or platform.machine()}, {args.device}, {versions}, {commit}")
    print(f"gradients of the two differ by {difference:.1e}")
    for subject in SUBJECTS:
        times = sorted(seconds[subject])
        quarter = len(times) // 4
        line = f"{subject:8} {1e3 * statistics.median(times):8.1f} ms"
        line += f"  ({1e3 * times[quarter]:.1f} to {1e3 * times[-1 - quarter]:.1f})"
        line += f"  peak {peak[subject] / 2**20:.0f} MiB" if peak else ""
        print(line)
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k != "output"}
        result = {"settings": settings, "versions": versions, "commit": commit}
        result |= {"seconds": seconds, "peak_bytes": peak, "gradient_difference": difference}
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
