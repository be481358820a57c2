"""How quantised layers hold their weight: a row for each back end, and one store for all of them.

A back end is never imported here: its layers are known by their names, and when a model has one, the library
is loaded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from lowrank.bases import bitsandbytes_layers, called_layers, torchao_tensors
from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.errors import MergeError
from lowrank.kernels.quantisation import dequantise, quantise
from lowrank.quantisation import Quantisation


class Backend(NamedTuple):
    """How one library's layers are read, and written where they can be.

    What a layer holds, in whatever form, is its `held`: a merge puts another in its place, and gives it back.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    weight: str  # the name of a tensor of the module that tells its device
    quantisation: Callable[[nn.Module], Quantisation]
    held: Callable[[nn.Module], Any]
    install: Callable[[nn.Module, Any], None]
    read: Callable[[nn.Module, Any], Tensor]  # module, held -> W (out, in), float32
    made: Callable[[nn.Module, Tensor], Any] | None  # module, W -> held, rounded; None: read-only
    moved: Callable[[Any, Callable[[Tensor], Tensor]], Any]  # held, as `.to()` is to have it
    # why an adapter cannot be on the layer, or cannot be trained there; "" if it can
    refusal: Callable[[nn.Module, bool], str]


class QuantisedStore:
    """A weight in few bits: read as float32, and rounded again when it is written."""

    exact = False
    dtype = torch.float32

    def __init__(self, module: nn.Module, backend: Backend):
        self.module, self.backend = module, backend

    @property
    def quantisation(self) -> Quantisation:
        return self.backend.quantisation(self.module)

    @property
    def shape(self) -> Size:
        return shape_of(self.module)

    @property
    def parameter(self) -> Tensor:
        return getattr(self.module, self.backend.weight)

    @property
    def read_only(self) -> str:
        if self.backend.made is not None:
            return ""
        return (
            f"{type(self.module).__name__} holds its weight as {self.quantisation}, which can be read and not written. "
            "Merge into the 16-bit base that it was made from (lowrank merge), or dequantise this one first."
        )

    def refusal(self, trained: bool) -> str:
        return self.backend.refusal(self.module, trained)

    def read(self) -> Tensor:
        return self.read_snapshot(self.snapshot())

    def shaped(self, W: Tensor) -> Tensor:
        return W

    def write(self, W: Tensor) -> None:
        if self.backend.made is None:
            raise MergeError(self.read_only)
        self.backend.install(self.module, self.backend.made(self.module, W.detach()))

    def snapshot(self) -> Any:
        return self.backend.held(self.module)

    def read_snapshot(self, saved: Any) -> Tensor:
        with torch.no_grad():
            return self.backend.read(self.module, saved)

    def restore(self, saved: Any) -> None:
        self.backend.install(self.module, saved)

    def parameter_of(self, saved: Any) -> Tensor:
        tensor = saved[0] if isinstance(saved, tuple) else saved
        return self.parameter if tensor is None else tensor

    def moved(self, saved: Any, fn: Callable[[Tensor], Tensor]) -> Any:
        return self.backend.moved(saved, fn)


def shape_of(module: Any) -> Size:
    """(out, in) of a linear layer of any library."""
    if hasattr(module, "out_features"):
        return Size((module.out_features, module.in_features))
    return Size((module.outfeatures, module.infeatures))


# --- lowrank's own --------------------------------------------------------------------------------


OWN = Backend(
    "QuantisedLinear",
    lambda module: isinstance(module, QuantisedLinear),
    "weight",
    lambda layer: layer.quantisation,  # type: ignore[return-value,arg-type]
    held=lambda layer: layer.packed,
    install=lambda layer, packed: setattr(layer, "packed", packed),
    read=lambda layer, packed: dequantise(packed, layer.quantisation, layer.shape),  # type: ignore[arg-type]
    made=lambda layer, W: quantise(W, layer.quantisation),  # type: ignore[arg-type]
    moved=lambda packed, fn: type(packed)(
        *(None if tensor is None else tensor.to(fn(tensor).device) for tensor in packed)
    ),
    refusal=lambda layer, trained: "",
)


BACKENDS: list[Backend] = [
    OWN,
    Backend(
        "Linear4bit",
        bitsandbytes_layers.is_4bit,
        "weight",
        bitsandbytes_layers.quantisation_4bit,
        bitsandbytes_layers.held_4bit,
        bitsandbytes_layers.install_4bit,
        bitsandbytes_layers.read_4bit,
        bitsandbytes_layers.made_4bit,
        bitsandbytes_layers.moved_4bit,
        bitsandbytes_layers.refusal_4bit,
    ),
    Backend(
        "Linear8bitLt",
        bitsandbytes_layers.is_8bit,
        "weight",
        lambda layer: Quantisation("int8", "bitsandbytes"),
        bitsandbytes_layers.held_8bit,
        bitsandbytes_layers.install_8bit,
        bitsandbytes_layers.read_8bit,
        bitsandbytes_layers.made_8bit,
        bitsandbytes_layers.moved_8bit,
        bitsandbytes_layers.refusal_8bit,
    ),
    Backend(
        "torchao",
        torchao_tensors.is_writable,
        "weight",
        torchao_tensors.quantisation,
        torchao_tensors.held,
        torchao_tensors.install,
        torchao_tensors.read,
        torchao_tensors.made,
        torchao_tensors.moved,
        torchao_tensors.refusal,
    ),
    Backend(
        "torchao (read-only)",
        torchao_tensors.is_readable,
        "weight",
        torchao_tensors.quantisation,
        torchao_tensors.held,
        torchao_tensors.install,
        torchao_tensors.read,
        None,
        torchao_tensors.moved,
        torchao_tensors.refusal,
    ),
    *[
        Backend(
            f"{name} (read-only)",
            matches,
            weight,
            quantisation,
            called_layers.held,
            called_layers.install,
            called_layers.read,
            None,
            called_layers.moved,
            called_layers.refusal,
        )
        for name, matches, weight, quantisation in (
            ("HQQ", called_layers.is_hqq, "W_q", called_layers.hqq_quantisation),
            ("AWQ", called_layers.is_awq, "qweight", called_layers.awq_quantisation),
            ("GPTQ", called_layers.is_gptq, "qweight", called_layers.gptq_quantisation),
        )
    ],
]
