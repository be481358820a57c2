"""What `plan` finds, and what it refuses: everything at once, with the paths and the reason."""

import pytest
from models import Net
from torch import nn

from lowrank.config import LoraConfig
from lowrank.errors import TargetError
from lowrank.targets import plan


def refusal(model: nn.Module, **config) -> str:
    """The text of the one error that plan raises."""
    with pytest.raises(TargetError) as caught:
        plan(model, LoraConfig(**config))
    return str(caught.value)


def test_lora_bias_needs_a_bias_of_the_weights_rows():
    net = Net()
    net.up = nn.ConvTranspose1d(4, 6, 3)
    text = refusal(net, target_modules=["up"], lora_bias=True)
    assert "lora_bias" in text
    assert "another shape" in text
