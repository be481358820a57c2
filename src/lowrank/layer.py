"""`LoraLayer`: a frozen base layer with any number of adapters on it, under PEFT's parameter names.

One forward and one merge serve every kind of layer: what differs is in the `Kind` (lowrank.bases.kinds).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.bases.kinds import EMBEDDING, Kind
from lowrank.errors import AdapterNameError, MergeError, ShapeError
from lowrank.init import EMBEDDING_INITS, INITS
from lowrank.lora import Lora, check_shapes, initial_magnitude, merged_weight_norm, weight_change
from lowrank.mixed_batch import mixed_forward
from lowrank.routing import Routing

RANK_DIMENSION = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}


def with_rank(parameter: str, tensor: Tensor, r: int) -> Tensor:
    """The tensor of an adapter, cut to rank `r` or padded to it with zeros, which change nothing.

    parameter: its name within its layer, `lora_A.default.weight`. What has no rank comes back as it is.
    """
    dimension = RANK_DIMENSION.get(parameter.partition(".")[0])
    if dimension is None or tensor.ndim < 2 or tensor.shape[dimension] == r:
        return tensor
    if tensor.shape[dimension] > r:
        return tensor.narrow(dimension, 0, r)
    shape = list(tensor.shape)
    shape[dimension] = r
    padded = tensor.new_zeros(shape)
    padded.narrow(dimension, 0, tensor.shape[dimension]).copy_(tensor)
    return padded


class Factor(nn.Module):
    """One named tensor of an adapter (A, B or the magnitude), so that its parameter ends in `.weight`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.weight.dtype}"


class LoraLayer(nn.Module):
    """`base_layer` with adapters. Attributes of the base layer (`in_features`, `weight`, …) answer as before.

    r, lora_alpha, scaling, use_dora, lora_bias: by adapter name. `merged_adapters` are those whose change
    is in the base weight at present.
    """

    adapter_layer_names = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )

    def __init__(self, base_layer: nn.Module, kind: Kind, routing: Routing | None = None):
        super().__init__()
        self.base_layer = base_layer
        self.kind = kind
        self.routing = routing or Routing()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float | Tensor] = {}  # a tensor once prepared for hotswapping
        self.use_dora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active: list[str] = []
        self._disabled = False
        self._initial_scaling: dict[str, float] = {}
        self._unmerged: Any = None  # snapshot of the weight and bias while something is merged
        self._merge_again: list[str] = []  # what was merged when the adapters were disabled

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            hidden = name == "reset_parameters" or (
                name.startswith("_") and name != "_qkv_same_embed_dim"
            )
            if base is None or hidden:
                raise
            if self.kind.weight_taken and name in (self.kind.weight, self.kind.bias):
                # whoever takes the weight to compute with it, as MultiheadAttention does with its
                # out_proj, gets the one with the adapters in it
                return self._weights_with(self._live()).get(name, getattr(base, name))
            return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # tie_weights() of transformers: lm_head.weight = embed_tokens.weight
        kind = self.__dict__.get("kind")
        if kind and name in (kind.weight, kind.bias) and isinstance(value, nn.Parameter):
            self._replace_base_parameter(name, value)
        else:
            super().__setattr__(name, value)

    def _replace_base_parameter(self, name: str, value: nn.Parameter) -> None:
        merged, again = self.merged_adapters, self._merge_again
        self.unmerge()
        setattr(self.base_layer, name, value)
        for adapter in self.r:
            try:
                check_shapes(self.unmerged_weight().shape, self.lora(adapter))
            except ShapeError as error:
                raise ShapeError(
                    f"Adapter {adapter!r}: {error} Resize a vocabulary before get_peft_model."
                ) from error
        self.merge(adapter_names=merged)
        self._merge_again = again

    def extra_repr(self) -> str:
        return f"kind={self.kind.name!r}, r={self.r}, active={self._active}"

    # --- adapters ---------------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        *,
        r: int,
        lora_alpha: float,
        scaling: float,
        dropout: float = 0.0,
        use_dora: bool = False,
        lora_bias: bool = False,
        init: bool | str = True,
        dtype: torch.dtype | None = None,
        meta: bool = False,
    ) -> None:
        """A new adapter, not yet active. Its tensors are of `dtype` (None: the base weight's), on the base
        weight's device, or on the meta device with `meta`, to be filled by loading."""
        if name in self.r:
            raise AdapterNameError(f"This layer already has an adapter named {name!r}.")
        layout = self.kind.layout
        weight = self.base_layer.get_parameter(self.kind.weight)
        shape = self.kind.shape(self.base_layer)
        device = torch.device("meta") if meta else weight.device
        dtype = dtype or weight.dtype
        inits = EMBEDDING_INITS if layout is EMBEDDING else INITS
        with torch.device("meta" if device.type == "meta" else "cpu"):
            start = inits[init](self.unmerged_weight, shape, r, scaling)
        A = start.A.to(device, dtype).view(layout.A_shape(weight.shape, shape, r))
        B = start.B.to(device, dtype).view(layout.B_shape(weight.shape, shape, r))
        if layout is EMBEDDING:
            self.lora_embedding_A[name] = nn.Parameter(A)
            self.lora_embedding_B[name] = nn.Parameter(B)
        else:
            bias = torch.zeros(shape[0], device=device, dtype=dtype) if lora_bias else None
            self.lora_A[name] = Factor(A)
            self.lora_B[name] = Factor(B, bias)
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.scaling[name] = self._initial_scaling[name] = scaling
        self.use_dora[name], self.lora_bias[name] = use_dora, lora_bias
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.train(self.base_layer.training)
        if use_dora:
            with torch.no_grad():
                W = (
                    torch.empty(shape, device="meta")
                    if device.type == "meta"
                    else self.unmerged_weight()
                )
                magnitude = initial_magnitude(W, self.lora(name)).to(dtype)
            self.lora_magnitude_vector[name] = Factor(
                magnitude.view(layout.magnitude_shape(weight.shape, shape))
            )
        self._set_requires_grad([name], False)

    def delete_adapter(self, name: str) -> None:
        """Removes the adapter, if this layer has it. It must not be merged."""
        if name in self.merged_adapters:
            raise MergeError(
                f"Adapter {name!r} is merged: unmerge_adapter() first, then delete it."
            )
        if name not in self.r:
            return
        for attribute in self.adapter_layer_names:
            holder = getattr(self, attribute)
            if name in holder:
                del holder[name]
        del self.lora_dropout[name]
        for values in (
            self.r,
            self.lora_alpha,
            self.scaling,
            self.use_dora,
            self.lora_bias,
            self._initial_scaling,
        ):
            del values[name]
        self._active = [active for active in self._active if active != name]

    def lora(self, name: str) -> Lora:
        """The adapter in matrix form; A, B and the magnitude are views of its parameters."""
        if self.kind.layout is EMBEDDING:
            A, B, bias = self.lora_embedding_A[name], self.lora_embedding_B[name], None
        else:
            down: Any = self.lora_A[name]
            up: Any = self.lora_B[name]
            A, B, bias = down.weight, up.weight, up.bias
        magnitude = None
        if name in self.lora_magnitude_vector:
            factor: Any = self.lora_magnitude_vector[name]
            magnitude = factor.weight.reshape(-1)
        return Lora(A.flatten(1), B.flatten(1), self.scaling[name], magnitude, bias)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their name within this layer, `lora_A.<name>.weight` and so on."""
        if self.kind.layout is EMBEDDING:
            found = {
                f"lora_embedding_A.{name}": self.lora_embedding_A[name],
                f"lora_embedding_B.{name}": self.lora_embedding_B[name],
            }
        else:
            found = {
                f"lora_A.{name}.weight": self.lora_A[name].weight,
                f"lora_B.{name}.weight": self.lora_B[name].weight,
            }
            if self.lora_bias[name]:
                found[f"lora_B.{name}.bias"] = self.lora_B[name].bias
        if self.use_dora[name]:
            found[f"lora_magnitude_vector.{name}.weight"] = self.lora_magnitude_vector[name].weight
        return found

    # --- which of them act ------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """These adapters act from now on, and only they can be trained (none, with `inference_mode`)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._active, self._merge_again = names, []
        self._set_requires_grad(list(self.r), False)
        if not inference_mode:
            self._set_requires_grad([name for name in names if name in self.r], True)

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Makes the parameters of these adapters trainable, or frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._set_requires_grad([name for name in names if name in self.r], requires_grad)

    def _set_requires_grad(self, names: Iterable[str], requires_grad: bool) -> None:
        for name in names:
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Disabled, the layer is its base layer. What was merged is taken out, and put back when enabled."""
        if enabled == (not self._disabled):
            return
        self._disabled = not enabled
        if enabled:
            names, self._merge_again = self._merge_again, []
            self.merge(adapter_names=names)
        else:
            names = list(self.merged_adapters)
            self.unmerge()
            self._merge_again = names

    def set_scale(self, adapter: str, scale: float) -> None:
        """`scale` times the adapter's own scaling."""
        if adapter in self.scaling:
            self._set_scaling(adapter, scale * self._initial_scaling[adapter])

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scaling of the active adapters."""
        for name in self._active:
            if name in self.scaling:
                self._set_scaling(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides by `scale`, or goes back to each adapter's own scaling."""
        for name in self._active:
            if name in self.scaling:
                initial = self._initial_scaling[name]
                self._set_scaling(name, initial if scale is None else self.scaling[name] / scale)

    def _set_scaling(self, name: str, value: float | Tensor) -> None:
        now = self.scaling[name]
        if isinstance(now, Tensor):
            now.fill_(value)  # in place: compiled code goes on reading this tensor
        else:
            self.scaling[name] = value

    def scale_by_tensor(self, name: str) -> None:
        """From now on the scaling is a tensor (), which compiled code reads anew in each forward."""
        weight = self.base_layer.get_parameter(self.kind.weight)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.scaling[name] = torch.as_tensor(self.scaling[name], dtype=dtype, device=weight.device)

    def describe(self, name: str, r: int, lora_alpha: float, scaling: float) -> None:
        """Other numbers for an adapter whose tensors are being replaced."""
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self._initial_scaling[name] = scaling
        self._set_scaling(name, scaling)

    def _live(self) -> list[str]:
        """The adapters that this layer must add itself: active, present and not merged."""
        if self._disabled:
            return []
        return [
            name for name in self._active if name in self.r and name not in self.merged_adapters
        ]

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.routing.names is not None:
            return mixed_forward(self, *args, **kwargs)
        names = self._live()
        if not names:
            return self.base_layer(*args, **kwargs)
        if self.kind.op is None:
            return functional_call(self.base_layer, self._weights_with(names), args, kwargs)
        y = base_output = self.base_layer(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))  # nn.Linear calls it `input`
        for name in names:
            y = self.add_output_change(name, x, base_output, y)
        return y

    def add_output_change(self, name: str, x: Tensor, base_output: Tensor, y: Tensor) -> Tensor:
        """`y` and what the adapter adds to the base layer's output, in y's dtype."""
        op, lora, base = self.kind.op, self.lora(name), self.base_layer
        assert op is not None
        # the small A and B take the dtype of the large x, never the reverse
        dtype = x.dtype if op.floating else y.dtype
        h = op.down(base, x, lora.A.to(dtype), self.lora_dropout[name])
        scaling = lora.scaling
        if isinstance(scaling, Tensor):  # low_rank_add takes a number
            h, scaling = h * scaling, 1.0
        if op.up_onto and lora.bias is None and lora.magnitude is None:
            return op.up_onto(y, h.to(y.dtype), lora.B.to(y.dtype), scaling)
        z = op.up(base, h * scaling, lora.B.to(h.dtype)).to(y.dtype)
        along = [1] * y.ndim
        along[op.channel(base)] = -1
        if lora.bias is not None:
            z = z + (lora.bias * lora.scaling).to(y.dtype).view(along)
        if lora.magnitude is None:
            return y + z
        # Liu et al. 2024, eq. 5: y = c·(W + ΔW)x + b with c = m / ‖W + ΔW‖
        c = (lora.magnitude / merged_weight_norm(self.unmerged_weight(), lora)).view(along)
        bias = getattr(base, self.kind.bias, None)
        without_bias = base_output if bias is None else base_output - bias.to(y.dtype).view(along)
        # in bfloat16 a c near 1 would be 1, and c − 1 nothing
        return y + (c - 1).to(y.dtype) * without_bias + c.to(y.dtype) * z

    def _weights_with(self, names: list[str]) -> dict[str, Tensor]:
        """The base layer's weight, and its bias if one changes, with the adapters in them; with autograd."""
        if not names:
            return {}
        store = self.kind.store(self.base_layer)
        W, original = store.read(), self.unmerged_weight()
        change = sum(weight_change(original, self.lora(name)) for name in names)
        found = {self.kind.weight: store.shaped((W + change).to(W.dtype))}
        biases = [
            lora.bias * lora.scaling for lora in map(self.lora, names) if lora.bias is not None
        ]
        if biases:
            bias = getattr(self.base_layer, self.kind.bias)
            start = torch.zeros_like(biases[0]) if bias is None else bias
            found[self.kind.bias] = sum(biases, start).to(W.dtype)
        return found

    # --- merge ------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters (None: the active ones) to the base weight, in float32.

        The merged weight is always made from the unmerged one, so that merging one by one rounds once.
        `safe_merge` is accepted for compatibility: every merge is checked. Raises MergeError, with the base
        untouched, if the result is not finite or a bias has nowhere to go.
        """
        wanted = self._active if adapter_names is None else adapter_names
        new = [name for name in wanted if name in self.r and name not in self.merged_adapters]
        if not new:
            return
        if self._disabled:
            raise MergeError("The adapters are disabled: enable_adapter_layers() before merging.")
        names = self.merged_adapters + new
        left = [name for name in self._active if name in self.r and name not in names]
        if any(self.use_dora[name] for name in left):
            raise MergeError(
                f"Adapters {left} use DoRA and stay active: merge them together with {new}, or none."
            )
        loras = [self.lora(name) for name in names]
        store, base = self.kind.store(self.base_layer), self.base_layer
        with torch.no_grad():
            W = self.unmerged_weight()
            accumulation = torch.promote_types(W.dtype, torch.float32)
            merged = (W.to(accumulation) + sum(weight_change(W, lora) for lora in loras)).to(
                W.dtype
            )
            biases = [lora.bias * lora.scaling for lora in loras if lora.bias is not None]
            bias = self._unmerged[1] if self._unmerged else getattr(base, self.kind.bias, None)
            if biases and bias is None:
                raise MergeError(
                    f"Adapters {names} have a bias (lora_bias=True) and the base layer has none to add it to."
                )
            merged_bias: Tensor | None = None
            if bias is not None and biases:
                wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
                merged_bias = sum(biases, wide).to(bias.dtype)
            for tensor in (merged, merged_bias):
                if tensor is not None and not torch.isfinite(tensor).all():
                    raise MergeError(
                        f"Merging {names} gives NaN or infinity in {tensor.dtype}; this layer is as it was."
                    )
            if self._unmerged is None:
                self._unmerged = (store.snapshot(), bias)
            store.write(merged)
            if bias is not None and merged_bias is not None:
                base._parameters[self.kind.bias] = nn.Parameter(
                    merged_bias, requires_grad=bias.requires_grad
                )
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Puts the base weight back as it was before the merge, every bit of it."""
        self._merge_again = []
        if self._unmerged is None:
            return
        weight, bias = self._unmerged
        self.kind.store(self.base_layer).restore(weight)
        if bias is not None:
            self.base_layer._parameters[self.kind.bias] = bias
        self._unmerged, self.merged_adapters = None, []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoraLayer":
        """`.to()` and the like also take along what `unmerge` will put back."""
        super()._apply(fn, recurse)
        for saved in self._unmerged or ():
            if isinstance(saved, nn.Parameter):
                saved.data = fn(saved.data)
        for name, scaling in self.scaling.items():
            if isinstance(scaling, Tensor):
                self.scaling[name] = scaling.to(fn(scaling).device)
        return self

    def forget_unmerged(self) -> None:
        """Makes what is merged final: the unmerged weight is let go, and `unmerge` does nothing."""
        self._unmerged = None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in that weight's own shape; float32."""
        change = weight_change(self.unmerged_weight(), self.lora(adapter))
        return self.kind.store(self.base_layer).shaped(change)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def unmerged_parameters(self) -> dict[str, Tensor]:
        """What a merge has replaced, as it was, by its name within this layer; empty if nothing is merged."""
        if self._unmerged is None:
            return {}
        weight = self.kind.store(self.base_layer).shaped(self.unmerged_weight())
        found = {f"base_layer.{self.kind.weight}": weight}
        if self._unmerged[1] is not None:
            found[f"base_layer.{self.kind.bias}"] = self._unmerged[1]
        return found

    def unmerged_weight(self) -> Tensor:
        """W (out, in) without any adapter in it."""
        store = self.kind.store(self.base_layer)
        return store.read() if self._unmerged is None else store.read_snapshot(self._unmerged[0])
