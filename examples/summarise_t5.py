"""Summarise dialogues with an encoder and a decoder (T5, FLAN-T5, BART): LoRA for SEQ_2_SEQ_LM.

The T5 here is small, and its pretraining is 100 steps of filling gaps. Put
AutoModelForSeq2SeqLM.from_pretrained("google/flan-t5-base") and its tokenizer in its place, SAMSum or your own
dialogues for the rows, and a rate of 1e-3.

python examples/summarise_t5.py
"""

import random

import torch
from transformers import T5Config, T5ForConditionalGeneration

from lowrank import LoraConfig, get_peft_model
from lowrank.train.answers import rouge_l

NAMES, VERBS = ["Ann", "Bob", "Cem", "Dora", "Eva", "Finn"], ["call", "meet", "visit", "see"]
TIMES, PLACES = ["noon", "one", "two", "six", "ten"], ["home", "work", "school", "church"]
OTHER = ["<pad>", "</s>", "<gap>", ":", ".", ",", "will", "at", "let", "us", "fine", "with", "me", "and"]  # fmt: skip
words = [*OTHER, *NAMES, *VERBS, *TIMES, *PLACES]
rng = random.Random(0)


def dialogue() -> tuple[str, str]:
    a, b = rng.sample(NAMES, 2)
    verb, time, place = rng.choice(VERBS), rng.choice(TIMES), rng.choice(PLACES)
    said = f"{a} : let us {verb} at {place} , {b} . {b} : fine with me , at {time} ."
    return said, f"{a} and {b} will {verb} at {time} ."


def gap() -> tuple[str, str]:
    """What T5 is pretrained on: a text with a gap, and what stood there."""
    said = rng.choice(dialogue()).split()
    i = rng.randrange(len(said) - 2)
    return " ".join([*said[:i], "<gap>", *said[i + 2 :]]), " ".join(said[i : i + 2])


def padded(texts: list[str]) -> torch.Tensor:
    rows = [torch.tensor([words.index(word) for word in text.split()] + [1]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def train(model: torch.nn.Module, draw, steps: int, rate: float) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        asked, said = map(padded, zip(*[draw() for _ in range(24)], strict=True))
        labels = said.masked_fill(said == 0, -100)
        loss = model(input_ids=asked, attention_mask=asked != 0, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def score(model: torch.nn.Module) -> float:
    """ROUGE-L of greedy summaries of 40 new dialogues."""
    asked, summaries = zip(*[dialogue() for _ in range(40)], strict=True)
    rows = padded(list(asked))
    out = model.generate(input_ids=rows, attention_mask=rows != 0, max_new_tokens=12)
    said = [" ".join(words[i] for i in row if i > 1) for row in out.tolist()]
    print(f"  {asked[0]} -> {said[0]}")
    return sum(map(rouge_l, said, summaries)) / len(said)


torch.manual_seed(0)
base = T5ForConditionalGeneration(T5Config(
    vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=0,
    eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
))  # fmt: skip
train(base, gap, steps=100, rate=3e-3)
before = score(base)
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
model = get_peft_model(base, lora)
train(model, dialogue, steps=90, rate=5e-3)
after = score(model)
print(f"ROUGE-L {before:.2f} -> {after:.2f}")
assert after > 0.6 > before
