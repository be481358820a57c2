"""W in its module, and what stands in its place at times. `layer` is a LoraLayer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lowrank.bases.stores import Store
from lowrank.lora import Lora


class HeldWeight:
    """The weight under a layer's adapters: W itself, LoftQ's quantised one in its place, or a merged one.

    What stood there before is kept as a snapshot, of which every bit comes back.
    """

    def __init__(self, layer: Any):
        self._layer = layer
        self._unmerged: Any = (
            None  # snapshot of the weight, and the bias, while something is merged
        )
        # the weight that is not in its place now, of W and LoftQ's
        self._set_aside: tuple[Any, ...] = ()
        self._exchanged = False  # W is in its place, LoftQ's set aside
        self.less: Lora | None = None  # what LoftQ took out of W before it rounded that

    @property
    def store(self) -> Store:
        return self._layer.kind.store(self._layer.get_base_layer())

    # --- merging ----------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether `unmerge` has something to put back."""
        return self._unmerged is not None

    def unmerged(self) -> Tensor:
        """W (out, in) without any adapter in it; under LoftQ the quantised one, on which its adapter stands."""
        store = self.store
        if self._exchanged and self._set_aside:
            return store.read_snapshot(self._set_aside[0])
        return store.read() if self._unmerged is None else store.read_snapshot(self._unmerged[0])

    def unmerged_parameter(self) -> Tensor:
        """The tensor that holds `unmerged()`, or the snapshot of it while something is merged."""
        store = self.store
        return store.parameter if self._unmerged is None else store.parameter_of(self._unmerged[0])

    def unmerged_tensors(self) -> dict[str, Tensor]:
        """W without any adapter in it, in the module's own form and by its names."""
        store = self.store
        if store.exact or self._unmerged is None:
            return {self._layer.kind.weight: store.shaped(self.unmerged())}
        merged = store.snapshot()  # several tensors, whose names are for the module to say
        store.restore(self._unmerged[0])
        found = self._layer.get_base_layer().state_dict()
        store.restore(merged)
        return found

    def unmerged_bias(self) -> Tensor | None:
        """The base layer's bias, as it is without a merge."""
        if self._unmerged is not None:
            return self._unmerged[1]
        return getattr(self._layer.get_base_layer(), self._layer.kind.bias, None)

    def merge(self, weight: Tensor, bias: Tensor | None) -> float | None:
        """Puts these in the place of the unmerged ones; bias None: there is none, or it stays.

        Returns how far what is stored is from `weight`, as a share of how far that is from W; None where nothing
        is rounded beyond the dtype.
        """
        base, store, old = self._layer.get_base_layer(), self.store, self.unmerged_bias()
        if self._unmerged is None:
            self._unmerged = (store.snapshot(), old)
        store.write(weight)
        if old is not None and bias is not None:
            new = nn.Parameter(bias, requires_grad=old.requires_grad)
            base._parameters[self._layer.kind.bias] = new
        if store.exact:
            return None
        change = (weight - self.unmerged()).norm()
        return ((store.read() - weight).norm() / change).item() if change > 0 else None

    def unmerge(self) -> None:
        """Puts back what a merge has replaced."""
        if self._unmerged is None:
            return
        weight, bias = self._unmerged
        self.store.restore(weight)
        if bias is not None:
            self._layer.get_base_layer()._parameters[self._layer.kind.bias] = bias
        self._unmerged = None

    # --- LoftQ ------------------------------------------------------------------------------------

    @property
    def quantised(self) -> bool:
        """Whether LoftQ has put another weight in the place of the original."""
        return bool(self._set_aside)

    def original(self) -> Tensor:
        """W (out, in) as it was before any adapter, LoftQ's quantisation included."""
        if not self._set_aside:
            return self.unmerged()
        store = self.store
        return store.read() if self._exchanged else store.read_snapshot(self._set_aside[0])

    def put(self, Q: Tensor, less: Lora | None) -> None:
        """Puts LoftQ's weight in W's place."""
        self.less = less
        self._set_aside = (self.store.snapshot(),)
        self.store.write(Q)

    def exchange(self) -> None:
        """Puts the weight that was set aside, if any, in the place of the other."""
        self._exchanged = not self._exchanged
        if self._set_aside:
            store = self.store
            (saved,), self._set_aside = self._set_aside, (store.snapshot(),)
            store.restore(saved)

    def restore_original(self) -> None:
        """Lets go of a quantised weight for the one that it was made from. Nothing may be merged."""
        if self._set_aside and not self._exchanged:
            store = self.store
            store.restore(self._set_aside[0])
        self._set_aside, self.less = (), None

    # --- both -------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Makes what is in place final: all else is let go."""
        self._unmerged, self._set_aside, self.less = None, (), None

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Takes what is set aside along in `.to()` and the like, which give `fn`."""
        store = self.store
        self._set_aside = tuple(store.moved(saved, fn) for saved in self._set_aside)
        if self._unmerged is not None:
            weight, bias = self._unmerged
            if bias is not None:
                bias.data = fn(bias.data)
            self._unmerged = store.moved(weight, fn), bias
