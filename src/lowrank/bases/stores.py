"""How a module holds its weight. Whatever the module's own layout, W is seen as (*expert, out, in)."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Store(Protocol):
    """A weight that can be read, replaced and put back."""

    exact: bool  # False: write() rounds beyond the dtype (4-bit, 8-bit)

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


class ParameterStore:
    """A weight kept as one floating-point parameter of the module.

    `write` installs a new parameter and leaves the old one alone. So a snapshot is the old parameter
    itself (no copy, and every bit of it comes back), and a parameter that another module shares (tied
    embeddings) is not changed behind that module's back: the two are untied until `restore`.
    """

    exact = True

    def __init__(
        self,
        module: nn.Module,
        name: str,
        to_matrix: Callable[[Tensor], Tensor],
        from_matrix: Callable[[Tensor, Tensor], Tensor],
    ):
        self.module, self.name = module, name
        self.to_matrix, self.from_matrix = to_matrix, from_matrix

    def read(self) -> Tensor:
        return self.to_matrix(self.module.get_parameter(self.name))

    def shaped(self, W: Tensor) -> Tensor:
        return self.from_matrix(W, self.module.get_parameter(self.name))

    def write(self, W: Tensor) -> None:
        old = self.module.get_parameter(self.name)
        new = self.shaped(W.detach()).to(old.dtype).contiguous()
        self.module._parameters[self.name] = nn.Parameter(new, requires_grad=old.requires_grad)

    def snapshot(self) -> nn.Parameter:
        return self.module.get_parameter(self.name)

    def read_snapshot(self, saved: nn.Parameter) -> Tensor:
        return self.to_matrix(saved)

    def restore(self, saved: nn.Parameter) -> None:
        self.module._parameters[self.name] = saved


def as_is(module: nn.Module, name: str) -> Store:
    """W is the parameter: (*expert, out, in)."""
    return ParameterStore(module, name, lambda p: p, lambda W, old: W)


def transposed(module: nn.Module, name: str) -> Store:
    """The parameter is (*expert, in, out)."""
    return ParameterStore(module, name, lambda p: p.mT, lambda W, old: W.mT)


def flattened(module: nn.Module, name: str) -> Store:
    """The parameter is (out, *in): a convolution's (out, in/groups, *kernel)."""
    return ParameterStore(module, name, lambda p: p.flatten(1), lambda W, old: W.view(old.shape))
