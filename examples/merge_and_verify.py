"""Merge an adapter into its base, write the model, and prove that the model is the same function.

python examples/merge_and_verify.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lowrank import LoraConfig, get_peft_model
from lowrank.embedded import model_path
from lowrank.merge import merge_to_folder
from lowrank.report.text import merged, show, verification
from lowrank.verify import verify

folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
config = LoraConfig(
    r=8, lora_alpha=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
)
get_peft_model(model, config).save_pretrained(folder / "adapter")  # stands for one that was trained

show(merged(merge_to_folder(model_path(), folder / "adapter", folder / "merged")))
result = verify(model_path(), folder / "adapter", folder / "merged")
show(verification(result))
assert result.passed
