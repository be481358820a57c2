"""Adapt GPT-2 to write sentences from records, as in the LoRA paper's E2E experiment.

The GPT-2 here is small, and its pretraining is 60 steps on the sentences alone. Put
AutoModelForCausalLM.from_pretrained("openai-community/gpt2") and its tokenizer in its place, and a rate of 2e-4;
examples/e2e.yaml is the whole experiment.

python examples/gpt2.py
"""

import json

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lowrank import LoraConfig, get_peft_model
from lowrank.embedded import dataset_path, model_path

tokenizer = AutoTokenizer.from_pretrained(model_path())
Example = tuple[list[int], list[int]]


def read(part: str) -> list[Example]:
    lines = dataset_path("records", part).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    end = [tokenizer.eos_token_id]
    return [(tokenizer.encode(r["prompt"]), tokenizer.encode(r["completion"]) + end) for r in rows]


def loss_of(model: torch.nn.Module, rows: list[Example]) -> torch.Tensor:
    """Nats a token of the answers; prompts and padding are not learnt, by their place."""
    width = max(len(asked) + len(said) for asked, said in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for i, (asked, said) in enumerate(rows):
        tokens[i, : len(asked) + len(said)] = torch.tensor(asked + said)
        labels[i, len(asked) : len(asked) + len(said)] = torch.tensor(said)
    return model(input_ids=tokens, labels=labels).loss


def train(model: torch.nn.Module, rows: list[Example], steps: int, rate: float) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        loss = loss_of(model, [rows[i] for i in torch.randint(len(rows), (12,))])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


torch.manual_seed(0)
rows, test = read("train"), read("test")[:40]
base = GPT2LMHeadModel(GPT2Config(
    vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=2, n_head=4,
    bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
))  # fmt: skip
train(base, [([], said) for _, said in rows], steps=60, rate=1e-2)

# GPT-2's layers are Conv1D, which hold W transposed: lowrank knows, whatever fan_in_fan_out says
config = LoraConfig(
    r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM"
)
model = get_peft_model(base, config)
model.print_trainable_parameters()
with torch.no_grad():
    before = loss_of(model, test)
train(model, rows, steps=60, rate=1e-2)
with torch.no_grad():
    after = loss_of(model, test)
print(f"loss on sentences from new records {before:.2f} -> {after:.2f} nats a token")
assert after < 0.8 * before
