"""What does rounding W + ΔW to bfloat16 cost a trained adapter, and what do the ways to round gain?

A LoRA is trained on the embedded model (intents, all linear layers), and the merged weights of its layers, from the
base in bfloat16, are rounded in five ways. The error E is measured entry by entry, ‖E‖ / ‖ΔW‖, and at the layers'
outputs, ‖E·x‖ / ‖ΔW·x‖, over inputs x from test rows that no method has seen. Sums over all layers.

    nearest            each entry to the nearest value
    stochastic         up or down at random, so that the mean is right
    error diffusion    each entry takes the sum of the errors before it in the row into account (sigma-delta)
    adapter's rows     the error is kept small in the row space of A, which needs no data
    inputs             `lowrank merge --round-for`: small for the covariance of inputs from training rows

    python benchmarks/rounding.py            # about a minute
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lowrank import read_adapter
from lowrank.adapter_layers import read_layers
from lowrank.calibration.corda import Covariances
from lowrank.calibration.observe import PREFIX, adapted, watching
from lowrank.cli.verify import examples
from lowrank.embedded import model_path
from lowrank.merge_inputs import input_covariances
from lowrank.model_folder import load_model
from lowrank.peft import PeftModel
from lowrank.rounding import rounded_for_inputs

Round = Callable[[Tensor, Tensor, Tensor], Tensor]  # (exact, A, covariance) -> in bfloat16's values


def neighbours(exact: Tensor) -> tuple[Tensor, Tensor]:
    nearest = exact.bfloat16()
    towards = torch.where(nearest.double() > exact, -torch.inf, torch.inf).bfloat16()
    return nearest.double(), torch.nextafter(nearest, towards).double()


def nearest(exact: Tensor, A: Tensor, C: Tensor) -> Tensor:
    return neighbours(exact)[0]


def stochastic(exact: Tensor, A: Tensor, C: Tensor) -> Tensor:
    near, other = neighbours(exact)
    share = (exact - near).abs() / (other - near).abs()
    random = torch.rand(exact.shape, generator=torch.Generator().manual_seed(0), dtype=exact.dtype)
    return torch.where(random < share, other, near)


def fed_back(exact: Tensor, directions: Tensor) -> Tensor:
    """Column by column, the neighbour that keeps E·directionsᵀ small so far."""
    near, other = neighbours(exact)
    error = exact.new_zeros(len(exact), len(directions))
    found = torch.empty_like(exact)
    for j in range(exact.shape[1]):
        g = directions[:, j]
        options = torch.stack([near[:, j], other[:, j]]) - exact[:, j]
        cost = 2 * options * (error @ g) + options.square() * (g @ g)
        e = torch.where(cost[1] < cost[0], options[1], options[0])
        found[:, j] = exact[:, j] + e
        error += e[:, None] * g
    return found


METHODS: dict[str, Round] = {
    "nearest": nearest,
    "stochastic": stochastic,
    "error diffusion": lambda exact, A, C: fed_back(exact, exact.new_ones(1, exact.shape[1])),
    "adapter's rows": lambda exact, A, C: fed_back(
        exact, torch.linalg.svd(A, full_matrices=False)[2]
    ),
    "inputs": lambda exact, A, C: rounded_for_inputs(exact.float(), C, torch.bfloat16).double(),
}


def train(folder: Path, steps: int) -> None:
    words = ["--model", "embedded", "--data.train", "embedded:intents", "--output", str(folder)]
    options = ["--target_modules", "all-linear", "--max_steps", str(steps)]
    command = [sys.executable, "-m", "lowrank.cli", "train", *words, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowrank-rounding-") as name:
        adapter = Path(name) / "adapter"
        train(adapter, args.steps)
        base = str(model_path())
        covariances = input_covariances(
            base, adapter, examples(["embedded:intents"], str(adapter), base, "train")
        )
        layers = read_layers(read_adapter(adapter)).layers
        model = PeftModel.from_pretrained(
            load_model(base, "CAUSAL_LM", dtype=torch.float32).model, str(adapter)
        ).eval()
        places = adapted(model, "default")
        held_out = Covariances(places, False)
        with torch.no_grad(), watching(places, held_out.see):
            for row in examples(["embedded:intents"], str(adapter), base, "test"):
                model(input_ids=torch.as_tensor(row["input_ids"])[None])

    totals = {name: [0.0, 0.0] for name in METHODS}
    change = [0.0, 0.0]
    for path, layer in layers.items():
        W = places[PREFIX + path].module.weight.detach().bfloat16().double()
        A, B = layer.A.double(), layer.B.double()
        delta = layer.scaling * B @ A
        C = held_out.mean_of(PREFIX + path).double()

        def squares(E: Tensor, C: Tensor = C) -> tuple[float, float]:
            return E.square().sum().item(), ((E @ C) * E).sum().item()

        change = [a + b for a, b in zip(change, squares(delta), strict=True)]
        for name, method in METHODS.items():
            E = method(W + delta, A, covariances[path]) - (W + delta)
            totals[name] = [a + b for a, b in zip(totals[name], squares(E), strict=True)]
    shares = {
        name: {
            "entries": (total[0] / change[0]) ** 0.5,
            "outputs": (total[1] / change[1]) ** 0.5,
        }
        for name, total in totals.items()
    }
    print(
        f"torch {torch.__version__}, {platform.machine()}, {len(layers)} layers, {args.steps} steps"
    )
    print("  rounding to bfloat16 costs       entries   outputs   of the adapter's change")
    for name, share in shares.items():
        print(f"  {name:30} {share['entries']:9.1%} {share['outputs']:9.1%}")
    if args.output:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        result = {"shares": shares, "steps": args.steps, "commit": commit.stdout.strip()}
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
