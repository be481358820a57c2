"""Linear layers whose weight is one of torchao's quantised tensors: read and written without importing it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.bases.called_layers import products_with_one
from lowrank.quantisation import Quantisation

# class -> the format of what it holds; None: the tensor says
_FORMATS = {
    "Int8Tensor": "int8",
    "IntxUnpackedToInt8Tensor": None,
    "NF4Tensor": "nf4",
    "Int4Tensor": "int4",
    "Int4PlainInt32Tensor": "int4",
    "Int4PreshuffledTensor": "int4",
    "Int4TilePackedTo4dTensor": "int4",
    "Float8Tensor": "fp8",
}


def is_writable(module: nn.Module) -> bool:
    return is_readable(module) and type(module.weight).__name__ in _MAKERS


def is_readable(module: nn.Module) -> bool:
    """Whether it is a linear layer with such a weight, of a sort that is known here."""
    weight = module._parameters.get("weight")
    kind = type(weight)
    return (
        kind.__module__.partition(".")[0] == "torchao"
        and kind.__name__ in _FORMATS
        and type(module).forward is nn.Linear.forward
    )


def quantisation(module: Any) -> Quantisation:
    weight = module.weight
    named = _FORMATS[type(weight).__name__]
    format = named or str(weight.target_dtype).removeprefix("torch.")
    if type(weight).__name__ == "NF4Tensor":
        return Quantisation(format, "torchao", weight.block_size, double=True)
    width = tuple(getattr(weight, "block_size", ()) or (None,))[-1]
    return Quantisation(format, "torchao", None if width == weight.shape[-1] else width)


def held(module: Any) -> Any:
    return module.weight


def install(module: nn.Module, weight: Any) -> None:
    module._parameters["weight"] = weight


def read(module: Any, weight: Any) -> Tensor:
    if hasattr(weight, "get_original_weight"):
        return weight.get_original_weight().detach().float()
    if hasattr(weight, "dequantize"):
        return weight.dequantize().detach().float()
    return products_with_one(
        lambda x: nn.functional.linear(x, weight), weight.shape[1], weight.dtype, weight.device
    )


def made(module: Any, W: Tensor) -> nn.Parameter:
    """W rounded as the layer's weight was, after it has taken on that weight's dtype."""
    old = module.weight
    new = _MAKERS[type(old).__name__](old, W.to(old.dtype).contiguous())
    return nn.Parameter(new, requires_grad=False)


def moved(weight: Any, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    return nn.Parameter(fn(weight.detach()), requires_grad=False)


def refusal(module: Any, trained: bool) -> str:
    weight = module.weight
    rounds_x = [
        getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization")
    ]
    if trained and any(found is not None for found in rounds_x):
        return (
            f"torchao's {type(weight).__name__} rounds its input here too, which lets no gradient through: quantise the "
            "base with a weight-only configuration (Int8WeightOnlyConfig, …) to train on it."
        )
    return ""


def _int8(old: Any, W: Tensor) -> Any:
    from torchao.quantization import granularity

    by_row = old.block_size[0] == 1
    return type(old).from_hp(
        W,
        granularity.PerRow() if by_row else granularity.PerTensor(),
        mapping_type=_mapping(old),
        act_quant_kwargs=old.act_quant_kwargs,
        reduce_range=old.reduce_range,
    )


def _intx(old: Any, W: Tensor) -> Any:
    return type(old).from_hp(
        W,
        old.block_size,
        old.target_dtype,
        mapping_type=_mapping(old),
        activation_quantization=old.activation_quantization,
    )


def _nf4(old: Any, W: Tensor) -> Any:
    return type(old).from_tensor(W, old.block_size, old.scaler_block_size)


def _mapping(old: Any) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    symmetric = old.zero_point is None or not torch.any(old.zero_point)
    return MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC


_MAKERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "NF4Tensor": _nf4,
}
