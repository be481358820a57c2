"""`QuantisedLinear`: a linear layer in 4 or 8 bits that runs wherever torch does."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import QuantisationError
from lowrank.kernels.quantisation import (
    NESTED_BLOCK_SIZE,
    Packed,
    dequantise,
    quantise,
    table,
)
from lowrank.kernels.quantised_linear import quantised_linear
from lowrank.quantisation import Quantisation

FORMATS = ("nf4", "fp4", "int8")
_SCALES = ("absmax", "nested_absmax", "offset")


class QuantisedLinear(nn.Module):
    """x·Wᵀ + b with a frozen W in few bits: "nf4" or "fp4" in blocks, doubly quantised if so wished, or "int8".

    What it holds is bitsandbytes' to the byte, and so is its state dict: what was saved from one's layers is
    loaded into the other's. A state dict with W in floating point is quantised as it is loaded. A forward keeps
    what is packed, and backward dequantises it again.
    weight: the codes. compute_dtype: of the product; None: x's (in autocast, that of autocast). dtype: that of
    the weight which was quantised.
    Raises QuantisationError for another format.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quantisation: Quantisation = Quantisation("nf4"),  # noqa: B008 - it is frozen
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if quantisation.format not in FORMATS or quantisation.backend != "lowrank":
            raise QuantisationError(
                f"A QuantisedLinear holds {', '.join(FORMATS)} of backend 'lowrank', not {quantisation}."
            )
        self.in_features, self.out_features = in_features, out_features
        self.quantisation, self.compute_dtype = quantisation, compute_dtype
        self.dtype = dtype or torch.get_default_dtype()
        for name in _SCALES:
            self.register_buffer(name, None, persistent=False)  # saved under bitsandbytes' names
        self.quantise(torch.zeros(out_features, in_features, device=device, dtype=self.dtype))
        empty = torch.zeros(out_features, device=device, dtype=self.dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quantisation: Quantisation,
        compute_dtype: torch.dtype | None = None,
    ) -> "QuantisedLinear":
        """The layer with its weight quantised; its bias is the same parameter. Also on the meta device."""
        return cls.from_weight(linear.weight, linear.bias, quantisation, compute_dtype)

    @classmethod
    def from_weight(
        cls,
        W: Tensor,
        bias: nn.Parameter | None,
        quantisation: Quantisation,
        compute_dtype: torch.dtype | None = None,
    ) -> "QuantisedLinear":
        """A layer with W (out, in), quantised, and this very bias (out,)."""
        out, in_ = W.shape
        layer = cls(in_, out, False, quantisation, compute_dtype, "meta", W.dtype)
        layer.quantise(W)
        layer.bias = bias
        return layer

    def quantise(self, W: Tensor) -> None:
        """Takes on W (out, in), rounded. The tensors that were held stay as they are."""
        if W.shape != (self.out_features, self.in_features):
            raise QuantisationError(
                f"A weight of {tuple(W.shape)} for a layer of (out, in) = {(self.out_features, self.in_features)}."
            )
        self.packed = quantise(W, self.quantisation)

    @property
    def packed(self) -> Packed:
        """What is held: the codes and their scales."""
        return Packed(self.weight, self.absmax, self.nested_absmax, self.offset)  # type: ignore[arg-type]

    @packed.setter
    def packed(self, packed: Packed) -> None:
        codes: Any = packed.codes
        self.weight = codes if isinstance(codes, nn.Parameter) else nn.Parameter(codes, False)
        for name, tensor in zip(_SCALES, packed[1:], strict=True):
            self._buffers[name] = tensor

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (out, in) as the layer stands for it; a new tensor."""
        return dequantise(self.packed, self.quantisation, self.shape, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of W."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        given = self.compute_dtype or x.dtype
        dtype = torch.get_autocast_dtype(device) if autocast else given
        bias = None if self.bias is None else self.bias.to(dtype)
        y = quantised_linear(x.to(dtype), self.packed, self.quantisation, self.out_features, bias)
        return y if autocast else y.to(x.dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.quantisation}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantisedLinear":
        """`.to(dtype)` and the like leave the scales in float32."""
        before = {name: self._buffers[name] for name in _SCALES}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = self._buffers[name]
            if tensor is not None and now is not None and now.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(now.device)
        return self

    # --- state dict, in bitsandbytes' form -------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._saved().items():
            destination[prefix + name] = tensor

    def _saved(self) -> dict[str, Tensor]:
        """What bitsandbytes saves beside `weight` and `bias`; the tables are each layer's own, as safetensors wants."""
        packed, q = self.packed, self.quantisation
        device = packed.codes.device
        if q.format == "int8":
            rows = torch.zeros((), dtype=torch.uint8)  # the layout by rows, the only one left
            return {"SCB": packed.absmax, "weight_format": rows}
        values: dict[str, Any] = {
            "quant_type": q.format,
            "blocksize": q.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": self.shape,
        }
        found = {"absmax": packed.absmax, "quant_map": table(q.format, device).clone()}
        if packed.nested_absmax is not None and packed.offset is not None:
            found["nested_absmax"] = packed.nested_absmax
            found["nested_quant_map"] = table("dynamic", device).clone()
            values["nested_blocksize"] = NESTED_BLOCK_SIZE
            values["nested_dtype"] = "float32"
            values["nested_offset"] = 0.0 if packed.offset.is_meta else packed.offset.item()
        text = json.dumps(values).encode()
        found[f"quant_state.bitsandbytes__{q.format}"] = torch.tensor([*text], dtype=torch.uint8)
        return {f"weight.{name}": tensor for name, tensor in found.items()}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        here = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
        W = here.pop("weight", None)
        if W is None:
            missing_keys.append(prefix + "weight")
        else:
            try:
                self._load(W, here, bool(local_metadata.get("assign_to_params_buffers")))
            except KeyError as error:
                missing_keys.append(prefix + error.args[0])
            except (QuantisationError, ValueError) as error:
                error_msgs.append(f"{prefix}weight: {error}")
        rest = {prefix + name: tensor for name, tensor in here.items()}
        weight = self._parameters.pop("weight")  # its part is done
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._parameters = {"weight": weight, **self._parameters}

    def _load(self, W: Tensor, others: dict[str, Tensor], assign: bool) -> None:
        """Takes on W and what belongs to it, which is taken out of `others`. Raises KeyError for what is missing."""
        if W.is_floating_point() and "weight.absmax" not in others:
            new = quantise(
                W.to(self.weight.device if not self.weight.is_meta else W.device), self.quantisation
            )
        else:
            new = self._from_saved(W, others)
        old = self.packed
        for then, now in zip(old, new, strict=True):
            if then is not None and now is not None and then.shape != now.shape:
                raise ValueError(
                    f"the file has {tuple(now.shape)} where the layer has {tuple(then.shape)}"
                )
        if assign or old.codes.is_meta:
            self.packed = new
            return
        with torch.no_grad():
            for then, now in zip(old, new, strict=True):
                if then is not None and now is not None:
                    then.copy_(now)

    def _from_saved(self, W: Tensor, others: dict[str, Tensor]) -> Packed:
        q = self.quantisation
        if q.format == "int8":
            others.pop("weight_format", None)
            if "SCB" not in others:
                raise KeyError("SCB")
            return Packed(W, others.pop("SCB"))
        own = {k: others.pop(k) for k in list(others) if k.startswith("weight.")}
        own = {k.removeprefix("weight."): t for k, t in own.items()}
        stated = [name for name in own if name.startswith("quant_state.bitsandbytes__")]
        needed = ["absmax", *(["nested_absmax"] if q.double else [])]
        absent = [name for name in needed if name not in own] or ["quant_state"] * (not stated)
        if absent:
            raise KeyError(f"weight.{absent[0]}")
        values = json.loads(bytes(own[stated[0]].tolist()))
        found = (values["quant_type"], values["blocksize"], "nested_absmax" in own)
        if found != (q.format, q.block_size, q.double):
            raise QuantisationError(
                f"the file has {found[0]} in blocks of {found[1]}{', doubly quantised' * found[2]}, the layer is {q}"
            )
        self.dtype = getattr(torch, values["dtype"])
        offset = None
        if q.double:
            offset = torch.tensor(values["nested_offset"], dtype=torch.float32, device=W.device)
        W = W.view(torch.uint8).reshape(-1, 1)  # another dtype may have stored the bytes
        return Packed(W, own["absmax"], own.get("nested_absmax"), offset)
