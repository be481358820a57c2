"""`lowrank.speedup`: PEFT's own model, with lowrank's forward in its linear layers."""

from dataclasses import dataclass

from torch import nn

from lowrank.errors import NotPeftError
from lowrank.wrappers import adapter_names


@dataclass(frozen=True)
class Speedup:
    """What `speedup` did."""

    switched: list[str]  # the paths of the layers that have lowrank's forward now
    left: dict[str, str]  # path -> PEFT's class of a LoRA layer that keeps its own forward

    def __str__(self) -> str:
        text = f"{len(self.switched)} linear layers run lowrank's forward"
        kept = ", ".join(sorted(set(self.left.values())))
        return text + (f"; {len(self.left)} keep PEFT's ({kept})." if self.left else ".")


def speedup(model: nn.Module) -> Speedup:
    """Gives the linear LoRA layers of a model made with the installed PEFT lowrank's forward, in place.

    The model stays PEFT's: same classes to isinstance, same state dict, same files. A layer computes for
    itself what PEFT's would (benchmarks/step.py --dropout compares time and memory), and hands everything
    unusual to PEFT's forward: DoRA, aLoRA and other variants, a bias in B, mixed batches, merged or
    disabled adapters, hooks on A or B. On a 16-bit base the adapter's product is rounded to the base's
    dtype, where PEFT adds it in float32. Quantised layers and other kinds are left alone and listed.
    Layers that are added later need another call. Raises NotPeftError if `model` has no LoRA layers of
    PEFT's.
    """
    if adapter_names(model):
        raise NotPeftError(
            "This model's adapters are lowrank's already: there is nothing to speed up."
        )
    layers = _lora_layers(model)
    if not layers:
        raise NotPeftError(
            f"{type(model).__name__} has no LoRA layers made by PEFT: call peft.get_peft_model first, or use "
            "lowrank.get_peft_model and leave PEFT out."
        )
    from peft.tuners.lora.layer import Linear

    from lowrank.peft_linear import FasterLinear

    switched, left = [], {}
    for path, layer in layers:
        if type(layer) in (Linear, FasterLinear):
            layer.__class__ = FasterLinear
            switched.append(path)
        else:
            left[path] = type(layer).__name__
    return Speedup(switched, left)


def undo_speedup(model: nn.Module) -> None:
    """Gives the layers back to PEFT's forward."""
    for _, layer in _lora_layers(model):
        if type(layer).__name__ == "FasterLinear":
            layer.__class__ = type(layer).__bases__[0]


def _lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of the installed PEFT's LoRA, wherever its classes come from; imports nothing."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if any(
            c.__module__ == "peft.tuners.lora.layer" and c.__name__ == "LoraLayer"
            for c in type(module).__mro__
        )
    ]
