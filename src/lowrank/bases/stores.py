"""How a module holds its weight. Whatever the module's own layout, W is seen as (*expert, out, in)."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Size, Tensor, nn

from lowrank.quantisation import Quantisation


class Store(Protocol):
    """A weight that can be read, replaced and put back."""

    exact: bool  # False: write() rounds beyond the dtype (4-bit, 8-bit)

    @property
    def shape(self) -> Size:
        """W's (*expert, out, in), without reading it."""

    @property
    def dtype(self) -> torch.dtype:
        """That of W as it is read."""

    @property
    def parameter(self) -> Tensor:
        """A tensor of the module that holds W, or part of it: W's device, and its changes, are this one's."""

    @property
    def quantisation(self) -> Quantisation | None:
        """How W is rounded, beyond its dtype."""

    @property
    def read_only(self) -> str:
        """Why W cannot be written, and what to do; empty if it can."""

    def refusal(self, trained: bool) -> str:
        """Why W can have no adapter, or none that is trained; empty if it can."""

    def read(self) -> Tensor:
        """W (*expert, out, in), a view of the stored tensor where the layout allows it."""

    def shaped(self, W: Tensor) -> Tensor:
        """W in the module's own layout."""

    def write(self, W: Tensor) -> None:
        """Stores W, rounded to the stored dtype. What `snapshot` returned stays as it was."""

    def snapshot(self) -> Any:
        """What is stored now, to be given back to `restore`. It must not be written to."""

    def read_snapshot(self, saved: Any) -> Tensor:
        """What `read` would have returned when the snapshot was taken."""

    def restore(self, saved: Any) -> None:
        """Puts a snapshot back: every bit is as it was."""

    def parameter_of(self, saved: Any) -> Tensor:
        """What `parameter` was when the snapshot was taken."""

    def moved(self, saved: Any, fn: Callable[[Tensor], Tensor]) -> Any:
        """The snapshot after `.to()` and the like, which gives `fn`."""


class ParameterStore:
    """A weight kept as one floating-point parameter of the module.

    `write` installs a new parameter and leaves the old one alone. So a snapshot is the old parameter
    itself (no copy, and every bit of it comes back), and a parameter that another module shares (tied
    embeddings) is not changed behind that module's back: the two are untied until `restore`.
    """

    exact = True
    quantisation = None
    read_only = ""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        to_matrix: Callable[[Tensor], Tensor],
        from_matrix: Callable[[Tensor, Tensor], Tensor],
    ):
        self.module, self.name = module, name
        self.to_matrix, self.from_matrix = to_matrix, from_matrix

    @property
    def shape(self) -> Size:
        return self.read().shape

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.name)

    def refusal(self, trained: bool) -> str:
        return ""

    def read(self) -> Tensor:
        return self.to_matrix(self.parameter)

    def shaped(self, W: Tensor) -> Tensor:
        return self.from_matrix(W, self.parameter)

    def write(self, W: Tensor) -> None:
        old = self.parameter
        new = self.shaped(W.detach()).to(old.dtype).contiguous()
        self.module._parameters[self.name] = nn.Parameter(new, requires_grad=old.requires_grad)

    def snapshot(self) -> nn.Parameter:
        return self.parameter

    def read_snapshot(self, saved: nn.Parameter) -> Tensor:
        return self.to_matrix(saved)

    def restore(self, saved: nn.Parameter) -> None:
        self.module._parameters[self.name] = saved

    def parameter_of(self, saved: nn.Parameter) -> nn.Parameter:
        return saved

    def moved(self, saved: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
        saved.data = fn(saved.data)
        return saved


def as_is(module: nn.Module, name: str) -> Store:
    """W is the parameter: (*expert, out, in)."""
    return ParameterStore(module, name, lambda p: p, lambda W, old: W)


def transposed(module: nn.Module, name: str) -> Store:
    """The parameter is (*expert, in, out)."""
    return ParameterStore(module, name, lambda p: p.mT, lambda W, old: W.mT)


def flattened(module: nn.Module, name: str) -> Store:
    """The parameter is (out, *in): a convolution's (out, in/groups, *kernel)."""
    return ParameterStore(module, name, lambda p: p.flatten(1), lambda W, old: W.view(old.shape))
