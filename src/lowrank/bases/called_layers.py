"""Quantised layers that are read by calling them: HQQ's, GPTQ's and AWQ's, whatever order their kernels keep."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.quantisation import Quantisation

_ROWS = 1024  # inputs at a time


def is_hqq(module: nn.Module) -> bool:
    return type(module).__name__ == "HQQLinear"


def hqq_quantisation(layer: Any) -> Quantisation:
    meta = layer.meta
    return Quantisation(f"int{meta['nbits']}", "hqq", meta["group_size"])


def is_awq(module: nn.Module) -> bool:
    kind = type(module)
    return _is_packed(module) and "awq" in f"{kind.__module__}.{kind.__name__}".lower()


def is_gptq(module: nn.Module) -> bool:
    return _is_packed(module) and hasattr(module, "g_idx") and not is_awq(module)


def _is_packed(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("qweight", "qzeros", "scales"))


def awq_quantisation(layer: Any) -> Quantisation:
    return Quantisation(f"int{_bits(layer)}", "awq", _group(layer))


def gptq_quantisation(layer: Any) -> Quantisation:
    return Quantisation(f"int{_bits(layer)}", "gptq", _group(layer))


def _bits(layer: Any) -> int:
    return layer.w_bit if hasattr(layer, "w_bit") else layer.bits


def _group(layer: Any) -> int | None:
    size = getattr(layer, "group_size", -1)
    return size if size > 0 else None


def held(layer: Any) -> None:
    """Nothing is ever put in the place of what it has."""


def install(layer: Any, nothing: None) -> None:
    """Nothing was changed."""


def moved(nothing: None, fn: Callable[[Tensor], Tensor]) -> None:
    """Nothing is held."""


def read(layer: Any, nothing: None) -> Tensor:
    if hasattr(layer, "dequantize"):
        return layer.dequantize().detach().float()
    bias = getattr(layer, "bias", None)
    try:
        if bias is not None:  # rounded into the product, it would not come out of it again
            layer.bias = None
        return products_with_one(layer, in_features(layer), *_floating(layer))
    finally:
        if bias is not None:
            layer.bias = bias


def products_with_one(
    layer: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """W (out, in), float32, of a layer without a bias: what it makes of the rows of the unit matrix.

    Exact for any layer that rounds to `dtype` no more than W itself: each sum has one entry that is not zero.
    """
    found = []
    for start in range(0, width, _ROWS):
        x = torch.zeros(min(_ROWS, width - start), width, dtype=dtype, device=device)
        x[:, start:].fill_diagonal_(1)
        found.append(layer(x).float().T)
    return torch.cat(found, dim=1)


def in_features(layer: Any) -> int:
    return layer.in_features if hasattr(layer, "in_features") else layer.infeatures


def _floating(layer: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype that the layer computes in, and its device."""
    tensors = [*layer.parameters(), *layer.buffers()]
    scales: Any = getattr(layer, "scales", None)
    floating = [t for t in ([scales] if scales is not None else tensors) if t.is_floating_point()]
    dtype = floating[0].dtype if floating else getattr(layer, "compute_dtype", torch.float32)
    return dtype, tensors[0].device


def refusal(layer: Any, trained: bool) -> str:
    """Found out by running it: which kernels have a gradient is for their library to know."""
    dtype, device = _floating(layer)
    if not trained or device.type == "meta":
        return ""
    x = torch.ones(1, in_features(layer), dtype=dtype, device=device, requires_grad=True)
    try:
        with torch.enable_grad():
            y = layer(x)
            (gradient,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            return f"{type(layer).__name__} does not run here: {str(error).splitlines()[0]}"
        gradient = None
    if gradient is None:
        return (
            f"{type(layer).__name__} lets no gradient through to what comes before it, so adapters there would not "
            "learn: load the base with a kernel that can be trained (for GPTQ and AWQ, the one in torch or Triton)."
        )
    return ""
