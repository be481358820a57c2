"""The adapters of one layer: their tensors under PEFT's names, their scaling, and what they started from."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.bases.kinds import EMBEDDING, EXPERTS, Kind
from lowrank.errors import AdapterNameError, InitDataError, ShapeError
from lowrank.factors import Factor
from lowrank.held_weight import HeldWeight
from lowrank.init import WAITS_FOR, Init, Start, init_named, of_experts, taken_out
from lowrank.lora import Lora, check_shapes, initial_magnitude, transposed
from lowrank.routing import Routing


class LayerAdapters(nn.Module):
    """A base layer and the adapters on it; which of them act, and how, is LoraLayer's.

    r, lora_alpha, scaling, use_dora, lora_bias: by adapter name. `lora_start_A` and `lora_start_B` hold, as
    buffers, the factors that an adapter started from where its initialisation takes them out of W. W itself stays
    as it is; `held` knows what stands in its place.
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
        self.held = HeldWeight(self)
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
        self._leaders: dict[str, LayerAdapters] = {}  # of adapters that are another layer's
        self.waiting: dict[str, str] = {}  # adapters without values, and the call that gives them
        self._initial_scaling: dict[str, float] = {}
        self.norms: dict[str, Any] = {}  # what DoRA's forward remembers

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
        store, shape = self.held.store, self.kind.shape(base)
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
            self.held.put(start.base, start.less)
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
        self,
        name: str,
        leader: "LayerAdapters",
        *,
        lora_alpha: float,
        scaling: float,
        dropout: float,
    ) -> None:
        """A new adapter that is the embedding's of that name: this layer has its weight.

        A linear layer has it transposed: (B·A)ᵀ = Aᵀ·Bᵀ, so that the two weights, (num, in) both, change alike.
        """
        self._leaders[name] = leader
        self.r[name], self.lora_alpha[name] = leader.r[name], lora_alpha
        self.scaling[name] = self._initial_scaling[name] = scaling
        self.use_dora[name], self.lora_bias[name] = leader.use_dora[name], False
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.train(self.base_layer.training)

    def leader(self, name: str) -> Any:
        """The embedding's layer whose adapter this one is too (ensure_weight_tying); None: it is this layer's own."""
        return self._leaders.get(name)

    def _remove(self, name: str) -> None:
        """Takes out all that the adapter has here."""
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
        self._leaders.pop(name, None)
        self.norms.pop(name, None)
        self.routing.invocations.pop(name, None)
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
        leader = self._leaders.get(name)
        if leader is not None:
            found = leader.lora(name)._replace(scaling=self.scaling[name])
            return found if self.kind.layout is EMBEDDING else transposed(found)
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
        if name in self._leaders:
            return self._leaders[name]._factors(name)
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
        own = self._leaders.get(name, self)
        return self.r[name] * (2 if name in own.lora_start_A._buffers else 1)

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

    # --- what they start from ---------------------------------------------------------------------

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

    def start_factors(self, name: str) -> dict[str, Tensor]:
        """A₀ and B₀ by the names of the parameters that they belong to; empty if nothing is taken out of W."""
        if name not in self.lora_start_A._buffers:
            return {}
        starts = (self.lora_start_A.get_buffer(name), self.lora_start_B.get_buffer(name))
        return dict(zip(self.adapter_parameters(name), starts, strict=False))

    def loftq_factors(self, name: str) -> dict[str, Tensor]:
        """A and B of what LoftQ took out of W before it rounded that, for this adapter; named as `start_factors` does."""
        less = self.held.less
        if less is None or name != self.quantised_by:
            return {}
        return dict(zip(self.adapter_parameters(name), (less.A, less.B), strict=False))

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

    # --- scaling ----------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """`scale` times the adapter's own scaling."""
        if adapter in self.scaling:
            self._set_scaling(adapter, scale * self._initial_scaling[adapter])

    def _set_scaling(self, name: str, value: float | Tensor) -> None:
        now = self.scaling[name]
        if isinstance(now, Tensor):
            now.fill_(value)  # in place: compiled code goes on reading this tensor
        else:
            self.scaling[name] = value

    def scale_by_tensor(self, name: str) -> None:
        """From now on the scaling is a tensor (), which compiled code reads anew in each forward."""
        store = self.held.store
        dtype = torch.promote_types(store.dtype, torch.float32)
        device = store.parameter.device
        self.scaling[name] = torch.as_tensor(self.scaling[name], dtype=dtype, device=device)

    def describe(self, name: str, r: int, lora_alpha: float, scaling: float) -> None:
        """Other numbers for an adapter whose tensors are being replaced."""
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self._initial_scaling[name] = scaling
        self._set_scaling(name, scaling)

    # --- the base layer ---------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The module without any adapter around it."""
        return self.chain()[-1].base_layer

    def chain(self) -> "list[Any]":
        """This layer and those inside it that adapt other parameters of the same module, outermost first."""
        found: list[Any] = [self]
        while isinstance(found[-1].base_layer, LayerAdapters):
            found.append(found[-1].base_layer)
        return found

    def _expert_shape(self) -> tuple[int, ...]:
        """(experts,) for fused experts, else ()."""
        return (self.experts,) if self.kind.layout is EXPERTS else ()

    @property
    def experts(self) -> int:
        """How many (out, in) matrices the weight holds: those of fused experts, else 1."""
        return self.kind.experts(self.get_base_layer()) if self.kind.layout is EXPERTS else 1

    @property
    def quantised_by(self) -> str | None:
        """The adapter, the first, for which LoftQ put another weight in the place of the original."""
        return next(iter(self.r), None) if self.held.quantised else None

    def original_weight(self) -> Tensor:
        """W (out, in) as it was before any adapter, LoftQ's quantisation included."""
        return self.held.original()

    def unmerged_weight(self) -> Tensor:
        """W (out, in) without any adapter in it; under LoftQ the quantised one, on which its adapter stands."""
        return self.held.unmerged()

    def unmerged_parameter(self) -> Tensor:
        """The tensor that holds `unmerged_weight()`, or the snapshot of it while something is merged."""
        return self.held.unmerged_parameter()

    def restore_original(self) -> None:
        """Lets go of a quantised weight (LoftQ) for the one that it was made from. Nothing may be merged."""
        self.held.restore_original()
