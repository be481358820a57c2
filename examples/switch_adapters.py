"""Several adapters on one base: add, switch, combine, switch off, save and load by name.

python examples/switch_adapters.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank import LoraConfig, PeftModel, get_peft_model
from lowrank.embedded import model_path

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_path())
base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
inputs = tokenizer("The old house near the river", return_tensors="pt")


@torch.no_grad()
def logits() -> torch.Tensor:
    return model(**inputs).logits[0, -1]


# init_lora_weights=False starts with a random change, so that there is something to see without training
config = LoraConfig(
    r=4,
    lora_alpha=2,
    target_modules=["q_proj", "v_proj"],
    init_lora_weights=False,
    task_type="CAUSAL_LM",
)
model = get_peft_model(base, config, adapter_name="poems").eval()
model.add_adapter(
    "letters", LoraConfig(r=8, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
)

with model.disable_adapter():
    plain = logits()
poems = logits()
model.set_adapter("letters")
letters = logits()
model.set_adapter(["poems", "letters"])  # both act: their changes add up
both = logits()
for name, values in {"poems": poems, "letters": letters, "both": both}.items():
    print(f"{name:8} moves the next token's logits by {(values - plain).norm():.2f}")

folder = tempfile.mkdtemp()
model.save_pretrained(
    folder
)  # an adapter that is not named "default" goes into a folder of its name
fresh = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
model = PeftModel.from_pretrained(fresh, f"{folder}/poems", adapter_name="poems")
model.load_adapter(f"{folder}/letters", "letters")
model.set_adapter(["poems", "letters"])
print(f"loaded again, both differ by {(logits() - both).abs().max():.1e}")

model.delete_adapter("poems")
print(f"left: {list(model.peft_config)}, active: {model.active_adapters}")
