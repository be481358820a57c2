"""What does a base in 8 or 4 bits cost and save: LoRA on it beside LoRA in 32 and 16 bits, lowrank beside PEFT?

1. Fine-tuning. The embedded model, with an adapter of rank 8 on all linear layers, learns its 800 rows of intents
   on a base in each format: by lowrank with its own holder, and by PEFT with bitsandbytes'. One start, order of
   rows, loop and evaluation for both, each run in a fresh process with one thread: exact match and loss on 160 test rows, bytes of
   the base's weights, peak memory above what the imports hold, time of a step.
2. Loading. A checkpoint with random numbers in the shape of TinyLlama-1.1B (bfloat16, four files), loaded in each
   format in a fresh process: bytes of weights, seconds, and the peak of memory above the imports. What counts is
   anonymous memory, sampled every 2 ms: pages of the mapped files are the system's to take back.

    python benchmarks/quantised.py                      # both: an hour on one busy core
    python benchmarks/quantised.py --only load --layers 2
    python benchmarks/quantised.py --only train --seeds 1 --epochs 1
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

R, ALPHA, LR, BATCH = 8, 64, 1e-3, 8
# dtype: of what is not quantised, embeddings above all, and of the products
FORMATS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "format": "int8"},
    "nf4": {"dtype": "bfloat16", "format": "nf4", "double": False},
    "nf4 + double": {"dtype": "bfloat16", "format": "nf4", "double": True},
}
# who trains, and who holds the weights where they are quantised
WAYS = [("lowrank", "lowrank"), ("PEFT", "bitsandbytes")]


# --- in a process of its own ----------------------------------------------------------------------


def anonymous() -> int:
    """Bytes of memory that is this process' alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The largest `anonymous()` inside the block, above what there was before it."""

    def __enter__(self) -> "Peak":
        self.before = self.most = anonymous()
        self.running = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while self.running:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.bytes = self.most - self.before


def load(folder: str, format: str, backend: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from lowrank.quantised_loading import quantisation_for, transformers_config

    told = FORMATS[format]
    dtype = getattr(torch, told["dtype"])
    options = {}
    if "format" in told:
        found = quantisation_for(told["format"], backend, told.get("double", False))
        options["quantization_config"] = transformers_config(found, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def import_all() -> None:
    """What any of the runs imports, and torch's own start: no part of what is measured."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    import lowrank.peft
    import lowrank.quantizer  # noqa: F401

    torch.ones(64, 64) @ torch.ones(64, 64)


def load_once(folder: str, format: str, backend: str) -> dict[str, Any]:
    from lowrank.model_size import held_bytes

    import_all()
    start = time.perf_counter()
    with Peak() as peak:
        model = load(folder, format, backend)
    return {
        "seconds": time.perf_counter() - start,
        "weights": held_bytes(model),
        "peak": peak.bytes,
    }


def train_once(
    library: str, format: str, backend: str, seed: int, epochs: int, rows: int
) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from lowrank.embedded import dataset_path, model_path
    from lowrank.model_size import held_bytes
    from lowrank.train.data.encode import encode, pad_id, pad_right
    from lowrank.train.data.rows import read_rows
    from lowrank.train.evaluate import evaluate

    if library == "PEFT":
        from peft import LoraConfig, get_peft_model
    else:
        from lowrank import LoraConfig, get_peft_model
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    collate = pad_right(pad_id(tokenizer))
    data = {
        split: encode(read_rows([dataset_path("intents", split)]), tokenizer, max_length=128)
        for split in ("train", "test")
    }
    examples = data["train"].examples[:rows]
    longest = max(examples, key=lambda example: len(example["input_ids"]))
    import_all()
    with Peak() as peak:
        base = load(str(model_path()), format, backend)
        weights = held_bytes(base)
        config = LoraConfig(
            r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, config).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.manual_seed(seed)  # the libraries draw in another order: the same start for both
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and parameter.abs().max() > 0:  # A; B is zero
                torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
        optimiser = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
        steps = epochs * (len(examples) // BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min(1.0, (step + 1) / 15) * (1 - step / steps)
        )
        seconds = []
        for _ in range(epochs):
            order = torch.randperm(len(examples)).tolist()
            for i in range(0, len(order) - BATCH + 1, BATCH):
                start = time.perf_counter()
                chosen = [examples[j] for j in order[i : i + BATCH]]
                # all of one length: oneDNN keeps what it made for each shape, megabytes of it
                batch = {key: rows[:-1] for key, rows in collate([*chosen, longest]).items()}
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                schedule.step()
                optimiser.zero_grad(set_to_none=True)
                seconds.append(time.perf_counter() - start)
    found = evaluate(model.eval(), tokenizer, data["test"], generate=160, max_new_tokens=16)
    return {
        "exact": found.scores["exact_match"],
        "loss": found.scores["loss"],
        "weights": weights,
        "peak": peak.bytes,
        "step": statistics.median(seconds),
    }


# --- the runs, one after the other ----------------------------------------------------------------


def in_a_process(what: str, *words: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--once", what, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def ways(format: str, libraries: bool) -> list[tuple[str, str]]:
    """(library, back end) for a format; the library is nothing to do with loading."""
    if "format" not in FORMATS[format]:
        return [("lowrank", "–"), ("PEFT", "–")] if libraries else [("", "–")]
    return WAYS if libraries else [("", "lowrank"), ("", "bitsandbytes")]


def train_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    print(
        f"{'base':14}{'trained by':>11}{'held by':>14}{'exact match':>22}{'test loss':>22}", end=""
    )
    print(f"{'weights, MB':>13}{'peak, MB':>10}{'step, ms':>10}")
    found = []
    for format in args.formats:
        for library, backend in ways(format, libraries=True):
            runs = [
                in_a_process("train", library, format, backend, seed, args.epochs, args.rows)
                for seed in range(args.seeds)
            ]
            exact = spread([100 * run["exact"] for run in runs], ".1f")
            loss = spread([run["loss"] for run in runs], ".3f")
            weights, peak, step = (
                statistics.median(run[key] for run in runs) for key in ("weights", "peak", "step")
            )
            print(f"{format:14}{library:>11}{backend:>14}{exact:>22}{loss:>22}", end="")
            print(f"{weights / 1e6:13.2f}{peak / 1e6:10.0f}{1e3 * step:10.1f}", flush=True)
            found.append({"format": format, "library": library, "backend": backend, "runs": runs})
    return found


def load_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    from merge import write_base

    found = []
    with tempfile.TemporaryDirectory(prefix="lowrank-quantised-", dir=args.folder) as name:
        folder = Path(name) / "base"
        params = write_base(folder, args.layers, shards=4)
        print(f"\n{params / 1e9:.2f}B parameters in bfloat16 on disk")
        print(f"{'base':14}{'held by':>14}{'weights, MB':>13}{'peak, MB':>10}{'seconds':>9}")
        for format in args.formats:
            for _, backend in ways(format, libraries=False):
                run = in_a_process("load", folder, format, backend)
                print(f"{format:14}{backend:>14}{run['weights'] / 1e6:13,.0f}", end="")
                print(f"{run['peak'] / 1e6:10,.0f}{run['seconds']:9.1f}", flush=True)
                found.append({"format": format, "backend": backend, **run})
    return found


def spread(values: list[float], form: str) -> str:
    median = f"{statistics.median(values):{form}}"
    return median if len(values) == 1 else f"{median} ({min(values):{form}}–{max(values):{form}})"


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=("train", "load"))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--layers", type=int, default=22, help="of the model that is loaded")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()

    import bitsandbytes
    import peft
    import torch
    import transformers

    import lowrank

    print(
        f"{platform.machine()}, 1 thread; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"bitsandbytes {bitsandbytes.__version__}, PEFT {peft.__version__}, lowrank {lowrank.__version__}, "
        f"commit {commit()}\nr={R}, lora_alpha={ALPHA}, all linear layers, lr {LR}, batches of {BATCH}, "
        f"{args.epochs} epochs, {args.seeds} seeds: median (least–most)\n"
    )
    trained = train_all(args) if args.only != "load" else []
    loaded = load_all(args) if args.only != "train" else []
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        found = {"settings": settings, "commit": commit(), "train": trained, "load": loaded}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


ONCE = {"train": train_once, "load": load_once}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        what, *words = sys.argv[2:]
        numbers = [int(word) if word.isdigit() else word for word in words]
        print(json.dumps(ONCE[what](*numbers)))
    else:
        main()
