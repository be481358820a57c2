"""Fine-tune a Llama with LoRA through transformers' Trainer; save the adapter, load it, and see what it learned.

The model in the package is a small Llama: put "meta-llama/Llama-3.2-1B-Instruct" for model_path(), and a rate of 2e-4.

python examples/finetune.py [output folder]
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank.compat

lowrank.compat.install(
    override=True
)  # Trainer recognises adapters by `import peft`: let that be lowrank

from transformers import Trainer, TrainingArguments  # noqa: E402

from lowrank import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from lowrank.embedded import dataset_path, model_path  # noqa: E402
from lowrank.train.data.encode import encode, pad_right  # noqa: E402
from lowrank.train.data.rows import read_rows  # noqa: E402
from lowrank.train.evaluate import evaluate  # noqa: E402

output = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_path())
base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
train = encode(read_rows([dataset_path("intents", "train")])[:480], tokenizer, max_length=128)
test = encode(read_rows([dataset_path("intents", "test")])[:40], tokenizer, max_length=128)
before = evaluate(base, tokenizer, test, generate=40)

model = get_peft_model(
    base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
)
model.print_trainable_parameters()

arguments = TrainingArguments(
    output,
    learning_rate=5e-3,
    num_train_epochs=2,
    per_device_train_batch_size=16,
    remove_unused_columns=False,
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
collate = pad_right(tokenizer.pad_token_id)
Trainer(model, arguments, collate, train.examples, test.examples).train()
model.save_pretrained(output)

fresh = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
after = evaluate(PeftModel.from_pretrained(fresh, output), tokenizer, test, generate=40)
print(
    f"exact match {before.scores['exact_match']:.0%} -> {after.scores['exact_match']:.0%}, "
    f"loss {before.scores['loss']:.2f} -> {after.scores['loss']:.2f}"
)
for answer in after.answers[:3]:
    print(f"  {answer.prompt!r} -> {answer.answer!r}")
