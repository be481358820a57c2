"""Reinforcement with TRL's own GRPOTrainer: rules that reward short answers that are whole sentences.

Several answers to a prompt are sampled, and those that score above their group's mean become likelier. A real model
to put in: Qwen/Qwen3-0.6B; a real rule: final_number on GSM8K, `lowrank train` with `task: grpo` and
`reward_functions: final_number`.

python examples/grpo.py [output folder]
"""

import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank.compat

lowrank.compat.install(override=True)  # TRL recognises adapters by `import peft`

from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from lowrank import LoraConfig  # noqa: E402
from lowrank.embedded import model_path  # noqa: E402
from lowrank.train.data.shapes import Row  # noqa: E402
from lowrank.train.evaluate import answer_rows  # noqa: E402
from lowrank.train.tasks.rewards import reward_functions, total  # noqa: E402


def whole(completions, **_):
    """A reward of one's own: 1 for an answer that ends as a sentence does."""
    return [float(text.strip().endswith(".")) for text in completions]


output = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
tokenizer = AutoTokenizer.from_pretrained(model_path())
model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
rewards = [*reward_functions(["length:5"]), whole]
things = ["phone", "car", "door", "lamp", "boat", "table", "radio", "clock"]
rows = [Row([{"role": "user", "content": f"Who can fix the {t}?"}], "", t) for t in things]
texts = [
    tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
    for row in rows
]


def mean_reward(model):
    answers = answer_rows(model, tokenizer, rows, max_new_tokens=24)
    return sum(total(rewards, [1, 1], answers)) / len(rows), answers


before, _ = mean_reward(model)
arguments = GRPOConfig(
    output,
    learning_rate=3e-3,
    max_steps=6,
    per_device_train_batch_size=16,
    num_generations=8,
    max_completion_length=24,
    logging_steps=3,
    bf16=False,
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
trainer = GRPOTrainer(
    model,
    reward_funcs=rewards,
    args=arguments,
    train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(output)
after, answers = mean_reward(trainer.model)
print(f"mean reward of greedy answers {before:.2f} -> {after:.2f}, adapter saved in {output}")
for row, answer in zip(rows[:3], answers, strict=False):
    print(f"  {row.prompt[0]['content']!r} -> {answer!r}")
