"""The class that `lowrank.speedup` gives to PEFT's linear layers. Importing it imports PEFT."""

from typing import Any, cast

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from lowrank.bases.ops import LINEAR


class FasterLinear(Linear):
    """PEFT's LoRA linear layer with lowrank's forward. It is never constructed: layers change their class.

    Everything but the plain case (one or more active LoRA adapters, nothing merged, a tensor as the only
    argument) goes through PEFT's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not all(self._is_plain(name) for name in names):
            return super().forward(x)
        y = self.base_layer(x)
        assert LINEAR.up_onto is not None
        for name in names:
            A, B = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
            h = LINEAR.down(self.base_layer, x, A.weight.to(x.dtype), self.lora_dropout[name])
            y = LINEAR.up_onto(y, h.to(y.dtype), B.weight.to(y.dtype), self.scaling[name])
        return y

    def _is_plain(self, name: str) -> bool:
        return (
            name not in self.lora_variant
            and isinstance(self.scaling[name], int | float)
            and all(_is_plain_linear(module) for module in (self.lora_A[name], self.lora_B[name]))
        )


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether using its weight is the same as calling it."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is nn.Linear and module.bias is None and not any(hooks)
