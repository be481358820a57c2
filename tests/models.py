"""Tiny networks of plain torch, each with odd sizes and biases that are not zero."""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Embedding, a stack of numbered layers, and a head; what a small user-written model looks like."""

    def __init__(self, layers: int = 3, vocab: int = 11, width: int = 7, classes: int = 5):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, width + 4) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.q_proj(x)) * self.v_proj(x)
        return x + self.down(torch.relu(self.up(self.norm(x))))


class ConvNet(nn.Module):
    """(batch, 3, height, width) -> (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 6, (3, 1), groups=2, padding_mode="reflect", padding=(1, 0))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.head(x.mean((-1, -2)))


class AttentionNet(nn.Module):
    """(batch, sequence, 12) -> (batch, sequence, 5), with torch's own transformer layers."""

    def __init__(self, layers: int = 2, width: int = 12):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 3, 18, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
