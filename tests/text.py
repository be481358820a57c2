"""A tokenizer of bytes with a chat template, a tiny model for it, and rows to train on."""

import json

import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|pad|>", "<|user|>", "<|end|>", "<|assistant|>", "<|system|>"]  # end: 2, as in tiny
VOCABULARY = 256 + len(SPECIALS)


def byte_tokenizer(pad="<|pad|>", template=TEMPLATE):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*SPECIALS, *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token="<|end|>",
        additional_special_tokens=SPECIALS[3:],
    )
    made.chat_template = template
    return made


def save_model(folder, **options):
    """A tiny model with its tokenizer, as a folder; returns the folder as text."""
    tiny.llama(vocab=VOCABULARY, dtype=torch.float32, **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path, *lines):
    """A JSONL file of objects, or of raw lines in bytes; returns its path."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def pairs(count):
    """Rows that a tiny model can learn by heart."""
    return [
        {"prompt": f"{i % 7} and {i % 5}?", "completion": f"{i % 7}{i % 5}"} for i in range(count)
    ]
