"""Model folders on disk for the tests of merging and verifying: a base, an adapter, a tokenizer."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import randomise
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowrank import LoraConfig, get_peft_model
from lowrank.model_folder import load_model, quiet
from lowrank.verify import probe

WORDS = ["the", "old", "lighthouse", "keeper", "wrote", "down", "weather", "every", "morning"]


class InProcess:
    """Stands in for verify's fresh process: starting one costs seconds."""

    def __init__(self, job: Path):
        self.returncode, self.error = 0, ""
        try:
            probe.main(job)
        except Exception as error:
            self.returncode, self.error = 1, f"{type(error).__name__}: {error}"

    def communicate(self):
        return "", self.error

    def kill(self):
        pass


def write_base(model, folder: Path, dtype=torch.float32, tokenizer: bool = True) -> Path:
    """`model` as transformers saves it, beside a small tokenizer with a chat template."""
    model.to(dtype).save_pretrained(folder)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> None:
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS, *extra]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def write_adapter_for(
    base: Path, folder: Path, task: str, seed: int = 1, scale: float = 1.0, **fields
) -> Path:
    """An adapter with random weights, as if it had been trained on the base in `base`."""
    model = load_model(base, task, dtype=torch.float32, **fields.pop("options", {})).model
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": task, **fields})
    with quiet():
        adapted = randomise(get_peft_model(model, config), seed)
    if scale != 1:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name or "lora_embedding_B" in name:
                    parameter.mul_(scale)
    adapted.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's or an adapter's folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put other tensors into a model's folder of one file."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
