"""`LoraLayer`: a frozen base layer with any number of adapters on it, under PEFT's parameter names.

One forward and one merge serve every kind of layer: what differs is in the `Kind` (lowrank.bases.kinds).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.bases.kinds import EMBEDDING, EXPERTS, Kind
from lowrank.bases.stores import Store
from lowrank.errors import AdapterNameError, InitDataError, MergeError, ShapeError
from lowrank.factors import Factor, TiedFactor
from lowrank.init import WAITS_FOR, Init, Start, init_named, of_experts, taken_out
from lowrank.lora import (
    Lora,
    check_shapes,
    initial_magnitude,
    merged_bias,
    merged_weight,
    weight_change,
)
from lowrank.mixed_batch import mixed_forward, weights_for_all
from lowrank.output_change import add_output_change, output_in_one, weights_with
from lowrank.routing import Routing


class LoraLayer(nn.Module):
    """`base_layer` with adapters. Attributes of the base layer (`in_features`, `weight`, …) answer as before.

    Where several parameters of one module are adapted (target_parameters), each has a LoraLayer, one
    around the other; `get_base_layer()` is the module itself.
    r, lora_alpha, scaling, use_dora, lora_bias: by adapter name. `merged_adapters` are those whose change
    is in the base weight at present. `lora_start_A` and `lora_start_B` hold, as buffers, the factors that an
    adapter started from where its initialisation takes them out of W. W itself stays as it is.
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
        self.lora_start_A = nn.Module()
        self.lora_start_B = nn.Module()
        self.waiting: dict[str, str] = {}  # adapters without values, and the call that gives them
        self.merged_adapters: list[str] = []
        self._active: list[str] = []
        self._disabled = False
        self._initial_scaling: dict[str, float] = {}
        self.norms: dict[str, Any] = {}  # what DoRA's forward remembers
        self.merge_loss: float | None = None  # of the last merge into few bits, see `_rounded_off`
        self._unmerged: Any = None  # snapshot of the weight and bias while something is merged
        # the weight that is not in its place now: the original under LoftQ's quantised one, or, while the
        # adapters are disabled, the quantised one
        self._set_aside: tuple[Any, ...] = ()
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
                routed = self.routing.names is not None and not self._disabled
                found = weights_for_all(self) if routed else weights_with(self, self._live())
                return found.get(name, getattr(base, name))
            return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # tie_weights() of transformers: lm_head.weight = embed_tokens.weight
        if isinstance(value, nn.Parameter) and "kind" in self.__dict__:
            for layer in self.chain():
                if name in (layer.kind.weight, layer.kind.bias):
                    return layer._replace_base_parameter(name, value)
        super().__setattr__(name, value)

    def _replace_base_parameter(self, name: str, value: nn.Parameter) -> None:
        merged, again = self.merged_adapters, self._merge_again
        self.unmerge()
        setattr(self.get_base_layer(), name, value)
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
        init: bool | str | Init = True,
        dtype: torch.dtype | None = None,
        meta: bool = False,
    ) -> None:
        """A new adapter, not yet active. Its tensors are of `dtype` (None: the base weight's), on the base
        weight's device, or on the meta device with `meta`, to be filled by loading. init: a value of
        `init_lora_weights`, or the function itself, with all that it needs bound to it."""
        if name in self.r:
            raise AdapterNameError(f"This layer already has an adapter named {name!r}.")
        layout = self.kind.layout
        base = self.get_base_layer()
        store, shape = self._store, self.kind.shape(base)
        weight = store.parameter
        held = (
            weight.shape if store.exact else torch.Size(shape)
        )  # the form in which W is registered
        device = torch.device("meta") if meta else weight.device
        dtype = dtype or store.dtype
        empty = weight.device.type == "meta" or (
            meta and not callable(init) and not taken_out(init)
        )
        start = self._empty_start(init, r) if empty else self._start(init, r, scaling)
        A = layout.A_saved(start.A).to(device, dtype)
        A = A.reshape(layout.A_shape(held, shape, r)).contiguous()
        B = layout.B_saved(start.B).to(device, dtype)
        B = B.reshape(layout.B_shape(held, shape, r)).contiguous()
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
        if not callable(init) and init in WAITS_FOR:
            self.waiting[name] = WAITS_FOR[init]
        if start.base is not None and weight.device.type != "meta":
            self._set_aside = (store.snapshot(),)
            store.write(start.base)
        if start.taken_out:
            self._set_start(name, start)
        if use_dora:
            magnitude = torch.empty(*self._expert_shape(), shape[0], device=device, dtype=dtype)
            if device.type != "meta":
                with torch.no_grad():
                    magnitude = initial_magnitude(self.unmerged_weight(), self.lora(name)).to(dtype)
            self.lora_magnitude_vector[name] = Factor(
                magnitude.view(layout.magnitude_shape(held, shape))
            )
        self._set_requires_grad([name], False)

    def tie_adapter(
        self, name: str, leader: "LoraLayer", *, lora_alpha: float, scaling: float, dropout: float
    ) -> None:
        """A new adapter that is the embedding's of that name, transposed: this linear layer has its weight."""
        self.lora_A[name] = TiedFactor(leader, "lora_embedding_B", name)
        self.lora_B[name] = TiedFactor(leader, "lora_embedding_A", name)
        self.r[name], self.lora_alpha[name] = leader.r[name], lora_alpha
        self.scaling[name] = self._initial_scaling[name] = scaling
        self.use_dora[name] = self.lora_bias[name] = False
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.train(self.base_layer.training)

    def leader(self, name: str) -> "LoraLayer | None":
        """The embedding's layer whose adapter this one is too (ensure_weight_tying)."""
        factor = self.lora_A._modules.get(name)
        return factor.leader if isinstance(factor, TiedFactor) else None

    def renew(self, name: str, init: Init, *, r: int, lora_alpha: float, scaling: float) -> None:
        """Puts an adapter of another rank, perhaps, in the place of this one, with the values that `init` gives.

        It is as active and as trainable as before, with the same options. Raises MergeError if it is merged.
        """
        A, _ = self._factors(name)
        dropout, active, trainable = self.lora_dropout[name], self._active, A.requires_grad
        use_dora, lora_bias = self.use_dora[name], self.lora_bias[name]
        self.delete_adapter(name)
        self.add_adapter(
            name,
            r=r,
            lora_alpha=lora_alpha,
            scaling=scaling,
            dropout=getattr(dropout, "p", 0.0),
            use_dora=use_dora,
            lora_bias=lora_bias,
            init=init,
            dtype=A.dtype,
        )
        self._active = active
        self._set_requires_grad([name], trainable)

    def refuse_waiting(self, names: Iterable[str]) -> None:
        """Raises InitDataError if one of the adapters has no values yet: A is zero, unless a file was loaded into it."""
        for name in names:
            if name not in self.waiting:
                continue
            A, _ = self._factors(name)
            if A.is_meta or not A.any():
                raise InitDataError(
                    f"Adapter {name!r} has no values yet: {self.waiting[name]} gives them."
                )
            del self.waiting[name]

    def _start(self, init: bool | str | Init, r: int, scaling: float) -> Start:
        function = init if callable(init) else init_named(init, self.kind.layout is EMBEDDING)
        base = self.get_base_layer()
        shape, experts = self.kind.shape(base), self._expert_shape()
        if experts:
            function = of_experts(function, *experts)
        with torch.device("cpu"), torch.no_grad():
            start = function(self.unmerged_weight, shape, r, scaling)
        check_shapes(torch.Size((*experts, *shape)), Lora(start.A, start.B, scaling))
        return start

    def _empty_start(self, init: bool | str | Init, r: int) -> Start:
        (out, in_), experts = self.kind.shape(self.get_base_layer()), self._expert_shape()
        A = torch.empty(*experts, r, in_, device="meta")
        B = torch.empty(*experts, out, r, device="meta")
        return Start(A, B, callable(init) or taken_out(init))

    def _expert_shape(self) -> tuple[int, ...]:
        """(experts,) for fused experts, else ()."""
        return (self.experts,) if self.kind.layout is EXPERTS else ()

    @property
    def experts(self) -> int:
        """How many (out, in) matrices the weight holds: those of fused experts, else 1."""
        return self.kind.experts(self.get_base_layer()) if self.kind.layout is EXPERTS else 1

    def delete_adapter(self, name: str) -> None:
        """Removes the adapter, if this layer has it. It must not be merged."""
        if name in self.merged_adapters:
            raise MergeError(
                f"Adapter {name!r} is merged: unmerge_adapter() first, then delete it."
            )
        if name not in self.r:
            return
        self.set_start(name, None, None)
        self.waiting.pop(name, None)
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
        self.norms.pop(name, None)
        self.routing.invocations.pop(name, None)
        self._active = [active for active in self._active if active != name]
        if not self.r:
            self.restore_original()

    @property
    def adapters(self) -> list[str]:
        """The adapters that this layer has."""
        return list(self.r)

    def lora(self, name: str) -> Lora:
        """The adapter in matrix form; A, B and the magnitude are views of its parameters.

        With a start taken out of W, ΔW = scaling·(B·A − B₀·A₀) is written as one product of rank 2r,
        [B − B₀, B₀]·[A; A − A₀]: what training changed stands there by itself, so that a cast to bfloat16
        rounds the change, and not A and B, whose rounding would be as large as the change.
        """
        A, B = self._factors(name)
        bias: Any = self.lora_B[name].bias if name in self.lora_B else None
        magnitude = None
        if name in self.lora_magnitude_vector:
            factor: Any = self.lora_magnitude_vector[name]
            magnitude = factor.weight.reshape(*self._expert_shape(), -1)
        layout, experts = self.kind.layout, self.experts
        A, B = layout.A_matrix(A, experts), layout.B_matrix(B, experts)
        if name in self.lora_start_A._buffers:
            A_0 = layout.A_matrix(self.lora_start_A.get_buffer(name), experts)
            B_0 = layout.B_matrix(self.lora_start_B.get_buffer(name), experts)
            A, B = torch.cat([A, A - A_0], -2), torch.cat([B - B_0, B_0], -1)
        return Lora(A, B, self.scaling[name], magnitude, bias)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The parameters A and B, in the shapes in which they are registered and saved."""
        if self.kind.layout is EMBEDDING:
            return self.lora_embedding_A[name], self.lora_embedding_B[name]
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        return down.weight, up.weight

    def room(self, name: str) -> int:
        """The rank that the parameters A and B have room for: r, or more where hotswapping padded them."""
        return self._factors(name)[0].shape[0] // self.experts

    def rank(self, name: str) -> int:
        """The rank of `lora(name)`: r, or 2r if the adapter's start is taken out of W."""
        return self.r[name] * (2 if name in self.lora_start_A._buffers else 1)

    def start_factors(self, name: str) -> dict[str, Tensor]:
        """A₀ and B₀ by the names of the parameters that they belong to; empty if nothing is taken out of W."""
        if name not in self.lora_start_A._buffers:
            return {}
        starts = (self.lora_start_A.get_buffer(name), self.lora_start_B.get_buffer(name))
        return dict(zip(self.adapter_parameters(name), starts, strict=False))

    @property
    def quantised_by(self) -> str | None:
        """The adapter, the first, for which LoftQ put another weight in the place of the original."""
        return next(iter(self.r), None) if self._set_aside else None

    def original_weight(self) -> Tensor:
        """W (out, in) as it was before any adapter, LoftQ's quantisation included."""
        if self._set_aside and not self._disabled:
            return self.kind.store(self.get_base_layer()).read_snapshot(self._set_aside[0])
        return (
            self.kind.store(self.get_base_layer()).read()
            if self._set_aside
            else self.unmerged_weight()
        )

    def restart(self, name: str, init: bool | str | Init) -> None:
        """Puts the adapter's start, not the adapter, to what `init` gives for this layer's W."""
        self._set_start(name, self._start(init, self.r[name], self._initial_scaling[name]))

    def _set_start(self, name: str, start: Start) -> None:
        layout = self.kind.layout
        self.set_start(name, layout.A_saved(start.A), layout.B_saved(start.B))

    def set_start(self, name: str, A: Tensor | None, B: Tensor | None) -> None:
        """Makes A and B the factors that the adapter started from; None: nothing is taken out of W.

        In the order in which they are saved; copied. Raises ShapeError for another number of entries.
        """
        holders = (self.lora_start_A, self.lora_start_B)
        for holder, tensor, parameter in zip(holders, (A, B), self._factors(name), strict=True):
            holder._buffers.pop(name, None)
            if tensor is None:
                continue
            if tensor.numel() != parameter.numel():
                raise ShapeError(
                    f"A start of shape {tuple(tensor.shape)} does not fit a factor of {tuple(parameter.shape)}."
                )
            device = self.unmerged_parameter().device
            value = tensor.detach().to(device, parameter.dtype, copy=True)
            value = value.reshape(parameter.shape)
            holder.register_buffer(name, value)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their name within this layer, `lora_A.<name>.weight` and so on.

        None where the adapter is another layer's.
        """
        if self.leader(name) is not None:
            return {}
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
        """Disabled, the layer is its base layer. What was merged is taken out, and put back when enabled.

        Enabled, it enables the copies of modules_to_save too, which transformers' `model.enable_adapters` forgets.
        """
        while enabled and self.routing.disabled_copies:
            self.routing.disabled_copies[-1].enable_adapters(True)
        if enabled == (not self._disabled):
            return
        self._disabled = not enabled
        if enabled:
            self._exchange()
            names, self._merge_again = self._merge_again, []
            self.merge(adapter_names=names)
        else:
            names = list(self.merged_adapters)
            self.unmerge()
            self._merge_again = names
            self._exchange()

    def _exchange(self) -> None:
        """Puts the weight that was set aside, if any, in the place of the other."""
        if self._set_aside:
            store = self._store
            (saved,), self._set_aside = self._set_aside, (store.snapshot(),)
            store.restore(saved)

    def restore_original(self) -> None:
        """Lets go of a quantised weight (LoftQ) for the one that it was made from. Nothing may be merged."""
        if self._set_aside and not self._disabled:
            self._exchange()
        self._set_aside = ()

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
        store = self._store
        dtype = torch.promote_types(store.dtype, torch.float32)
        device = store.parameter.device
        self.scaling[name] = torch.as_tensor(self.scaling[name], dtype=dtype, device=device)

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
        if self.waiting and not self._disabled:
            self.refuse_waiting(self.routing.names or self._active)
        if self.routing.names is not None:
            return mixed_forward(self, *args, **kwargs)
        if self.kind.op is None:
            replaced: dict[str, Tensor] = {}
            for layer in self.chain():
                replaced |= weights_with(layer, layer._live())
            base = self.get_base_layer()
            return (
                functional_call(base, replaced, args, kwargs) if replaced else base(*args, **kwargs)
            )
        names = self._live()
        if not names:
            return self.base_layer(*args, **kwargs)
        in_one = output_in_one(self, names, args, kwargs)
        if in_one is not None:
            return in_one
        y = base_output = self.base_layer(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))  # nn.Linear calls it `input`
        for name in names:
            y = add_output_change(self, name, x, base_output, y)
        return y

    # --- merge ------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters (None: the active ones) to the base weight, in float32.

        The merged weight is always made from the unmerged one, so that merging one by one rounds once.
        `safe_merge` is accepted for compatibility: every merge is checked. Raises MergeError, with the base
        untouched, if the result is not finite or a bias has nowhere to go.
        """
        wanted = self._active if adapter_names is None else adapter_names
        self.refuse_waiting(wanted)
        new = [name for name in wanted if name in self.r and name not in self.merged_adapters]
        if not new:
            return
        names = self.merged_adapters + new
        self._refuse_to_merge(new, names)
        loras = [self.lora(name) for name in names]
        base = self.get_base_layer()
        with torch.no_grad():
            bias = self._unmerged[1] if self._unmerged else getattr(base, self.kind.bias, None)
            if bias is None and any(lora.bias is not None for lora in loras):
                raise MergeError(
                    f"Adapters {names} have a bias (lora_bias=True) and the base layer has none to add it to."
                )
            weight = merged_weight(self.unmerged_weight(), *loras)
            new_bias = None if bias is None else merged_bias(bias, *loras)
            for tensor in (weight, new_bias):
                if tensor is not None and not torch.isfinite(tensor).all():
                    raise MergeError(
                        f"Merging {names} gives NaN or infinity in {tensor.dtype}; this layer is as it was."
                    )
            if self._unmerged is None:
                self._unmerged = (self._store.snapshot(), bias)
            self._store.write(weight)
            self.merge_loss = self._rounded_off(weight)
            if bias is not None and new_bias is not None:
                base._parameters[self.kind.bias] = nn.Parameter(
                    new_bias, requires_grad=bias.requires_grad
                )
        self.merged_adapters = names

    def _rounded_off(self, weight: Tensor) -> float | None:
        """How far what is stored is from `weight`, as a share of how far that is from W; None where nothing is rounded."""
        store = self._store
        if store.exact:
            return None
        change = (weight - self.unmerged_weight()).norm()
        return ((store.read() - weight).norm() / change).item() if change > 0 else None

    def _refuse_to_merge(self, new: list[str], names: list[str]) -> None:
        """Raises MergeError if `new` cannot be merged. names: all that would then be merged."""
        activated = [name for name in new if name in self.routing.invocations]
        if activated:
            raise MergeError(
                f"Adapters {activated} are activated LoRAs: they act on part of the positions only, which no weight can do."
            )
        if self._disabled:
            raise MergeError("The adapters are disabled: enable_adapter_layers() before merging.")
        if self._store.read_only:
            raise MergeError(self._store.read_only)
        left = [name for name in self._active if name in self.r and name not in names]
        if any(self.use_dora[name] for name in left):
            raise MergeError(
                f"Adapters {left} use DoRA and stay active: merge them together with {new}, or none."
            )

    def unmerge(self) -> None:
        """Puts the base weight back as it was before the merge, every bit of it."""
        self._merge_again = []
        if self._unmerged is None:
            return
        weight, bias = self._unmerged
        self._store.restore(weight)
        if bias is not None:
            self.get_base_layer()._parameters[self.kind.bias] = bias
        self._unmerged, self.merged_adapters, self.merge_loss = None, [], None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoraLayer":
        """`.to()` and the like also take along what `unmerge` will put back."""
        super()._apply(fn, recurse)
        store = self._store
        self._set_aside = tuple(store.moved(saved, fn) for saved in self._set_aside)
        if self._unmerged is not None:
            weight, bias = self._unmerged
            if bias is not None:
                bias.data = fn(bias.data)
            self._unmerged = store.moved(weight, fn), bias
        for name, scaling in self.scaling.items():
            if isinstance(scaling, Tensor):
                self.scaling[name] = scaling.to(fn(scaling).device)
        return self

    def forget_unmerged(self) -> None:
        """Makes what is merged final: the unmerged weight is let go, and `unmerge` does nothing."""
        self._unmerged, self._set_aside = None, ()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in that weight's own shape; float32."""
        change = weight_change(self.unmerged_weight(), self.lora(adapter))
        return self._store.shaped(change)

    def get_base_layer(self) -> nn.Module:
        """The module without any adapter around it."""
        return self.chain()[-1].base_layer

    @property
    def _store(self) -> Store:
        return self.kind.store(self.get_base_layer())

    def chain(self) -> "list[LoraLayer]":
        """This layer and those inside it that adapt other parameters of the same module, outermost first."""
        found = [self]
        while isinstance(found[-1].base_layer, LoraLayer):
            found.append(found[-1].base_layer)
        return found

    def unmerged_parameters(self) -> dict[str, Tensor]:
        """What a merge has replaced, as it was, by its name within this layer; empty if nothing is merged."""
        if self._unmerged is None:
            return {}
        weight = self._store.shaped(self.unmerged_weight())
        base = "base_layer." * len(self.chain())
        found = {f"{base}{self.kind.weight}": weight}
        if self._unmerged[1] is not None:
            found[f"{base}{self.kind.bias}"] = self._unmerged[1]
        return found

    def unmerged_parameter(self) -> Tensor:
        """The tensor that holds `unmerged_weight()`, or the snapshot of it while something is merged."""
        store = self._store
        merged = self._unmerged is not None
        return store.parameter_of(self._unmerged[0]) if merged else store.parameter

    def unmerged_weight(self) -> Tensor:
        """W (out, in) without any adapter in it; under LoftQ the quantised one, on which its adapter stands."""
        store = self._store
        if self._disabled and self._set_aside:
            return store.read_snapshot(self._set_aside[0])
        return store.read() if self._unmerged is None else store.read_snapshot(self._unmerged[0])
