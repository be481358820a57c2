"""What does it cost to decode a batch whose rows go through different adapters?

Greedy decoding, one token after another with a key-value cache, of 32 rows: the base alone; lowrank with 32
adapters mixed in the batch; PEFT's mixed batch; and PEFT's adapters one after another (each row on its own).
All alternate in one process. Nothing is timed before every mixed row gives the logits of its adapter alone.

    python benchmarks/mixed_batch.py
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
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(library, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
    )
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype)).to(args.device).eval()
    if library is None:
        # frozen like the others: torch multiplies a frozen weight along another path (prefill's last position)
        return model.requires_grad_(False)
    settings: dict = {
        "r": args.r,
        "lora_alpha": 2 * args.r,
        "target_modules": args.targets,
        "init_lora_weights": False,
    }
    wrapped = library.get_peft_model(
        model, library.LoraConfig(**settings), "a0", autocast_adapter_dtype=False
    )
    for i in range(1, args.adapters):
        wrapped.add_adapter(f"a{i}", library.LoraConfig(**settings), autocast_adapter_dtype=False)
    if library is peft:
        wrapped.to(getattr(torch, args.dtype))
    return wrapped.to(args.device).eval()


@torch.inference_mode()
def decode(model: torch.nn.Module, ids: torch.Tensor, steps: int, **kwargs) -> None:
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )


def check(model: torch.nn.Module, ids: torch.Tensor, names: list[str], tolerance: float) -> float:
    """The largest difference of a mixed row's logits from its adapter alone, relative to the logits."""
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        worst = 0.0
        for row in range(0, len(names), max(1, len(names) // 4)):
            model.set_adapter(names[row])
            alone = model(input_ids=ids).logits[row]
            worst = max(worst, float((mixed[row] - alone).norm() / alone.norm()))
    if worst > tolerance:
        sys.exit(f"a mixed row differs from its adapter alone by {worst:.1e}; nothing is timed.")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument(
        "--targets", nargs="+", default=["q_proj", "v_proj"], help=f"of {', '.join(TARGETS)}"
    )
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16, help="tokens that are decoded")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    ids = torch.randint(4096, (args.rows, args.prompt), device=args.device)
    names = [f"a{i % args.adapters}" for i in range(args.rows)]
    base, ours, theirs = build(None, args), build(lowrank, args), build(peft, args)
    tolerance = 1e-4 if args.dtype == "float32" else 3e-2
    agreement = check(ours, ids, names, tolerance)

    def one_after_another() -> None:
        for name in dict.fromkeys(names):
            theirs.set_adapter(name)
            mine = [row for row, other in enumerate(names) if other == name]
            decode(theirs, ids[mine], args.steps)

    subjects = {
        "base alone": lambda: decode(base, ids, args.steps),
        "lowrank, mixed": lambda: decode(ours, ids, args.steps, adapter_names=names),
        "PEFT, mixed": lambda: decode(theirs, ids, args.steps, adapter_names=names),
        "PEFT, one after another": one_after_another,
    }
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for i in range(args.repeats + 1):
        for name, run in subjects.items():
            if name.endswith("another") and i > 2:
                continue
            start = time.perf_counter()
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, lowrank)}
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    print(
        f"{device}; {', '.join(f'{k} {v}' for k, v in versions.items())}; commit {found.stdout.strip()}"
    )
    print(
        f"{args.rows} rows, {args.adapters} adapters of r={args.r} on {', '.join(args.targets)}; width {args.hidden}, "
        f"{args.layers} layers, {args.dtype}; {args.steps} tokens after {args.prompt}"
    )
    print(f"a mixed row differs from its adapter alone by at most {agreement:.1e}\n")
    for name, value in median.items():
        spread = max(seconds[name]) / min(seconds[name])
        print(
            f"{name:26}{value * 1e3:9.1f} ms   × base {value / median['base alone']:6.2f}   (slowest / fastest {spread:.2f})"
        )
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        result = {
            "settings": settings,
            "machine": device,
            "versions": versions,
            "commit": found.stdout.strip(),
            "seconds": seconds,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
