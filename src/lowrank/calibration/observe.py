"""Looking at a model's layers while data run through it, and leaving the model as it was."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.bases.kinds import Kind
from lowrank.bases.ops import LINEAR
from lowrank.config import LoraConfig
from lowrank.errors import InitDataError
from lowrank.targets import plan, walk
from lowrank.wrappers import lora_layers, wrappers

PREFIX = "base_model.model."  # of a PeftModel's paths, before those of the base


class Place(NamedTuple):
    """A layer to look at. module: the base layer, also where adapters are on it already."""

    module: nn.Module
    kind: Kind
    out: int
    in_: int
    r: int


def planned(model: nn.Module, config: LoraConfig) -> dict[str, Place]:
    """What `config` targets in `model`, by path as if no adapter were there. Raises TargetError as plan() does."""
    modules = dict(walk(model))
    return {t.path: Place(modules[t.path], t.kind, t.out, t.in_, t.r) for t in plan(model, config)}


def adapted(model: nn.Module, adapter_name: str) -> dict[str, Place]:
    """The layers that have the adapter, by path in the model as it is now."""
    return {
        path: Place(
            layer.base_layer, layer.kind, *layer.kind.shape(layer.base_layer), layer.r[adapter_name]
        )
        for path, layer in lora_layers(model)
        if adapter_name in layer.r
    }


@contextmanager
def undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """Within, `model` is in training or eval mode and its adapters do not act.

    Afterwards, and after an error, every module's mode, the adapters and torch's random numbers are as before.
    """
    modes = {module: module.training for module in model.modules()}
    acting = [module for _, module in wrappers(model) if not module.disable_adapters]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        try:
            nn.Module.train(model, training)
            for wrapper in acting:
                wrapper.enable_adapters(False)
            yield
        finally:
            for wrapper in acting:
                wrapper.enable_adapters(True)
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def watching(
    places: Mapping[str, Place], see: Callable[[str, tuple[Tensor, ...]], None]
) -> Iterator[None]:
    """Within, each call of a layer calls `see(path, inputs)` first; inputs[0] is what W meets, (…, in).

    For a convolution those are the patches (batch, *positions, groups, in), in the order of its flattened W.
    """
    with ExitStack() as stack:
        for path, place in places.items():
            hook = _hook(path, place, see)
            handle = place.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(path: str, place: Place, see: Callable[[str, tuple[Tensor, ...]], None]) -> Callable:
    @torch.no_grad()
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x, *rest = args or kwargs.values()  # nn.Linear calls it `input`
        see(path, (_met_by_W(place, x), *rest))

    return hook


def _met_by_W(place: Place, x: Tensor) -> Tensor:
    op = place.kind.op
    if op is None or op is LINEAR:
        return x
    identity = torch.eye(place.in_, dtype=x.dtype, device=x.device)
    patches = op.down(place.module, x, identity, nn.Identity())
    channel = op.channel(place.module)
    return patches.movedim(channel, -1).unflatten(-1, (-1, place.in_))


class SharedInputs:
    """Which layers are given the very same tensor (a block's q, k and v), so that it is looked at once.

    Found out when each layer is first called, and checked at every call.
    """

    def __init__(self, places: Mapping[str, Place]):
        self.places = places
        self.leader: dict[str, str] = {}  # path -> the layer that is looked at in its place
        self._seen: dict[str, tuple[weakref.ref, int]] = {}

    def is_new(self, path: str, x: Tensor) -> bool:
        """Whether `x` has to be looked at, for the layer at `path`."""
        leader = self.leader.get(path)
        if leader is None:
            shareable = self.places[path].kind.op is LINEAR  # two convolutions cut other patches
            same = [other for other in self._seen if shareable and self._is(other, x)]
            leader = self.leader[path] = same[0] if same else path
        if leader == path:
            if self.places[path].kind.op is LINEAR:
                self._seen[path] = (weakref.ref(x), x._version)
            return True
        if not self._is(leader, x):
            raise InitDataError(
                f"{path} had the input of {leader} at first, and now has another; leave one of them out of the targets."
            )
        return False

    def _is(self, path: str, x: Tensor) -> bool:
        tensor, version = self._seen[path]
        return tensor() is x and x._version == version


def finite_rows(x: Tensor, path: str) -> Tensor:
    """x as (rows, in). Raises InitDataError for NaN or infinity."""
    rows = x.reshape(-1, x.shape[-1])
    if not torch.isfinite(rows).all():
        raise InitDataError(f"the input of {path} is not finite: look at the data and the dtype.")
    return rows


def refuse_never_called(paths: list[str]) -> None:
    """Raises InitDataError if there are any."""
    if paths:
        shown = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
        raise InitDataError(
            f"no data reached {shown}: these layers were never called, or all positions were masked. "
            "Give more data, or leave them out with exclude_modules."
        )
