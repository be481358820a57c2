"""Preferences with TRL's own DPOTrainer: polite answers rather than curt ones, and how sure the model became.

The reference is the same model with the adapter switched off: there is no second copy. A real model to put in:
Qwen/Qwen3-0.6B. From the command line the same is `lowrank train examples/dpo.yaml`.

python examples/dpo.py [output folder]
"""

import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank.compat

lowrank.compat.install(override=True)  # TRL recognises adapters by `import peft`

from trl import DPOConfig, DPOTrainer  # noqa: E402

from lowrank import LoraConfig  # noqa: E402
from lowrank.embedded import model_path  # noqa: E402
from lowrank.train.data.rows import as_rows  # noqa: E402
from lowrank.train.data.shapes import Preference  # noqa: E402
from lowrank.train.evaluate import answer_rows  # noqa: E402
from lowrank.train.tasks.preference import encode_preferences, implicit_rewards  # noqa: E402

output = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
tokenizer = AutoTokenizer.from_pretrained(model_path())
model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)

things = ["phone", "lamp", "chair", "radio", "bike", "clock", "car", "boat", "oven", "shirt"]
pairs = [
    {
        "prompt": [{"role": "user", "content": f"Can you {verb} the {thing}?"}],
        "chosen": [{"role": "assistant", "content": f"Yes, we can {verb} the {thing}. Thank you."}],
        "rejected": [{"role": "assistant", "content": f"No, not the {thing}."}],
    }
    for verb in ("repair", "sell", "bring")
    for thing in things
]
held_out = [Preference(**pair, where=f"pair {i}") for i, pair in enumerate(pairs[::6])]
train = [pair for i, pair in enumerate(pairs) if i % 6]

arguments = DPOConfig(
    output,
    beta=0.1,
    learning_rate=2e-3,
    max_steps=8,
    per_device_train_batch_size=8,
    max_length=128,
    logging_steps=4,
    bf16=False,
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
trainer = DPOTrainer(
    model,
    args=arguments,
    train_dataset=Dataset.from_list(train),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(output)

rows = encode_preferences(held_out, tokenizer, max_length=128)
found = implicit_rewards(trainer.model, rows, tokenizer.pad_token_id).scores
print(f"held out: preference accuracy {found['preference_accuracy']:.0%} (50% is chance), ", end="")
print(f"reward margin {found['reward_margin']:.2f}, adapter saved in {output}")
asked = [as_rows(row)[0][1] for row in held_out[:3]]
for row, answer in zip(
    asked, answer_rows(trainer.model, tokenizer, asked, max_new_tokens=24), strict=True
):
    print(f"  {row.prompt[0]['content']!r} -> {answer!r}")
