"""What would LoRA train in a large model? The model is built on the meta device: no weights, no memory.

python examples/plan_large_model.py
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lowrank import LoraConfig, LowrankError, plan

# the shape of Llama 3 8B; AutoConfig.from_pretrained("…") gives that of any model on the hub
shape = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)  # fmt: skip
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(shape)
everything = sum(parameter.numel() for parameter in model.parameters())

for name, config in {
    "q and v, r=8": LoraConfig(r=8),
    "all linear, r=16": LoraConfig(r=16, target_modules="all-linear"),
    "all linear, DoRA, r=64": LoraConfig(r=64, target_modules="all-linear", use_dora=True),
}.items():
    targets = plan(model, config)
    params = sum(target.params for target in targets)
    print(
        f"{name:24} {len(targets):4} layers  {params:12,} parameters  {params / everything:.3%}  {params * 4 / 2**20:6.0f} MiB"
    )

try:
    plan(
        model,
        LoraConfig(
            target_modules=["q_proj", "v_projj"],
            modules_to_save=["lm_haed"],
            layers_to_transform=[31, 32],
        ),
    )
except LowrankError as error:
    print(f"\nand a configuration with mistakes in it:\n{error}")
