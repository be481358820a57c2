"""`LoraLayer`: a frozen base layer with any number of adapters on it: which of them act, forward and merge.

One forward and one merge serve every kind of layer: what differs is in the `Kind` (lowrank.bases.kinds).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.bases.kinds import Kind
from lowrank.errors import MergeError, ShapeError
from lowrank.init import Init
from lowrank.layer_adapters import LayerAdapters
from lowrank.lora import all_finite, check_shapes, merged_bias, merged_weight, weight_change
from lowrank.mixed_batch import mixed_forward, weights_for_all
from lowrank.output_change import add_output_change, output_in_one, weights_with
from lowrank.routing import Routing


class LoraLayer(LayerAdapters):
    """`base_layer` with adapters. Attributes of the base layer (`in_features`, `weight`, …) answer as before.

    Where several parameters of one module are adapted (target_parameters), each has a LoraLayer, one
    around the other; `get_base_layer()` is the module itself.
    `merged_adapters` are those whose change is in the base weight at present; `merge_loss`, how far a merge into few
    bits is off, as a share of the change.
    """

    def __init__(self, base_layer: nn.Module, kind: Kind, routing: Routing | None = None):
        super().__init__(base_layer, kind, routing)
        self.merged_adapters: list[str] = []
        self.merge_loss: float | None = None
        self._active: list[str] = []
        self._disabled = False
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

    def delete_adapter(self, name: str) -> None:
        """Removes the adapter, if this layer has it. It must not be merged."""
        if name in self.merged_adapters:
            raise MergeError(
                f"Adapter {name!r} is merged: unmerge_adapter() first, then delete it."
            )
        if name not in self.r:
            return
        self._remove(name)
        self._active = [active for active in self._active if active != name]

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
            self.held.exchange()
            names, self._merge_again = self._merge_again, []
            self.merge(adapter_names=names)
        else:
            names = list(self.merged_adapters)
            self.unmerge()
            self._merge_again = names
            self.held.exchange()

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
        with torch.no_grad():
            bias = self.held.unmerged_bias()
            if bias is None and any(lora.bias is not None for lora in loras):
                raise MergeError(
                    f"Adapters {names} have a bias (lora_bias=True) and the base layer has none to add it to."
                )
            weight = merged_weight(self.unmerged_weight(), *loras)
            new_bias = None if bias is None else merged_bias(bias, *loras)
            for tensor in (weight, new_bias):
                if tensor is not None and not all_finite(tensor):
                    raise MergeError(
                        f"Merging {names} gives NaN or infinity in {tensor.dtype}; this layer is as it was."
                    )
            self.merge_loss = self.held.merge(weight, new_bias)
        self.merged_adapters = names

    def _refuse_to_merge(self, new: list[str], names: list[str]) -> None:
        """Raises MergeError if `new` cannot be merged. names: all that would then be merged."""
        activated = [name for name in new if name in self.routing.invocations]
        if activated:
            raise MergeError(
                f"Adapters {activated} are activated LoRAs: they act on part of the positions only, which no weight can do."
            )
        if self._disabled:
            raise MergeError("The adapters are disabled: enable_adapter_layers() before merging.")
        if self.held.store.read_only:
            raise MergeError(self.held.store.read_only)
        left = [name for name in self._active if name in self.r and name not in names]
        if any(self.use_dora[name] for name in left):
            raise MergeError(
                f"Adapters {left} use DoRA and stay active: merge them together with {new}, or none."
            )

    def unmerge(self) -> None:
        """Puts the base weight back as it was before the merge, every bit of it."""
        self._merge_again = []
        self.held.unmerge()
        self.merged_adapters, self.merge_loss = [], None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoraLayer":
        """`.to()` and the like also take along what `unmerge` will put back."""
        super()._apply(fn, recurse)
        self.held.move(fn)
        for name, scaling in self.scaling.items():
            if isinstance(scaling, Tensor):
                self.scaling[name] = scaling.to(fn(scaling).device)
        return self

    def forget_unmerged(self) -> None:
        """Makes what is merged final: the unmerged weight is let go, and `unmerge` does nothing."""
        self.held.forget()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in that weight's own shape; float32."""
        change = weight_change(self.unmerged_weight(), self.lora(adapter))
        return self.held.store.shaped(change)

    def unmerged_parameters(self) -> dict[str, Tensor]:
        """What a merge has replaced, as it was, by its name within this layer; empty if nothing is merged."""
        if not self.held.merged:
            return {}
        base = "base_layer." * len(self.chain())
        found = {f"{base}{name}": tensor for name, tensor in self.held.unmerged_tensors().items()}
        bias = self.held.unmerged_bias()
        if bias is not None:
            found[f"{base}{self.kind.bias}"] = bias
        return found
