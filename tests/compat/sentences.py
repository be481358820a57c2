"""What sentence-transformers' users do with LoRA, on a tiny BERT; written against `import peft`.

Run as a program it saves what came out, so that the same steps can be compared under PEFT and under lowrank:

    python tests/compat/sentences.py folder
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

TEXTS = ["a red house", "a blue house", "the cat sleeps", "a dog and the cat"]


def base_folder(folder: Path, head: bool) -> str:
    """A BERT of a few thousand weights with a word tokenizer, saved as transformers has it."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for t in TEXTS for w in t.split()})]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, **names).save_pretrained(
        folder
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=37,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=1,
    )
    (BertForSequenceClassification if head else BertModel)(config).save_pretrained(folder)
    return str(folder)


def embedder(base: str) -> SentenceTransformer:
    body = Transformer(base)
    return SentenceTransformer(modules=[body, Pooling(24)], device="cpu")


def fill(model: torch.nn.Module, only: str = "lora_") -> None:
    """Values for every adapter tensor, whatever library made it."""
    for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if only in name:
            generator = torch.Generator().manual_seed(i)
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def sentence_transformer(folder: Path) -> dict[str, torch.Tensor]:
    base = base_folder(folder / "bert", head=False)
    model = embedder(base)
    out = {"base": model.encode(TEXTS, convert_to_tensor=True)}
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=3,
        lora_alpha=5,
        target_modules=["query", "value", "intermediate.dense"],
    )
    model.add_adapter(config)
    fill(model)
    assert model.active_adapters() == ["default"]
    out["adapted"] = model.encode(TEXTS, convert_to_tensor=True)
    model.disable_adapters()
    out["disabled"] = model.encode(TEXTS, convert_to_tensor=True)
    model.enable_adapters()

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    rows = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=rows, loss=MultipleNegativesRankingLoss(model)
    )
    out["training loss"] = torch.tensor(trainer.train().training_loss)
    out["trained"] = model.encode(TEXTS, convert_to_tensor=True)
    model.save_pretrained(str(folder / "saved"))
    loaded = SentenceTransformer(str(folder / "saved"), device="cpu")
    out["loaded"] = loaded.encode(TEXTS, convert_to_tensor=True)
    fresh = embedder(base)
    fresh.load_adapter(str(folder / "saved"))
    out["load_adapter"] = fresh.encode(TEXTS, convert_to_tensor=True)
    for name, tensor in fresh.get_adapter_state_dict().items():
        out[f"state {name}"] = tensor
    fresh.delete_adapter("default")
    out["deleted"] = fresh.encode(TEXTS, convert_to_tensor=True)
    return out


def cross_encoder(folder: Path) -> dict[str, torch.Tensor]:
    base = base_folder(folder / "bert-head", head=True)
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    model = CrossEncoder(base, device="cpu")
    out = {"cross base": model.predict(pairs, convert_to_tensor=True)}
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=3,
        lora_alpha=5,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    model.add_adapter(config)
    fill(model)
    fill(model, "modules_to_save")
    out["cross adapted"] = model.predict(pairs, convert_to_tensor=True)
    model.save_pretrained(str(folder / "cross"))
    loaded = CrossEncoder(str(folder / "cross"), device="cpu")
    out["cross loaded"] = loaded.predict(pairs, convert_to_tensor=True)
    return out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.save({**sentence_transformer(folder), **cross_encoder(folder)}, folder / "found.pt")
