"""How long does it take to merge an adapter into a model of 1B parameters on disk, beside copying the model?

A checkpoint with random numbers in the shape of TinyLlama-1.1B (bfloat16, in shards) and an adapter of rank 16
on all linear layers are written to a temporary folder, without building the model. Then, in turns: copying the
base's files (shutil.copyfile, one after the other), and `lowrank.merge.merge_to_folder` (into a folder that does
not exist, without the imports, which the first merge has made). What both write is removed each time, and the
base stays in the page cache. On a shared machine the fastest of each says what the work costs, the medians what the
neighbours left. The memory is that of a fresh process that merges once: its peak (VmHWM), and what
is left without what it held after the imports. Before anything is timed, sampled rows of a merged layer are
compared with float64.

    python benchmarks/merge.py                      # 2.2 GB three times on disk, one to two minutes
    python benchmarks/merge.py --layers 2           # a small one
    python benchmarks/merge.py --peft               # beside PEFT: load, merge_and_unload, save_pretrained
"""

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowrank import Adapter, LoraConfig, write_adapter
from lowrank.merge import merge_to_folder

HIDDEN, INNER, VOCABULARY, HEADS, KEYS = 2048, 5632, 32000, 32, 4
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KEYS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KEYS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
# one process each: what the imports hold, then what merging once (argv: base, adapter, out) adds
OURS = """
from lowrank.merge import merge_to_folder
import transformers, transformers.modeling_utils, transformers.models.llama.modeling_llama
run = lambda base, adapter, out: merge_to_folder(base, adapter, out)
"""
PEFT = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
def run(base, adapter, out):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
MEASURE = """
import json, sys, time
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
before = status("VmRSS")
start = time.perf_counter()
run(*sys.argv[1:])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "imports": before, "peak": status("VmHWM")}))
"""


def write_base(folder: Path, layers: int, shards: int) -> int:
    """Random weights under Llama's names; the number of parameters."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LINEAR.items()}
        shapes |= {f"model.layers.{i}.{name}.weight": (HIDDEN,) for name in norms}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    random = torch.Generator().manual_seed(0)
    names = list(shapes)
    places = {name: min(i * shards // len(names), shards - 1) for i, name in enumerate(names)}
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for name in (n for n in names if places[n] == shard):
            # as trained ones are: about 0.02 each
            tensors[name] = (torch.randn(shapes[name], generator=random) * 0.02).bfloat16()
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def write_lora(folder: Path, layers: int, r: int) -> None:
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(layers):
        for name, (out, in_) in LINEAR.items():
            key = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(r, in_, generator=random) / in_**0.5
            # a ΔW whose entries are a few hundredths of W's
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, r, generator=random) * 0.005
    names = sorted(name.rpartition(".")[2] for name in LINEAR)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=names, task_type="CAUSAL_LM")
    write_adapter(folder, Adapter(config, tensors, {}))


def check(base: Path, adapter: Path, out: Path, r: int) -> None:
    """Raises unless some rows of a merged layer are what float64 says, rounded once."""
    path = "model.layers.1.mlp.down_proj"
    rows = slice(100, 140)

    def read(folder: Path, name: str) -> torch.Tensor:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118
                    return opened.get_tensor(name)
        raise SystemExit(f"{folder} lacks {name}")

    A = read(adapter, f"base_model.model.{path}.lora_A.weight").double()
    B = read(adapter, f"base_model.model.{path}.lora_B.weight").double()
    exact = read(base, f"{path}.weight")[rows].double() + 2.0 * B[rows] @ A
    wrong = (read(out, f"{path}.weight")[rows] != exact.bfloat16()).float().mean().item()
    if wrong > 1e-3:  # float32's sum falls on the other side of a tie once in some ten thousand
        raise SystemExit(f"{wrong:.2%} of the merged weights are wrong: nothing is timed")


class Took(NamedTuple):
    seconds: float
    cpu: float  # seconds of all threads together


def timed(run, out: Path) -> Took:
    os.sync()  # what earlier runs left for the disk is not written during this one
    start, cpu = time.perf_counter(), time.process_time()
    run()
    took = Took(time.perf_counter() - start, time.process_time() - cpu)
    shutil.rmtree(out)
    return took


def medians(all_took: list[Took]) -> Took:
    return Took(*(statistics.median(values) for values in zip(*all_took, strict=True)))


def copy(base: Path, out: Path) -> None:
    out.mkdir()
    for file in sorted(base.iterdir()):
        shutil.copyfile(file, out / file.name)


def in_a_process(code: str, *folders: Path) -> dict[str, float]:
    """{"seconds", "imports", "peak"} of merging once in a fresh process; bytes."""
    command = [sys.executable, "-c", code + MEASURE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy())
    shutil.rmtree(folders[-1], ignore_errors=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peft", action="store_true", help="also PEFT's way, in a process")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()

    logging.getLogger("lowrank").setLevel(logging.ERROR)  # the adapter has no fingerprint
    with tempfile.TemporaryDirectory(prefix="lowrank-merge-", dir=args.folder) as name:
        base, adapter, out = (Path(name) / part for part in ("base", "adapter", "out"))
        params = write_base(base, args.layers, args.shards)
        write_lora(adapter, args.layers, args.r)
        size = sum(file.stat().st_size for file in base.iterdir())
        written = merge_to_folder(base, adapter, out)
        if written.built:
            raise SystemExit(f"the model was loaded: {written.built}")
        check(base, adapter, out, args.r)
        shutil.rmtree(out)
        copies, merges = [], []
        for _ in range(args.repeats):
            copies.append(timed(lambda: copy(base, out), out))
            merges.append(timed(lambda: merge_to_folder(base, adapter, out), out))
        ours = in_a_process(OURS, base, adapter, out)
        peft = in_a_process(PEFT, base, adapter, out) if args.peft else None

    copied, merged = medians(copies), medians(merges)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    result = {
        "parameters": params,
        "bytes": size,
        "r": args.r,
        "copy_seconds": copies,
        "merge_seconds": merges,
        "ratio": merged.seconds / copied.seconds,
        "ratio_of_fastest": min(merges).seconds / min(copies).seconds,
        "rounding": written.overall_rounding,
        "process": ours,
        "peft": peft,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }
    print(f"torch {torch.__version__}, {result['threads']} threads, {result['machine']}")
    print(
        f"{params / 1e9:.2f}B parameters, {size / 1e9:.2f} GB, rank {args.r}, {args.shards} files"
    )
    for what, took, each in (("copy ", copied, copies), ("merge", merged, merges)):
        seconds = ", ".join(f"{t.seconds:.2f}" for t in each)
        print(f"  {what}  {took.seconds:6.2f} s  (of {seconds}), {took.cpu:.2f} s of CPU")
    fastest = min(merges).seconds / min(copies).seconds
    print(
        f"  merge / copy  {merged.seconds / copied.seconds:.2f} (the fastest of each: {fastest:.2f})"
    )
    for who, one in (("lowrank", ours), ("PEFT", peft)):
        if one:
            print(
                f"  {who} in a fresh process: {one['seconds']:.1f} s, peak memory {one['peak'] / 1e6:,.0f} MB, "
                f"of which the imports {one['imports'] / 1e6:,.0f} MB"
            )
    print(f"  rounding to bfloat16 costs {written.overall_rounding:.1%} of ΔW")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
