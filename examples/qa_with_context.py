"""Answer questions from a context (the form of SQuAD) with a causal model, by LoRA.

Put AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B") and its tokenizer in the place of the model in the
package, a file of SQuAD's (`data.shape: squad`) for the rows, and a rate of 2e-4. For answers that are spans of
the context there is also an encoder's head: `lowrank train --task question-answering`.

python examples/qa_with_context.py
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank import LoraConfig, compat, get_peft_model
from lowrank.embedded import dataset_path, model_path
from lowrank.train.data.encode import encode
from lowrank.train.data.rows import read_rows
from lowrank.train.evaluate import evaluate
from lowrank.train.settings import TrainSettings
from lowrank.train.tasks.sft import train_sft

folder = Path(tempfile.mkdtemp())


def squad(part: str, count: int) -> Path:
    """A file of {question, context, answers}: what a record says of one of its fields."""
    lines = dataset_path("records", part).read_text(encoding="utf-8").splitlines()[:count]
    with (folder / f"{part}.jsonl").open("w") as file:
        for i, line in enumerate(lines):
            record = json.loads(line)["prompt"].strip()
            fields = dict(field.split(": ") for field in record.split(" | "))
            name = fields.pop("name")
            asked, answer = sorted(fields.items())[i % len(fields)]
            answers = {
                "text": [answer],
                "answer_start": [record.index(f"{asked}: {answer}") + len(asked) + 2],
            }
            row = {
                "question": f"What is the {asked} of {name}?",
                "context": record,
                "answers": answers,
            }
            file.write(json.dumps(row) + "\n")
    return Path(file.name)


tokenizer = AutoTokenizer.from_pretrained(model_path())
train = encode(read_rows([squad("train", 560)], shape="squad"), tokenizer, max_length=160)
test = encode(read_rows([squad("test", 40)], shape="squad"), tokenizer, max_length=160)
print(train.summary)

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
before = evaluate(base, tokenizer, test, generate=40, max_new_tokens=6)
config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
settings = TrainSettings(epochs=1, learning_rate=5e-3, batch_size=12, save_steps=1000)
with compat.standing_in():  # the Trainer then knows an adapter when it sees one
    model = get_peft_model(base, config)
    train_sft(model, tokenizer, train, None, folder / "run", settings)
model.save_pretrained(folder / "adapter")

after = evaluate(model, tokenizer, test, generate=40, max_new_tokens=6)
for answer in after.answers[:3]:
    print(f"  {answer.prompt.splitlines()[-1]} {answer.answer} ({answer.expected})")
print(f"exact match {before.scores['exact_match']:.0%} -> {after.scores['exact_match']:.0%}")
assert after.scores["exact_match"] > 0.4 > before.scores["exact_match"]
