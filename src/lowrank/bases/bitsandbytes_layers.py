"""bitsandbytes' Linear4bit and Linear8bitLt: what they hold, read and written without importing them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.kernels.quantisation import Packed, dequantise, dequantise_int8, quantise
from lowrank.quantisation import Quantisation

INT8 = Quantisation("int8", "bitsandbytes")


def _is(module: nn.Module, name: str) -> bool:
    return any(
        c.__name__ == name and c.__module__.startswith("bitsandbytes.")
        for c in type(module).__mro__
    )


# --- 4 bits ---------------------------------------------------------------------------------------


def is_4bit(module: nn.Module) -> bool:
    return _is(module, "Linear4bit")


def quantisation_4bit(layer: Any) -> Quantisation:
    weight = layer.weight
    return Quantisation(
        weight.quant_type, "bitsandbytes", weight.blocksize, bool(weight.compress_statistics)
    )


def held_4bit(layer: Any) -> Any:
    """The parameter, which has its scales with it."""
    keep_unpacked(layer)
    return layer.weight


def install_4bit(layer: Any, weight: Any) -> None:
    layer._parameters["weight"] = weight
    layer.quant_state = weight.quant_state


def read_4bit(layer: Any, weight: Any) -> Tensor:
    state = weight.quant_state
    if state is None:  # not quantised yet: on the meta device, or before the first .to(device)
        return weight.detach().float()
    packed = Packed(weight.data.view(torch.uint8), state.absmax)
    if state.nested:
        packed = packed._replace(nested_absmax=state.state2.absmax, offset=state.offset)
    quantisation = Quantisation(state.quant_type, "bitsandbytes", state.blocksize, state.nested)
    return dequantise(packed, quantisation, tuple(state.shape))


def made_4bit(layer: Any, W: Tensor) -> Any:
    old = layer.weight
    new = type(old)(
        W,
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    ).to(W.device)
    new.quant_state.dtype = old.quant_state.dtype  # that of its products
    return new


def moved_4bit(weight: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    weight.data = fn(weight.data)
    if weight.quant_state is not None:
        weight.quant_state.to(weight.data.device)
    return weight


def refusal_4bit(layer: Any, trained: bool) -> str:
    weight = layer.weight
    if weight.is_meta:
        return ""
    if weight.quant_state is None:
        return (
            "a Linear4bit whose weight is quantised when it is first moved to a device: move the model there "
            '(model.to("cpu") too), then add the adapter.'
        )
    state, width = weight.quant_state, layer.in_features
    if weight.device.type != "cpu" or width % state.blocksize == 0:
        return ""
    keep_unpacked(layer)
    from bitsandbytes.functional import dequantize_4bit

    found = dequantize_4bit(weight.data, state).float()
    if torch.allclose(found, read_4bit(layer, weight), rtol=0.02, atol=1e-6):
        return ""
    return (
        f"bitsandbytes' kernel for this CPU reads its weight wrongly: {width} inputs are no multiple of the block of "
        f"{state.blocksize}. Use a block size that divides them, lowrank's own nf4 (lowrank.quantise_model), or CUDA."
    )


def keep_all_unpacked(model: nn.Module) -> None:
    """`keep_unpacked` for every Linear4bit of the model, with an adapter or without."""
    for module in model.modules():
        if is_4bit(module):
            keep_unpacked(module)


def keep_unpacked(layer: Any) -> None:
    """Has the layer keep its weight as it was quantised.

    Called in eval mode, on a CPU that multiplies in bfloat16, a Linear4bit puts its weight into another
    order for good, with its scales rounded to bfloat16; from then on its product has no gradient, so that
    training after an evaluation would leave out the layers before it without a word.
    """
    layer.support_avx512bf16_for_cpu = False
    weight = layer.weight
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales = state.absmax.T.flatten().float()
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    if not weight.quant_state.nested:
        weight.quant_state.absmax = scales
    layer.quant_state = weight.quant_state


# --- 8 bits ---------------------------------------------------------------------------------------


def is_8bit(module: nn.Module) -> bool:
    return _is(module, "Linear8bitLt")


def held_8bit(layer: Any) -> tuple[Any, Tensor | None]:
    """The parameter and the rows' scales, which the first forward takes off the parameter."""
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight, scales


def install_8bit(layer: Any, held: tuple[Any, Tensor]) -> None:
    weight, scales = held
    weight.CB, weight.SCB = weight.data, scales
    layer._parameters["weight"] = weight
    layer.state.reset_grads()


def read_8bit(layer: Any, held: tuple[Any, Tensor | None]) -> Tensor:
    weight, scales = held
    if scales is None:  # not quantised yet
        return weight.detach().float()
    return dequantise_int8(Packed(weight.data, scales))


def made_8bit(layer: Any, W: Tensor) -> tuple[Any, Tensor]:
    packed = quantise(W, INT8)
    new = type(layer.weight)(packed.codes, requires_grad=False, has_fp16_weights=False)
    return new, packed.absmax


def moved_8bit(held: tuple[Any, Tensor], fn: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
    weight, scales = held
    weight.data = fn(weight.data)
    return weight, scales.to(weight.data.device)


def refusal_8bit(layer: Any, trained: bool) -> str:
    if layer.state.has_fp16_weights:
        return (
            "a Linear8bitLt that keeps its weight in floating point and rounds it in each forward: make it with "
            "has_fp16_weights=False, as load_in_8bit does."
        )
    if layer.weight.is_meta or layer.weight.dtype == torch.int8:
        return ""
    return (
        "a Linear8bitLt whose weight is quantised when it is first moved to a device: move the model there "
        '(model.to("cpu") too), then add the adapter.'
    )
