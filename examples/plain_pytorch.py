"""LoRA on a module of your own: any mix of convolutions, embeddings, attention and linear layers.

python examples/plain_pytorch.py
"""

import torch
from torch import nn

from lowrank import LoraConfig, get_peft_model


class Tagger(nn.Module):
    """Tokens -> a class for each: embedding, convolution, self-attention, linear."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.mix = nn.Conv1d(24, 24, kernel_size=3, padding=1)
        self.attend = nn.MultiheadAttention(24, num_heads=4, batch_first=True)
        self.out = nn.Linear(24, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.out(x + self.attend(x, x, x, need_weights=False)[0])


torch.manual_seed(0)
tokens = torch.randint(50, (64, 12))
classes = (tokens + tokens.roll(1, dims=1)) % 5  # depends on a token and the one before it
model = get_peft_model(
    Tagger(),
    LoraConfig(r=8, lora_alpha=16, target_modules=["embed", "mix", "attend", "out"], use_dora=True),
)
model.print_trainable_parameters()

optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(201):
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), classes.flatten())
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step % 50 == 0:
        print(f"step {step:3}  loss {loss:.3f}")

model.eval()
before = model(tokens)
plain = model.merge_and_unload()
print(
    f"merged: {type(plain).__name__}, outputs differ by at most {(plain(tokens) - before).abs().max():.1e}"
)
