"""Classify sentences with BERT: LoRA on its layers, and a new head that is saved beside it.

The BERT here is small and not pretrained. Put AutoModelForSequenceClassification.from_pretrained(
"google-bert/bert-base-uncased", num_labels=...) and its tokenizer in its place, and a rate of 2e-4.

python examples/bert_classification.py
"""

import json
import tempfile

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from lowrank import LoraConfig, PeftModel, get_peft_model
from lowrank.embedded import dataset_path, model_path

tokenizer = AutoTokenizer.from_pretrained(model_path())


def rows(part: str) -> tuple[list[str], list[str]]:
    lines = dataset_path("intents", part).read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    return [asked["content"] for asked, _ in turns], [said["content"] for _, said in turns]


texts, names = rows("train")
test_texts, test_names = rows("test")
classes = sorted(set(names))
labels = torch.tensor([classes.index(name) for name in names])
test_labels = torch.tensor([classes.index(name) for name in test_names])


def base() -> BertForSequenceClassification:
    torch.manual_seed(0)  # stands for a file: the same weights each time
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=256, num_labels=len(classes), pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def inputs(batch: list[str]) -> dict[str, torch.Tensor]:
    return tokenizer(batch, padding=True, return_tensors="pt", return_token_type_ids=False)


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    found = model.eval()(**inputs(test_texts)).logits.argmax(-1)
    return (found == test_labels).float().mean().item()


# task_type says that there is a head, which has to be trained and saved as well
config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
model = get_peft_model(base(), config)
model.print_trainable_parameters()
before = accuracy(model)

optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
model.train()
for _ in range(100):
    batch = torch.randint(len(texts), (32,))
    loss = model(**inputs([texts[i] for i in batch]), labels=labels[batch]).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

after = accuracy(model)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = accuracy(PeftModel.from_pretrained(base(), folder))
print(f"accuracy over {len(classes)} intents {before:.0%} -> {after:.0%}, loaded again {again:.0%}")
assert again == after > 0.4 > before
