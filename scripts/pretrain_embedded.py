"""Trains the embedded model: tokenizer, pretraining, copy test, model folder. Deterministic.

    python scripts/pretrain_embedded.py --steps 4500 --seed 0 --threads 1

A checkpoint outside the repository is written every `--checkpoint-every` steps; the same command with
`--resume` goes on from it, and other `--steps` then give what is left another end. Muon trains the matrices, AdamW the embedding and the norms. Weights are
held in float32 and cast to bfloat16 for the forward and backward pass (on a CPU with bfloat16
instructions that is twice as fast); the model is written in bfloat16, and every number printed at
the end is measured on the written model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import embedded_corpus as corpus
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CONTEXT = 256
VOCABULARY = 2048
TOKENIZER_DOCUMENTS = 30_000
BATCH = 16
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{{ "<|assistant|>" }}{% generation %}{{ message.content + "<|end|>" }}{% endgeneration %}
{%- else -%}
{{ "<|" + message.role + "|>" + message.content + "<|end|>" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|assistant|>" }}{%- endif -%}
"""


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the corpus' first documents; the chat tokens have the first ids."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=corpus.SPECIAL_TOKENS,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (without_special(t) for t in corpus.documents(corpus.CORPUS_SEED, TOKENIZER_DOCUMENTS))
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=corpus.END,
        pad_token=corpus.PAD,
        additional_special_tokens=[corpus.SYSTEM, corpus.USER, corpus.ASSISTANT],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def without_special(text: str) -> str:
    for token in corpus.SPECIAL_TOKENS:
        text = text.replace(token, "\n")
    return text


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def windows(tokenizer, start: int) -> Iterator[tuple[Tensor, int]]:
    """(token ids (CONTEXT + 1,), number of the next document), for ever.

    A window begins with a whole document and is filled up with the next ones; what hangs over is cut.
    """
    index = start
    while True:
        ids: list[int] = []
        while len(ids) <= CONTEXT:
            text = corpus.document(corpus.CORPUS_SEED, index) + corpus.END
            ids += tokenizer.encode(text, add_special_tokens=False).ids
            index += 1
        yield torch.tensor(ids[: CONTEXT + 1]), index


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up over the first 2%, then linearly down to zero at the last step."""
    warmup = max(1, steps // 50)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


def optimizers(model, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.1, momentum=0.95, nesterov=True),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def bfloat16_loss(model, ids: Tensor) -> Tensor:
    """Mean next-token loss of `ids` (batch, CONTEXT + 1), the pass done in bfloat16."""
    weights = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    kwargs = {"use_cache": False}
    call = torch.func.functional_call
    logits = call(model, weights, (ids[:, :-1],), kwargs, tie_weights=True).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside weights and optimizers."""

    step: int = 0
    next_document: int = 0
    seconds: float = 0.0
    commands: list[str] = field(default_factory=list)


def pretrain(model, tokenizer, options) -> Progress:
    """Trains in place, from the checkpoint if `--resume` says so, to `--steps` or `--stop-at`."""
    stepping = optimizers(model, options.muon_lr, options.adam_lr)
    at = read_checkpoint(options.checkpoint, model, stepping) if options.resume else Progress()
    last_step = min(options.stop_at or options.steps, options.steps)
    if at.step < last_step:
        at.commands.append(command(options))
    batches = windows(tokenizer.backend_tokenizer, at.next_document)
    loss_of = torch.compile(bfloat16_loss, dynamic=False) if options.compile else bfloat16_loss
    begun, running = time.monotonic() - at.seconds, None
    while at.step < last_step:
        factor = learning_rate_factor(at.step, options.steps)
        for optimizer, lr in zip(stepping, [options.muon_lr, options.adam_lr], strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        drawn = [next(batches) for _ in range(BATCH)]
        loss = loss_of(model, torch.stack([ids for ids, _ in drawn]))
        loss.backward()
        for optimizer in stepping:
            optimizer.step()
            optimizer.zero_grad()
        at.step += 1
        at.next_document = drawn[-1][1]
        at.seconds = time.monotonic() - begun
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if at.step % options.log_every == 0 or at.step == last_step:
            print(
                f"step {at.step} loss {running:.3f} documents {at.next_document} {at.seconds:.0f} s",
                flush=True,
            )
        if at.step % options.checkpoint_every == 0 or at.step == last_step:
            write_checkpoint(options.checkpoint, model, stepping, at)
    return at


def command(options) -> str:
    """The command line that says everything that decides the weights."""
    said = [
        f"--steps {options.steps}",
        f"--muon-lr {options.muon_lr}",
        f"--adam-lr {options.adam_lr}",
    ]
    said += [f"--seed {options.seed}", f"--threads {options.threads}"]
    said += [f"--stop-at {options.stop_at}"] if options.stop_at else []
    said += ["--resume"] if options.resume else []
    said += [] if options.compile else ["--no-compile"]
    return " ".join(["python scripts/pretrain_embedded.py", *said])


def write_checkpoint(folder: Path, model, stepping, at: Progress) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    optimizer_states = [optimizer.state_dict() for optimizer in stepping]
    state = {"model": model.state_dict(), "optimizers": optimizer_states, "progress": asdict(at)}
    torch.save(state, folder / "state.tmp")
    os.replace(folder / "state.tmp", folder / "state.pt")


def read_checkpoint(folder: Path, model, stepping) -> Progress:
    saved = torch.load(folder / "state.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(stepping, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return Progress(**saved["progress"])


def save_model(model, tokenizer, folder: Path) -> None:
    """The folder that `from_pretrained` reads, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


# ---- what the written model can do


@torch.no_grad()
def heldout_losses(model, tokenizer, count: int = 400) -> dict[str, float]:
    """Nats a token on held-out documents: the generated ones, and docstrings."""
    generated, texts = [], []
    for index in range(count):
        text = corpus.document(corpus.HELDOUT_SEED, index)
        (texts if text in corpus.docstrings() else generated).append(text)
    return {
        "generated": mean_loss(model, tokenizer, generated),
        "docstrings": mean_loss(model, tokenizer, texts),
    }


@torch.no_grad()
def mean_loss(model, tokenizer, texts: list[str]) -> float:
    total, tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text + corpus.END, return_tensors="pt").input_ids[:, : CONTEXT + 1]
        logits = model(ids[:, :-1]).logits
        total += F.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens


@torch.no_grad()
def copy_test(model, tokenizer, count: int = 100) -> dict[str, float]:
    """Does the model copy what it has never seen?

    induction: 24 random tokens, twice; loss and top-1 accuracy over the second time.
    names: "Say this again: <two made-up names>." in the chat template; share of exact answers.
    """
    torch.manual_seed(1)
    span = torch.randint(len(corpus.SPECIAL_TOKENS), VOCABULARY, (count, 24))
    logits = model(torch.cat([span, span], dim=1)[:, :-1]).logits[:, 24:].float()
    expected = span[:, 1:]
    random = Random("copy test")
    exact = 0
    for _ in range(count):
        name = f"{corpus.made_up_name(random)} {corpus.made_up_name(random)}"
        messages = [{"role": "user", "content": f"Say this again: {name}."}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt"
        )
        out = model.generate(**ids, max_new_tokens=40)[0, ids["input_ids"].shape[1] :]
        exact += tokenizer.decode(out) == f"{name}.{corpus.END}"
    return {
        "induction_loss": F.cross_entropy(logits.flatten(0, 1), expected.flatten()).item(),
        "induction_top1": (logits.argmax(-1) == expected).float().mean().item(),
        "names_exact": exact / count,
    }


def provenance(folder: Path, options, at: Progress, measured: dict) -> dict:
    files = ["model.safetensors", "tokenizer.json"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        "command": " && ".join(at.commands),
        "seed": options.seed,
        "steps": at.step,
        "corpus": {
            "seed": corpus.CORPUS_SEED,
            "documents_hashed": corpus.HASHED_DOCUMENTS,
            "sha256": corpus.corpus_sha256(),
            "documents": at.next_document,
            "tokens": at.step * BATCH * CONTEXT,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(at.seconds),
        "processor": processor(),
        "threads": options.threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "measured": {key: round(value, 4) for key, value in measured.items()},
        "sha256": {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in files},
    }


def readme(record: dict) -> str:
    """`model/README.md`: where the weights come from, for people."""
    measured, text = record["measured"], record["corpus"]
    rows = "\n".join(f"| {key} | {value} |" for key, value in measured.items())
    hashes = "\n".join(f"- `{name}`: `{digest}`" for name, digest in record["sha256"].items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""\
# The embedded model

A Llama-shaped causal language model of {record["parameters"]:,} parameters (tied embeddings, byte-level
BPE of {VOCABULARY:,} tokens, context {CONTEXT}), in bfloat16. It is a test bench for fine-tuning that fits
in a package, and it knows nothing of the world beyond its small corpus. This file and
`provenance.json` are written by the script that trained it:

    {record["command"].replace(" && ", " &&" + chr(10) + "    ")}

Seed {record["seed"]}, {text["tokens"]:,} tokens ({text["documents"]:,} documents) in
{record["steps"]:,} steps of {BATCH} windows, {record["seconds"]:,} s on {record["threads"]} thread of
{record["processor"]}, other work beside it included; {versions}.
The corpus comes out the same everywhere (its first {text["documents_hashed"]:,} documents, seed
`{text["seed"]}`, have sha256 `{text["sha256"]}`);
the weights come out the same on the same machine and versions.

Measured on the written weights at the end of that command (losses in nats a token):

| | |
|---|---|
{rows}

`generated` and `docstrings`: loss on held-out documents (short documents of the closed lists, such as
a sum or a capital, come up under every seed). `induction_*`: loss and top-1 accuracy on the second
time of 24 random tokens said twice. `names_exact`: share of exact answers to "Say this again:" with
two made-up names. Copying of words works, that of random tokens does not.

sha256:

{hashes}

## Licences

The weights, the tokenizer, the generated text and the datasets in `../data` were made by this
project's own code (`scripts/embedded_corpus.py`, `scripts/pretrain_embedded.py`): Apache-2.0, as the
project. About 6% of the training text's characters, and a few rows of `../data/base_skill.jsonl`, are
docstrings of CPython 3.11's standard library, copyright the Python Software Foundation, under the PSF
License Agreement, which stands in `../NOTICE`.
"""


def processor() -> str:
    """The processor's name, as Linux gives it, since bfloat16 sums differ between processors."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=corpus.PACKAGE / "model")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "lowrank-pretrain"
    )
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument(
        "--stop-at", type=int, help="stop at this step, with a checkpoint and no model"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    print("command: python", *sys.argv, flush=True)
    tokenizer = trained_tokenizer()
    model = new_model(tokenizer)
    # on this size, matrix products beat the CPU's flash attention (whose backward pass is slow)
    model.set_attn_implementation("eager")
    print(f"parameters {sum(p.numel() for p in model.parameters()):,}", flush=True)
    at = pretrain(model, tokenizer, options)
    if at.step < options.steps:
        return
    save_model(model, tokenizer, options.out)

    model = AutoModelForCausalLM.from_pretrained(options.out)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    measured = heldout_losses(model, tokenizer) | copy_test(model, tokenizer)
    record = provenance(options.out, options, at, measured)
    (options.out / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.out / "README.md").write_text(readme(record), encoding="utf-8")
    print(json.dumps(record, indent=2))
    if not math.isfinite(measured["generated"]) or measured["names_exact"] < 0.9:
        print("the copy test does not pass: names_exact is under 0.9")


if __name__ == "__main__":
    main()
