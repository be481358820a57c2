"""`TrainableTokensWrapper`: an embedding or output head of which each adapter trains some rows."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.bases.kinds import Kind
from lowrank.errors import MergeError
from lowrank.mixed_batch import by_adapter
from lowrank.routing import Routing
from lowrank.saved_module import AuxiliaryTrainingWrapper


class TokenRows(nn.Module):
    """The module itself and, by adapter, its rows: `trainable_tokens_delta[name]` (rows, width) stand in the
    place of the weight's own. Gives the parameters PEFT's names."""

    def __init__(self, base_layer: nn.Module, delta: nn.ParameterDict | None = None):
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict() if delta is None else delta


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """`original_module`, frozen, in whose weight each adapter replaces some rows by trained ones.

    leader: the wrapper of the embedding that this module's weight is tied to. Its rows are then used here too.
    The rows meet the output: those that were looked up, or the logits of those tokens, are replaced; the
    weight itself is only formed for a module with a forward of its own, and for whoever asks for `weight`.
    """

    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    token_adapter: TokenRows

    def __init__(
        self,
        original_module: nn.Module,
        kind: Kind,
        routing: Routing | None = None,
        leader: "TrainableTokensWrapper | None" = None,
    ):
        super().__init__(routing)
        delta = leader.token_adapter.trainable_tokens_delta if leader else None
        self.token_adapter = TokenRows(original_module.requires_grad_(False), delta)
        self.kind = kind
        self.token_indices: dict[str, list[int]] = leader.token_indices if leader else {}
        # by adapter, (3, rows): the indices as listed, sorted, and where each sorted one stands in the list
        self._tables: dict[str, Tensor] = leader._tables if leader else {}
        self._leader = [leader] if leader else []  # in a list, so that it is no part of this module
        self.merged_adapters: list[str] = []
        # the weight, while something is merged; in a tuple, so that it is no parameter of this module
        self._unmerged: tuple[nn.Parameter] | None = None
        self._merge_again: list[str] = []  # what was merged when the adapters were disabled

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            adapter = self.__dict__.get("_modules", {}).get("token_adapter")
            if adapter is None or name.startswith("_"):
                raise
            live = self._live() if name == "weight" else []
            return self.weight_with(live) if live else getattr(adapter.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # tie_weights() of transformers: lm_head.weight = embed_tokens.weight
        if isinstance(value, nn.Parameter) and "token_adapter" in self.__dict__.get("_modules", {}):
            merged, again = self.merged_adapters, self._merge_again
            self.unmerge()
            setattr(self.original_module, name, value)
            self.merge(adapter_names=merged)
            self._merge_again = again
        else:
            super().__setattr__(name, value)

    @property
    def original_module(self) -> Any:
        return self.token_adapter.base_layer

    @property
    def leader(self) -> "TrainableTokensWrapper | None":
        return self._leader[0] if self._leader else None

    # --- adapters ---------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        return list(self.token_adapter.trainable_tokens_delta)

    def add_adapter(
        self, name: str, indices: Sequence[int], dtype: torch.dtype | None = None
    ) -> None:
        """Rows `indices` for the adapter, which start as the weight's own; not yet active.

        dtype: None: the weight's. They are on the weight's device.
        """
        self.token_indices[name] = list(indices)
        order = sorted(range(len(indices)), key=indices.__getitem__)
        table = torch.tensor([list(indices), [indices[i] for i in order], order])
        weight = self.unmerged_weight()
        self._tables[name] = table if weight.is_meta else table.to(weight.device)
        with torch.no_grad():
            rows = weight[table[0].to(weight.device)]
        self.token_adapter.trainable_tokens_delta[name] = nn.Parameter(
            rows.to(dtype or weight.dtype), requires_grad=False
        )

    def delete_adapter(self, name: str) -> None:
        if name in self.merged_adapters:
            raise MergeError(
                f"Adapter {name!r} is merged: unmerge_adapter() first, then delete it."
            )
        if name in self.adapters:
            del self.token_adapter.trainable_tokens_delta[name]
            del self.token_indices[name], self._tables[name]
        self._active = [active for active in self._active if active != name]

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.adapters:
            return {}
        rows = self.token_adapter.trainable_tokens_delta[name]
        return {f"token_adapter.trainable_tokens_delta.{name}": rows}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """For each key of the adapter's file, below this module's path, the name of its tensor; PEFT's name.

        Rows that a tied module shares stand in a file once, under their leader's path.
        """
        names = [] if self.leader else self.adapter_parameters(adapter_name)
        return {key.removesuffix(f".{adapter_name}"): key for key in names}

    def without(self, adapters: Iterable[str] | None) -> nn.Module:
        """What stays in the model when this wrapper is taken out: the module, merged or not."""
        return self.original_module

    def conflict(self, names: Iterable[str]) -> str:
        """Two adapters cannot both set the same row."""
        owner: dict[int, str] = {}
        for name in dict.fromkeys(names):
            for index in self.token_indices.get(name, ()):
                if index in owner:
                    return (
                        f"Adapters {owner[index]!r} and {name!r} each have their own row for token {index} "
                        "(trainable_token_indices): only one of them can be active at a time."
                    )
                owner[index] = name
        return ""

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._merge_again = []

    def enable_adapters(self, enabled: bool) -> None:
        """Disabled, the module is the base's. What was merged is taken out, and put back when enabled."""
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

    def _live(self) -> list[str]:
        """The adapters whose rows must be put in: active, present and not merged."""
        if self._disabled:
            return []
        return [name for name in self.active_adapters if name not in self.merged_adapters]

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = self.original_module
        x = args[0] if args else next(iter(kwargs.values()))
        if self.routing.names is not None and not self._disabled:
            y = base(*args, **kwargs)
            where = type(base).__name__
            return by_adapter(self.routing, self.adapters, x, y, self._replaced, where)
        live = self._live()
        if live and self.kind.op is None:
            return functional_call(base, {"weight": self.weight_with(live)}, args, kwargs)
        y = base(*args, **kwargs)
        for name in live:
            y = self._replaced(name, x, y)
        return y

    def _replaced(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The module's output y for x, with the adapter's rows in the place of the weight's."""
        if self.kind.op is None:
            return functional_call(self.original_module, {"weight": self.weight_with([name])}, (x,))
        replaced = _in_lookup if self.kind.op.floating is False else _in_product
        return replaced(
            self.original_module,
            self.token_adapter.trainable_tokens_delta[name],
            self._tables[name].to(x.device),
            x,
            y,
        )

    def weight_with(self, names: Iterable[str]) -> Tensor:
        """The weight with the rows of these adapters in it, a tensor of its own; with autograd."""
        weight: Tensor = self.unmerged_weight()
        for name in names:
            rows = self.token_adapter.trainable_tokens_delta[name]
            index = self._tables[name][0].to(weight.device)
            weight = weight.index_copy(0, index, rows.to(weight.dtype))
        return weight

    # --- merge ------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the rows of these adapters (None: the active ones) into the weight, a new parameter.

        A tied pair takes one and stays tied. Raises MergeError, with the weight untouched, if a row is not
        finite or belongs to two of the adapters.
        """
        wanted = self._active if adapter_names is None else adapter_names
        new = [
            name for name in wanted if name in self.adapters and name not in self.merged_adapters
        ]
        if not new:
            return
        if self._disabled:
            raise MergeError("The adapters are disabled: enable_adapter_layers() before merging.")
        names = self.merged_adapters + new
        why = self.conflict(names)
        if why:
            raise MergeError(why)
        original = self.unmerged_weight()
        if self.leader:
            self.leader.merge(adapter_names=names)
            merged = self.leader.original_module.weight
        else:
            with torch.no_grad():
                merged = nn.Parameter(self.weight_with(names), requires_grad=original.requires_grad)
            rows = torch.cat([self._tables[name][0] for name in names]).to(merged.device)
            if not torch.isfinite(merged[rows]).all():
                raise MergeError(
                    f"Merging {names} gives NaN or infinity in {merged.dtype}; this module is as it was."
                )
        self._unmerged = (original,)
        self.original_module._parameters["weight"] = merged
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Puts the weight back as it was before the merge, every bit of it."""
        self._merge_again = []
        if self._unmerged is not None:
            self.original_module._parameters["weight"] = self._unmerged[0]
            self._unmerged, self.merged_adapters = None, []

    def forget_unmerged(self) -> None:
        """Makes what is merged final: the unmerged weight is let go, and `unmerge` does nothing."""
        self._unmerged = None

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "TrainableTokensWrapper":
        """`.to()` and the like also take along what `unmerge` will put back."""
        super()._apply(fn, recurse)
        for saved in self._unmerged or ():
            saved.data = fn(saved.data)
        device = self.original_module.weight.device
        for name, table in self._tables.items():
            self._tables[name] = table if device.type == "meta" else table.to(device)
        return self

    def unmerged_parameters(self) -> dict[str, Tensor]:
        """What a merge has replaced, as it was, by its name within this module; empty if nothing is merged."""
        return {"token_adapter.base_layer.weight": self._unmerged[0]} if self._unmerged else {}

    def unmerged_weight(self) -> nn.Parameter:
        """The weight without any adapter's rows in it."""
        return self._unmerged[0] if self._unmerged else self.original_module.weight


def _in_lookup(base: Any, rows: Tensor, table: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y (*x.shape, width), with the rows of those x that are in `table`."""
    _, known, order = table
    slot = torch.searchsorted(known, x.long()).clamp_max(len(known) - 1)
    hit = known[slot] == x  # (*x.shape)
    found = F.embedding(order[slot], rows.to(y.dtype))
    scale = getattr(base, "embed_scale", None)  # Gemma 3 scales its embeddings in forward
    if scale is not None:
        found = found * (scale.to(y) if isinstance(scale, Tensor) else scale)
    if (
        base.padding_idx is not None
    ):  # as in the embedding itself, nothing is learnt of the padding's row
        found = torch.where((x == base.padding_idx).unsqueeze(-1), found.detach(), found)
    return torch.where(hit.unsqueeze(-1), found, y)


def _in_product(base: Any, rows: Tensor, table: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y = W x + b, with the entries in `table` from `rows`; in y's own memory, which is the largest of all."""
    listed = table[0]
    bias = None if base.bias is None else base.bias[listed].to(x.dtype)
    return y.index_copy_(-1, listed, F.linear(x, rows.to(x.dtype), bias).to(y.dtype))
