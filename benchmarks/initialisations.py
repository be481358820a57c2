"""Does each initialisation do what its paper says it is for, on the model in this package?

Three questions, on all linear layers of the embedded model and its intents task:

1. What does an adapter start with? By the mean over the layers: the share of ‖W‖² in the start (PiSSA wants it
   large), the share of ‖W·X‖² (CorDA: large for "ipm", small for "kpm"), the share of the inputs' variance in the
   rows of A (EVA), and the cosine between the first step of gradient descent and the full gradient (LoRA-GA).
2. How far is it after some steps? Training loss in steps 6 to 10; at the end loss on held-out rows of the task,
   and on text like that which the base was trained on. For several seeds; every learning rate of `--lr` is run,
   and the one with the best median loss on the held-out rows is shown.
3. What is left of W when the base is rounded to NF4? ‖W − what stands for it‖, and the base's own loss, for plain
   rounding, for LoftQ, and for PiSSA with its residual rounded.

    python benchmarks/initialisations.py                   # 14 minutes on two busy cores
    python benchmarks/initialisations.py --seeds 1 --steps 20 --lr 1e-3
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import lowrank
from lowrank.calibration.observe import planned, watching
from lowrank.embedded import BASE_SKILL, dataset_path, model_path
from lowrank.init import init_named
from lowrank.kernels.quantisation import rounded
from lowrank.train.data.encode import encode, pad_id, pad_right
from lowrank.train.data.rows import read_rows
from lowrank.train.evaluate import mean_loss
from lowrank.wrappers import lora_layers

R, ALPHA, BATCH = 8, 16, 8
NAMES: dict[str, dict[str, Any]] = {
    "True": {"init_lora_weights": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "corda ipm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
    "corda kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "lora_ga": {"init_lora_weights": "lora_ga"},
}
COLUMNS = ("weight", "outputs", "inputs", "gradient")


class Data:
    """The task's rows and the base's own text, encoded; and batches of them."""

    def __init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_path())
        self.pad = pad_id(tokenizer)
        self.collate = pad_right(self.pad)
        rows = {part: read_rows([dataset_path("intents", part)]) for part in ("train", "test")}
        self.train = encode(rows["train"], tokenizer, max_length=128).examples
        self.test = encode(rows["test"], tokenizer, max_length=128).examples
        text = encode(read_rows([BASE_SKILL]), tokenizer, max_length=128, loss_on="all").examples
        self.base, self.to_keep = text[:60], text[60:92]

    def batches(self, n: int, seed: int) -> list[dict[str, Tensor]]:
        order = torch.randperm(
            len(self.train), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        chosen = [order[i * BATCH : (i + 1) * BATCH] for i in range(n)]
        return [self.collate([self.train[i] for i in batch]) for batch in chosen]

    def losses(self, model: nn.Module) -> tuple[float, float]:
        """On the task's held-out rows, and on the base's own text."""
        return (
            mean_loss(model, self.test, self.pad, 32)[0],
            mean_loss(model, self.base, self.pad, 32)[0],
        )


def build_base() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


def build(name: str, data: Data, seed: int) -> nn.Module:
    """The model with a fresh adapter; what starts from data gets four batches of the task.

    "kpm" gets as many of the base's own text, which is what it is to keep.
    """
    torch.manual_seed(seed)
    model = build_base()
    config = lowrank.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **NAMES[name]
    )
    batches = data.batches(4, seed=1000 + seed)
    if name == "corda kpm":
        batches = [data.collate(data.to_keep[i : i + BATCH]) for i in range(0, 32, BATCH)]
    if name.startswith("corda"):
        lowrank.preprocess_corda(model, config, lambda: [model(**_unpadded(b)) for b in batches])
    elif name == "lora_ga":
        lowrank.preprocess_loraga(
            model, config, lambda: [model(**b).loss.backward() for b in batches]
        )
    model = lowrank.get_peft_model(model, config)
    if name == "eva":
        lowrank.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def _unpadded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """As long as its shortest row: CorDA counts every position."""
    n = int(batch["attention_mask"].sum(1).min())
    return {"input_ids": batch["input_ids"][:, :n]}


# --- 1: what an adapter starts with ---------------------------------------------------------------


def inputs_and_gradients(data: Data) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By layer, all inputs at positions that count and the gradient of W, on batches that no start has seen."""
    model = build_base()
    config = lowrank.LoraConfig(target_modules="all-linear")
    places = planned(model, config)
    rows: dict[str, list[Tensor]] = {path: [] for path in places}
    for batch in data.batches(4, seed=99):
        mask = batch["attention_mask"].bool()
        with watching(places, lambda path, x, mask=mask: rows[path].append(x[0][mask])):
            model(**batch).loss.backward()
    gradients = {path: place.module.weight.grad for path, place in places.items()}
    return {path: torch.cat(found).detach() for path, found in rows.items()}, gradients


def start_of(model: nn.Module, X: dict[str, Tensor], G: dict[str, Tensor]) -> dict[str, float]:
    """The mean over the layers of `COLUMNS`."""
    found: dict[str, list[float]] = {column: [] for column in COLUMNS}
    for path, layer in lora_layers(model):
        place = path.removeprefix("base_model.model.")
        W, x, g = layer.base_layer.weight.detach(), X[place], G[place]
        A, B = (
            layer.adapter_parameters("default")[f"lora_{f}.default.weight"].detach() for f in "AB"
        )
        start = layer.scaling["default"] * B @ A
        found["weight"].append(float(start.square().sum() / W.square().sum()))
        found["outputs"].append(float((x @ start.T).square().sum() / (x @ W.T).square().sum()))
        centred = x - x.mean(0)
        Q = torch.linalg.qr(A.T).Q
        found["inputs"].append(float((centred @ Q).square().sum() / centred.square().sum()))
        step = B @ (B.T @ g) + (g @ A.T) @ A  # of ΔW, at first order
        found["gradient"].append(float((step * g).sum() / step.norm() / g.norm()))
    return {column: statistics.fmean(values) for column, values in found.items()}


# --- 2: some steps --------------------------------------------------------------------------------


def train(name: str, data: Data, seed: int, lr: float, steps: int) -> dict[str, list[float]]:
    """Loss of each step, and at the end on held-out rows and on the base's own text."""
    model = build(name, data, seed).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    curve = []
    for batch in data.batches(steps, seed):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        curve.append(float(loss.detach()))
    task, base = data.losses(model)
    return {"curve": curve, "task": [task], "base": [base]}


def best(runs: dict[str, list[dict]]) -> str:
    """The learning rate with the smallest median loss on held-out rows."""
    return min(runs, key=lambda lr: statistics.median(run["task"][0] for run in runs[lr]))


# --- 3: a base in four bits -----------------------------------------------------------------------


def quantised(data: Data) -> dict[str, dict[str, float]]:
    """By way of standing for W in NF4: the relative error, over that of plain rounding, and the base's loss."""
    scaling = ALPHA / R

    def plain(W: Tensor) -> Tensor:
        return rounded(W, 4)

    def loftq(iterations: int) -> Any:
        def stands_for(W: Tensor) -> Tensor:
            start = lowrank.init.weight.loftq(
                lambda: W, tuple(W.shape), R, scaling, iterations=iterations
            )
            return start.base + scaling * start.B @ start.A

        return stands_for

    def pissa(W: Tensor) -> Tensor:
        start = init_named("pissa")(lambda: W, tuple(W.shape), R, scaling)
        taken = scaling * start.B @ start.A
        return rounded(W - taken, 4) + taken

    ways = {
        "W itself": lambda W: W,
        "NF4": plain,
        "NF4 + LoftQ, 1 turn": loftq(1),
        "NF4 + LoftQ, 5 turns": loftq(5),
        "NF4 of PiSSA's residual": pissa,
    }
    found = {}
    for way, stands_for in ways.items():
        model = build_base()
        errors = []
        with torch.no_grad():
            for place in planned(model, lowrank.LoraConfig(target_modules="all-linear")).values():
                W = place.module.weight.clone()
                place.module.weight.copy_(stands_for(W))
                lost = (W - place.module.weight).norm()
                errors.append(float(lost / (W - rounded(W, 4)).norm()))
        task, base = data.losses(model)
        found[way] = {"error": statistics.fmean(errors), "task": task, "base": base}
    return found


# --- what is shown --------------------------------------------------------------------------------


def plot(path: Path, results: dict[str, dict], window: int = 5) -> None:
    """The median training loss over the seeds, smoothed, at each start's best learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours = plt.get_cmap("tab10")
    for i, (name, found) in enumerate(results.items()):
        curves = torch.tensor([run["curve"] for run in found["runs"][found["lr"]]])
        median = curves.median(0).values
        smooth = median.unfold(0, window, 1).mean(1)
        steps = range(window, len(median) + 1)
        axes.plot(steps, smooth, label=f"{name} (lr {found['lr']})", color=colours(i), lw=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, median of seeds, mean of {window} steps")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", nargs="+", default=["5e-4", "2e-3"])
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--plot", type=Path, help="draw the losses into this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    begun = time.perf_counter()
    data = Data()
    print(
        f"{platform.machine()}, 1 thread; torch {torch.__version__}, lowrank {lowrank.__version__}, commit {commit()}; "
        f"r={R}, lora_alpha={ALPHA}, all linear layers, batches of {BATCH}\n"
    )
    X, G = inputs_and_gradients(data)
    starts = {name: start_of(build(name, data, 0), X, G) for name in args.only}
    print(f"{'start':12}{'of ‖W‖²':>10}{'of ‖WX‖²':>10}{'of inputs':>11}{'cos(step, G)':>14}")
    for name, found in starts.items():
        print(
            f"{name:12}{found['weight']:10.3f}{found['outputs']:10.3f}{found['inputs']:11.3f}{found['gradient']:14.3f}"
        )

    results: dict[str, dict] = {}
    before = data.losses(build_base())
    print(
        f"\n{'start':12}{'best lr':>9}{'steps 6 to 10':>24}{'task, held out':>24}{'base text':>24}"
    )
    print(f"{'(the base)':12}{'':>9}{'':24}{before[0]:24.3f}{before[1]:24.3f}")
    for name in args.only:
        runs = {
            lr: [train(name, data, seed, float(lr), args.steps) for seed in range(args.seeds)]
            for lr in args.lr
        }
        lr = best(runs)
        results[name] = {"lr": lr, "runs": runs, "start": starts[name]}
        task, base = ([run[what][0] for run in runs[lr]] for what in ("task", "base"))
        early = [statistics.fmean(run["curve"][5:10]) for run in runs[lr]]
        print(
            f"{name:12}{lr:>9}{spread(early):>24}{spread(task):>24}{spread(base):>24}", flush=True
        )

    rounding = quantised(data)
    print(f"\n{'stands for W':25}{'error / NF4’s':>14}{'task':>9}{'base text':>11}")
    for way, found in rounding.items():
        print(f"{way:25}{found['error']:14.3f}{found['task']:9.3f}{found['base']:11.3f}")
    seconds = time.perf_counter() - begun
    print(f"\n{args.steps} steps, {args.seeds} seeds: median (least–most); {seconds:.0f} s in all")
    if args.plot:
        plot(args.plot, results)
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items()}
        found = {"settings": settings, "commit": commit(), "seconds": seconds, "before": before}
        found |= {"starts": results, "quantised": rounding}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
