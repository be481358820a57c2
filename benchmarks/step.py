"""How long does a training step take, and how much memory, with lowrank, with PEFT, and with PEFT sped up by lowrank?

One step is forward + backward + AdamW on a Llama-shaped model built from a configuration, with LoRA on all
linear layers. The yardstick is the frozen base alone: forward and the backward that any adapter needs
(gradients of the activations, none of the weights), without an optimiser. All of them alternate in one
process, so that the machine's noise meets them alike. Memory is what the forward pass keeps for the backward
pass, counted to the byte, and the process's (on CUDA: the device's) peak, taken in a fresh process for each.
Nothing is timed before lowrank and PEFT, given the same adapter, agree in loss and gradients.

    python benchmarks/step.py                         # CPU, a minute or two
    python benchmarks/step.py --device cuda --dtype bfloat16 --hidden 4096 --layers 8 --batch 4 --sequence 1024
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SUBJECTS = ("base", "lowrank", "peft", "speedup")


def build(subject: str, args: argparse.Namespace) -> torch.nn.Module:
    """The model of one subject; all have the same base weights, and all adapters the same values."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        use_cache=False,
    )
    with torch.device(args.device):
        model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    if subject == "base":
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return model.train()
    library = lowrank if subject == "lowrank" else __import__("peft")
    settings = library.LoraConfig(
        r=args.r,
        lora_alpha=2 * args.r,
        lora_dropout=args.dropout,
        target_modules=TARGETS,
        use_dora=args.dora,
        task_type="CAUSAL_LM",
    )
    model = library.get_peft_model(model, settings)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name or "lora_B" in name:
            generator = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
            value = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(value)
    if subject == "speedup":
        lowrank.speedup(model)
    return model.train()


def batch(args: argparse.Namespace, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(args.vocabulary, (args.batch, args.sequence), generator=generator).to(
        args.device
    )
    return {"input_ids": ids, "labels": ids}


def step(
    model: torch.nn.Module, optimiser: torch.optim.Optimizer | None, inputs: dict
) -> torch.Tensor:
    loss = model(**inputs).loss
    loss.backward()
    if optimiser is not None:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return loss.detach()


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer | None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-4) if parameters else None


def check_agreement(args: argparse.Namespace) -> dict[str, float]:
    """Loss and gradients of lowrank against PEFT's, without dropout. Exits if they differ."""
    plain = argparse.Namespace(
        **{**vars(args), "dropout": 0.0, "batch": 1, "sequence": min(64, args.sequence)}
    )
    found = {}
    for subject in ("lowrank", "peft"):
        model = build(subject, plain)
        loss = step(model, None, batch(plain, 0))
        gradients = {
            n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None
        }
        found[subject] = (float(loss), gradients)
        del model
    (ours, our_gradients), (theirs, their_gradients) = found["lowrank"], found["peft"]
    difference = max(
        float((our_gradients[n] - g).norm() / g.norm().clamp_min(1e-12))
        for n, g in their_gradients.items()
    )
    # in 16 bits PEFT computes the adapter in float32 and rounds elsewhere
    limit = 1e-4 if args.dtype == "float32" else 0.1
    if (
        our_gradients.keys() != their_gradients.keys()
        or abs(ours - theirs) > limit * abs(theirs)
        or difference > limit
    ):
        sys.exit(
            f"lowrank and PEFT disagree: loss {ours} and {theirs}, gradients by {difference:.2e}; nothing is timed."
        )
    return {"loss": ours, "peft_loss": theirs, "largest_gradient_difference": difference}


def measure_time(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step, the subjects taking turns."""
    models = {subject: build(subject, args) for subject in SUBJECTS}
    optimisers = {subject: adamw(model) for subject, model in models.items()}
    seconds: dict[str, list[float]] = {subject: [] for subject in SUBJECTS}
    for i in range(args.warmup + args.repeats):
        inputs = batch(args, i)
        first = i % len(SUBJECTS)
        for subject in SUBJECTS[first:] + SUBJECTS[:first]:
            synchronise(args)
            start = time.perf_counter()
            step(models[subject], optimisers[subject], inputs)
            synchronise(args)
            if i >= args.warmup:
                seconds[subject].append(time.perf_counter() - start)
    return seconds


def measure_memory(args: argparse.Namespace) -> dict[str, int]:
    """Peak bytes of three steps, each subject in its own process; on a CPU, above the process with its model built."""
    found = {}
    for subject in SUBJECTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", subject]
        found[subject] = int(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
    return found


def measure_kept(args: argparse.Namespace) -> dict[str, int]:
    """Bytes of the distinct tensors that one forward pass keeps for backward, without the parameters."""
    found = {}
    for subject in SUBJECTS:
        model = build(subject, args)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, own=own, kept=kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage  # held, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch(args, 0)).loss
        found[subject] = sum(storage.nbytes() for storage in kept.values())
        del loss, model, kept
    return found


def memory_of(subject: str, args: argparse.Namespace) -> int:
    model = build(subject, args)
    optimiser = adamw(model)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident_bytes()
    for i in range(3):
        step(model, optimiser, batch(args, i))
    return torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_bytes() - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synchronise(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--memory-of", choices=SUBJECTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(memory_of(args.memory_of, args))
        return

    import peft
    import transformers

    agreement = check_agreement(args)
    seconds = measure_time(args)
    memory, kept = measure_memory(args), measure_kept(args)
    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, lowrank)}
    median = {subject: statistics.median(values) for subject, values in seconds.items()}
    spread = {subject: statistics.quantiles(values, n=4) for subject, values in seconds.items()}
    print(
        f"{device}; {', '.join(f'{k} {v}' for k, v in versions.items())}; commit {commit()}; seed {args.seed}"
    )
    shape = f"width {args.hidden}, {args.layers} layers, {args.batch} × {args.sequence} tokens, {args.dtype}, r={args.r}"
    print(
        f"Llama shape: {shape}, dropout {args.dropout}{', DoRA' if args.dora else ''}; {args.repeats} steps each, in turns"
    )
    print(
        f"agreement with PEFT: loss {agreement['loss']:.6f}, gradients within {agreement['largest_gradient_difference']:.1e}\n"
    )
    print(
        f"{'':22}{'step, median':>14}{'quartiles':>20}{'× base':>9}{'kept':>12}{'× base':>9}{'peak':>12}{'× base':>9}"
    )
    names = {
        "base": "frozen base, fwd+bwd",
        "lowrank": "lowrank",
        "peft": "PEFT",
        "speedup": "PEFT with speedup()",
    }
    for s in SUBJECTS:
        quartiles = f"{spread[s][0] * 1e3:.1f}–{spread[s][2] * 1e3:.1f} ms"
        print(
            f"{names[s]:22}{median[s] * 1e3:11.1f} ms{quartiles:>20}{median[s] / median['base']:9.2f}"
            f"{kept[s] / 2**20:8.1f} MiB{kept[s] / kept['base']:9.2f}"
            f"{memory[s] / 2**20:8.0f} MiB{memory[s] / memory['base']:9.2f}"
        )
    print(
        f"\nPEFT / lowrank: time {median['peft'] / median['lowrank']:.2f}, kept {kept['peft'] / kept['lowrank']:.2f}, peak {memory['peft'] / memory['lowrank']:.2f}"
    )
    if args.json:
        result = {
            "settings": {k: v for k, v in vars(args).items() if k not in ("json", "memory_of")},
            "machine": device,
            "versions": versions,
            "commit": commit(),
            "agreement": agreement,
            "seconds": seconds,
            "kept_bytes": kept,
            "peak_bytes": memory,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
