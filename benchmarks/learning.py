"""Which rank, which alpha, which layers, how many epochs, how large a batch, LoRA or full fine-tuning?

Each question is a row of runs that differ in one thing, on the embedded model and its intents: 800 rows, the loss
and the exact matches on 160 others, and the loss on text like that which the base was pretrained on, which shows what
was forgotten. Every run has the same loop (AdamW, 3% warmup, then a cosine; gradients clipped to 1). A learning
rate is never carried over from one setting to another: each setting is run at every rate of a grid, and compared at the
one with the lowest median loss on the held-out rows; a best rate at the edge of its grid is marked.

    python benchmarks/learning.py --json learning.json      # every run is kept there: a broken-off one goes on
    python benchmarks/learning.py --json learning.json --only rank --plot ranks.png
    python benchmarks/learning.py --model DIR --train a.jsonl --test b.jsonl --keep c.jsonl --dtype bfloat16
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import lowrank
from lowrank.embedded import BASE_SKILL, dataset_path, model_path
from lowrank.train.data.encode import encode, pad_id, pad_right
from lowrank.train.data.rows import read_rows
from lowrank.train.evaluate import evaluate, mean_loss

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LAYERS = {"all": ATTENTION + MLP, "attention": ATTENTION, "MLP": MLP}
RATES = ("1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2")
FULL_RATES = ("1e-4", "2e-4", "4e-4", "8e-4", "1.6e-3")


class Run(NamedTuple):
    """One training run; r = 0: every weight is trained."""

    r: int = 16
    scaling: float = 2.0  # lora_alpha / r
    layers: str = "all"
    batch: int = 16
    epochs: int = 2
    lr: str = "2e-3"
    seed: int = 0

    @property
    def name(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self._asdict().items())


def rates(run: Run, grid: tuple[str, ...] = ()) -> list[Run]:
    return [run._replace(lr=lr) for lr in grid or (RATES if run.r else FULL_RATES)]


FULL = Run(r=0)
# question -> {setting: its runs, one for each learning rate}
QUESTIONS: dict[str, dict[str, list[Run]]] = {
    "rank": {
        "full": rates(FULL),
        "r=1": rates(Run(r=1), (*RATES, "3.2e-2")),
        **{f"r={r}": rates(Run(r=r)) for r in (4, 16, 64)},
        "r=256": rates(Run(r=256), ("2.5e-4", "5e-4", *RATES)),
    },
    # the same with one alpha for all ranks, so that the scaling falls as the rank rises
    "rank, alpha=32": {f"r={r}": rates(Run(r=r, scaling=32 / r)) for r in (1, 4, 16, 64, 256)},
    "alpha": {
        "alpha=r/2": rates(Run(scaling=0.5), ("4e-3", "8e-3", "1.6e-2", "3.2e-2")),
        "alpha=2·r": rates(Run()),
        "alpha=8·r": rates(Run(scaling=8), ("5e-4", "1e-3", "2e-3", "4e-3")),
    },
    "layers": {
        "all, r=16": rates(Run()),
        "attention, r=16": rates(Run(layers="attention")),
        "MLP, r=16": rates(Run(layers="MLP")),
        # as many trained parameters as all layers have at r=16, or nearly
        "attention, r=48": rates(Run(layers="attention", r=48)),
        "MLP, r=24": rates(Run(layers="MLP", r=24)),
    },
    "batch": {
        f"{'LoRA' if r else 'full'}, batch {batch}": rates(Run(r=r, batch=batch))
        for r in (16, 0)
        for batch in (4, 16, 64)
    },
    "epochs": {
        "LoRA r=16": rates(Run(epochs=8), ("5e-4", "1e-3", "2e-3", "4e-3")),
        "full": rates(FULL._replace(epochs=8), ("1e-4", "2e-4", "4e-4")),
    },
}


class Bench:
    """The data, and what is done with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.pad = pad_id(self.tokenizer)
        self.collate = pad_right(self.pad)
        self.train = self.read(args.train)
        self.test = self.read(args.test)
        self.keep = self.read(args.keep, loss_on="all")

    def read(self, path: str, **options: Any) -> Any:
        return encode(read_rows([path]), self.tokenizer, max_length=self.args.max_length, **options)

    def base(self) -> nn.Module:
        dtype = getattr(torch, self.args.dtype)
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=dtype).to(
            self.args.device
        )

    def batches(self, run: Run) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of one epoch after the other, as many in each."""
        order = torch.Generator().manual_seed(run.seed)
        examples = self.train.examples
        for _ in range(run.epochs):
            rows = torch.randperm(len(examples), generator=order).tolist()
            for i in range(0, len(rows) - run.batch + 1, run.batch):
                batch = self.collate([examples[j] for j in rows[i : i + run.batch]])
                yield {name: values.to(self.args.device) for name, values in batch.items()}

    def measured(self, model: nn.Module, generate: bool) -> dict[str, float]:
        found = {"loss": mean_loss(model, self.test.examples, self.pad, 32)[0]}
        found["keep"] = mean_loss(model, self.keep.examples, self.pad, 32)[0]
        if generate:
            answered = evaluate(
                model,
                self.tokenizer,
                self.test,
                batch_size=32,
                generate=len(self.test.rows),
                max_new_tokens=self.args.max_new_tokens,
            )
            found["exact"] = answered.scores["exact_match"]
        return found

    def run(self, run: Run) -> dict[str, Any]:
        """What is measured after each epoch; exact matches after the last."""
        torch.manual_seed(run.seed)
        model: Any = self.base()
        if run.r:
            config = lowrank.LoraConfig(
                r=run.r,
                lora_alpha=run.scaling * run.r,
                target_modules=LAYERS[run.layers],
                task_type="CAUSAL_LM",
            )
            model = lowrank.get_peft_model(model, config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        steps_an_epoch = len(self.train.examples) // run.batch
        steps = run.epochs * steps_an_epoch
        warmup = max(1, round(0.03 * steps))
        optimiser = torch.optim.AdamW(parameters, lr=float(run.lr), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimiser,
            [
                torch.optim.lr_scheduler.LinearLR(optimiser, 1 / warmup, 1.0, warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps),
            ],
            [warmup],
        )
        epochs, train_loss = [], 0.0
        model.train()
        for step, batch in enumerate(self.batches(run), start=1):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            train_loss += float(loss.detach())
            if step % steps_an_epoch == 0:
                found = self.measured(model, generate=step == steps)
                epochs.append({**found, "train": train_loss / steps_an_epoch})
                train_loss = 0.0
        return {"epochs": epochs, "parameters": sum(p.numel() for p in parameters)}


# --- what is shown --------------------------------------------------------------------------------


class Best(NamedTuple):
    lr: str
    edge: bool  # the lowest or the highest rate of the grid
    runs: list[dict[str, Any]]  # one a seed, at that rate

    def median(self, what: str, epoch: int = -1) -> float:
        return statistics.median(run["epochs"][epoch][what] for run in self.runs)

    def spread(self, what: str) -> str:
        values = [run["epochs"][-1][what] for run in self.runs]
        return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def best(done: dict[str, Any], runs: list[Run], seeds: int) -> Best:
    by_rate = {
        run.lr: [done[run._replace(seed=seed).name] for seed in range(seeds)] for run in runs
    }

    def loss(lr: str) -> float:
        found = statistics.median(run["epochs"][-1]["loss"] for run in by_rate[lr])
        return found if found == found else float("inf")

    lr = min(by_rate, key=loss)
    return Best(lr, lr in (runs[0].lr, runs[-1].lr), by_rate[lr])


def show(question: str, found: dict[str, Best]) -> None:
    print(
        f"\n{question:18}{'parameters':>12}{'best lr':>9}{'held-out loss':>24}{'exact match':>24}{'base text':>24}"
    )
    for setting, row in found.items():
        print(
            f"{setting:18}{row.runs[0]['parameters']:12,}{row.lr + '*' * row.edge:>9}"
            + "".join(f"{row.spread(what):>24}" for what in ("loss", "exact", "keep"))
        )
    if question == "epochs":
        for setting, row in found.items():
            for what, words in (
                ("train", "training loss"),
                ("loss", "held-out loss"),
                ("keep", "base text"),
            ):
                curve = (row.median(what, epoch) for epoch in range(len(row.runs[0]["epochs"])))
                print(f"  {setting:10} {words:14} " + " ".join(f"{value:.3f}" for value in curve))


def plot(path: Path, done: dict[str, Any], seeds: int) -> None:
    """Held-out loss over the learning rate, for each rank and for full fine-tuning; loss over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = plt.get_cmap("viridis")
    settings = QUESTIONS["rank"]
    for i, (setting, runs) in enumerate(settings.items()):
        losses = [best(done, [run], seeds).median("loss") for run in runs]
        full = setting == "full"
        left.plot(
            [float(run.lr) for run in runs],
            losses,
            "--o" if full else "-o",
            color="black" if full else colours(i / len(settings)),
            label="full fine-tuning" if full else f"LoRA, {setting}",
            lw=1.4,
            ms=4,
        )
    left.set_xscale("log")
    left.set_xlabel("learning rate")
    left.set_ylabel("held-out loss after 2 epochs")
    for setting, runs in QUESTIONS["epochs"].items():
        row = best(done, runs, seeds)
        colour = "black" if setting == "full" else colours(0.5)
        count = range(1, len(row.runs[0]["epochs"]) + 1)
        for what, style, words in (("loss", "-o", "held-out rows"), ("keep", ":", "base text")):
            values = [row.median(what, epoch - 1) for epoch in count]
            right.plot(
                count, values, style, color=colour, label=f"{setting}: {words}", lw=1.4, ms=4
            )
    right.set_xlabel("epoch")
    right.set_ylabel("loss")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left" if axes is left else (0.55, 0.42))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(model_path()))
    parser.add_argument("--train", default=str(dataset_path("intents", "train")))
    parser.add_argument("--test", default=str(dataset_path("intents", "test")))
    parser.add_argument("--keep", default=str(BASE_SKILL), help="text that the base knows")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--json", type=Path, help="every run is kept here, and not run twice")
    parser.add_argument("--plot", type=Path, help="draw ranks and epochs into this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    bench = Bench(args)
    told = {key: str(getattr(args, key)) for key in ("model", "train", "test", "keep", "dtype")}
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    if kept and kept["settings"] != told:
        raise SystemExit(f"{args.json} has runs of other settings: {kept['settings']}")
    done: dict[str, Any] = kept.get("runs", {})
    wanted = {
        run._replace(seed=seed).name: run._replace(seed=seed)
        for seed in range(args.seeds)
        for question in args.only
        for runs in QUESTIONS[question].values()
        for run in runs
    }
    before = bench.measured(bench.base(), generate=True)
    for i, (name, run) in enumerate(wanted.items(), start=1):
        if name in done:
            continue
        begun = time.perf_counter()
        done[name] = bench.run(run)
        last = done[name]["epochs"][-1]
        print(
            f"{i}/{len(wanted)} {name}: {last['loss']:.3f} {last['exact']:.1%}, {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        if args.json:
            text = {"settings": told, "commit": commit(), "before": before, "runs": done}
            args.json.write_text(json.dumps(text, indent=1) + "\n")
    print(
        f"\n{platform.machine()}, {args.device}; torch {torch.__version__}, lowrank {lowrank.__version__}, commit "
        f"{commit()}; {len(bench.train.rows)} rows, {args.seeds} seeds: median (least–most); * the edge of the grid"
    )
    print(
        f"the base: held-out loss {before['loss']:.3f}, exact match {before['exact']:.1%}, base text {before['keep']:.3f}"
    )
    for question in args.only:
        show(
            question,
            {
                setting: best(done, runs, args.seeds)
                for setting, runs in QUESTIONS[question].items()
            },
        )
    if args.plot:
        plot(args.plot, done, args.seeds)


if __name__ == "__main__":
    main()
