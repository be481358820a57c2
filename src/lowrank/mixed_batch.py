"""One layer's forward when the rows of a batch go through different adapters. `layer` is a LoraLayer."""

from collections.abc import Callable, Collection, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowrank.architectures import EXPERT_AFTER_EXPERT
from lowrank.bases.kinds import EXPERTS
from lowrank.errors import RowsError
from lowrank.layer_adapters import LayerAdapters
from lowrank.output_change import add_output_change, weights_with
from lowrank.routing import BASE, Routing, blocks, groups, index, runs


def mixed_forward(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The base layer's output, each row with the change of its own adapter. Row order does not matter.

    Adapters of one rank that have equally many rows go through one batched product; others, and DoRA,
    lora_bias, dropout, embeddings and convolutions, through one product for each adapter.
    """
    if layer.kind.op is None:
        return _through_the_weights(layer, args, kwargs)
    y = layer.base_layer(*args, **kwargs)
    x = args[0] if args else next(iter(kwargs.values()))
    assert layer.routing.names is not None
    count = len(layer.routing.names)
    if layer.disable_adapters:
        return y
    together = _remembered(layer, (layer.training,), lambda: _together(layer))
    if together and y.ndim <= -layer.kind.op.channel(layer.base_layer):
        raise RowsError(
            f"A {type(layer.base_layer).__name__} was given {tuple(x.shape)}, which has no dimension for the rows of a "
            "batch: adapter_names=… does not work with it. Run the adapters one after another."
        )
    y = _original_rows(layer, x, y)
    for names, rows in together:
        if len(names) > 1:
            y = _one_product(layer, names, rows, x, y, count)
        else:
            y = _one_adapter(layer, names[0], rows[0], x, y, count)
    return y


# --- through the weight ---------------------------------------------------------------------------


def weights_for_all(layer: Any) -> dict[str, Tensor]:
    """The weights of the one adapter that all rows go through. Raises RowsError where they need different ones."""
    names = {name for name in layer.routing.names if name in layer.r}
    if names and len({*layer.routing.names}) > 1:
        raise _refusal(layer, "its weight is taken for all rows at once")
    return weights_with(layer, list(names))


class _Split(NamedTuple):
    """Where the rows are in what a module is given and gives."""

    args: tuple
    kwargs: dict[str, Any]
    dimensions: list[
        int | None
    ]  # of each thing that is given, along which its rows lie; None: the same for all rows
    outputs: tuple[int, ...] = (
        0,
    )  # the same of what it gives; the last one's holds for all that follow
    copies: int = 1  # how often all rows lie there, one after another

    def places(self, rows: list[int], x: Tensor, dimension: int, count: int, where: str) -> Tensor:
        """The indices along `dimension` that belong to `rows` of `count`."""
        times = runs(x.shape, x.shape[dimension], self.copies * count, where)
        copy, row, time = (torch.arange(n, device=x.device) for n in (self.copies, count, times))
        return ((copy[:, None, None] * count + row[rows, None]) * times + time).flatten()


def _through_the_weights(layer: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the module gives when it is run once for each adapter, on its rows alone and with its weights.

    Raises RowsError where it does not show which of what goes in and comes out belongs to which row.
    """
    base, routing = layer.get_base_layer(), layer.routing
    chain = layer.chain()
    inside = [module for module in base.modules() if isinstance(module, LayerAdapters)]
    by_name: dict[str, list[int]] = {}
    for row, name in enumerate(routing.names):
        by_name.setdefault(name, []).append(row)
    if (
        len(by_name) == 1
        or layer.disable_adapters
        or not any(n in one.r for one in (*chain, *inside) for n in by_name)
    ):
        replaced: dict[str, Tensor] = {}
        for one in () if layer.disable_adapters else chain:
            replaced |= weights_for_all(one)
        return functional_call(base, replaced, args, kwargs) if replaced else base(*args, **kwargs)
    split = _split(layer, args, kwargs)
    given, structure = tree_flatten((split.args, split.kwargs))
    count, where = len(routing.names), type(base).__name__
    order, parts = [], []
    for name, rows in by_name.items():
        own = [
            x if at is None else x.index_select(at, split.places(rows, x, at, count, where))
            for x, at in zip(given, split.dimensions, strict=True)
        ]
        with routing.route([name] * len(rows)):
            own_args, own_kwargs = tree_unflatten(own, structure)
            parts.append(_through_the_weights(layer, own_args, own_kwargs))
        order.append(split.places(rows, given[0], split.dimensions[0] or 0, count, where))
    back = torch.cat(order).argsort()
    pieces, structures = zip(*(tree_flatten(part) for part in parts), strict=True)
    whole = []
    for i, ys in enumerate(zip(*pieces, strict=True)):
        at = split.outputs[min(i, len(split.outputs) - 1)]
        if any(
            y is not None and not (isinstance(y, Tensor) and y.shape[at : at + 1] == rows.shape)
            for y, rows in zip(ys, order, strict=True)
        ):
            raise _refusal(layer, f"what it gives has not the rows as dimension {at}")
        whole.append(None if ys[0] is None else torch.cat(ys, at).index_select(at, back))
    return tree_unflatten(whole, structures[0])


def _split(layer: Any, args: tuple, kwargs: dict[str, Any]) -> _Split:
    """How the module's inputs can be divided among the rows. Raises RowsError where that does not show."""
    base = layer.get_base_layer()
    if type(base).forward is nn.MultiheadAttention.forward:
        return _of_attention(layer, args, kwargs)
    given = tree_flatten((args, kwargs))[0]
    tensors = [x for x in given if isinstance(x, Tensor)]
    others = all(x is None or isinstance(x, Tensor | bool | int | float | str) for x in given)
    if not others or not given or not isinstance(given[0], Tensor):
        raise _refusal(layer, "it is given more than tensors")
    check = _check_experts if layer.kind.layout is EXPERTS else _check_alone
    copies = check(layer, *tensors)
    # what goes with the tokens of experts has their length
    dimensions = [
        0 if isinstance(x, Tensor) and x.shape[:1] == given[0].shape[:1] else None for x in given
    ]
    return _Split(args, kwargs, dimensions, copies=copies)


def _of_attention(layer: Any, args: tuple, kwargs: dict[str, Any]) -> _Split:
    """torch's own: it says where its batch is; a mask for each head stands in its first dimension, row by row."""
    base = layer.get_base_layer()
    names = signature(base.forward).bind(*args, **kwargs).arguments
    query, mask = names["query"], names.get("attn_mask")
    if query.ndim != 3:
        raise _refusal(layer, f"its query {tuple(query.shape)} is no batch")
    batch = 0 if base.batch_first else 1
    at = dict.fromkeys(("query", "key", "value"), batch) | {"key_padding_mask": 0}
    if mask is not None and mask.ndim == 3:
        at["attn_mask"] = 0
    dimensions = [at.get(name) if isinstance(x, Tensor) else None for name, x in names.items()]
    return _Split((), dict(names), dimensions, outputs=(batch, 0))


def _check_experts(layer: Any, x: Tensor, *more: Tensor) -> int:
    """Fused experts: tokens, and to which experts each goes; or every token for each expert, expert after expert."""
    base = layer.get_base_layer()
    if not more and type(base).__name__ in EXPERT_AFTER_EXPERT:
        return layer.experts
    routed = any(t.ndim == 2 and not t.is_floating_point() for t in more)
    if x.ndim != 2 or not routed or any(t.shape[:1] != x.shape[:1] for t in more):
        raise _refusal(layer, "it is not told which tokens go to which expert")
    return 1


def _check_alone(layer: Any, x: Tensor, *more: Tensor) -> int:
    """One tensor, whose first dimension is taken to be that of the rows, as before any layer.

    In what goes with a tensor (offsets, masks, a cache) the rows may be anywhere.
    """
    least = 2 if x.is_floating_point() else 1
    base = layer.get_base_layer()
    if isinstance(base, _ConvNd):
        least = base.weight.ndim
    if more or x.ndim < least:
        raise _refusal(layer, "where the rows are in its inputs does not show")
    return 1


def _refusal(layer: Any, why: str) -> RowsError:
    return RowsError(
        f"A {type(layer.get_base_layer()).__name__} is adapted through its weight, and {why}: adapter_names=… does not "
        "work with it. Run the adapters one after another."
    )


# --- through the output ---------------------------------------------------------------------------


def _original_rows(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """`y` with the rows that go through no adapter as the original W gives them, where LoftQ has put another in its place."""
    names = layer.routing.names
    base_rows = [row for row, name in enumerate(names) if name == BASE]
    if not base_rows or layer.quantised_by is None:
        return y
    base, kind = layer.get_base_layer(), layer.kind
    W = kind.store(base).shaped(layer.original_weight())
    chosen = repeated(base_rows, x, len(names), type(base).__name__)
    return y.index_copy(0, chosen, functional_call(base, {kind.weight: W}, (x[chosen],)))


def _together(layer: Any) -> list[tuple[list[str], list[list[int]]]]:
    """(adapters, the rows of each) that can share a batched product: plain LoRA, same r, same number of rows."""
    found: dict[tuple, tuple[list[str], list[list[int]]]] = {}
    for name, rows in groups(layer.routing.names).items():
        if name not in layer.r:
            continue
        key = (layer.rank(name), len(rows)) if _plain(layer, name) else (name,)
        names, rows_of = found.setdefault(key, ([], []))
        names.append(name)
        rows_of.append(rows)
    return list(found.values())


def _plain(layer: Any, name: str) -> bool:
    """Whether the adapter only adds scaling·B·A·x to a linear layer's output."""
    dropout = layer.lora_dropout[name]
    return (
        layer.kind.op.up_onto is not None
        and not layer.use_dora[name]
        and name not in layer.routing.invocations
        and not layer.lora_bias[name]
        and (isinstance(dropout, nn.Identity) or not dropout.training)
    )


def _remembered(layer: Any, key: tuple, make: Callable[[], Any]) -> Any:
    """What `make` gives, kept while these rows are routed; made anew each time where gradients are wanted."""
    if torch.is_grad_enabled():
        return make()
    cache, key = layer.routing.cache, (id(layer), *key)
    if key not in cache:
        cache[key] = make()
    return cache[key]


def _one_product(
    layer: Any, names: list[str], rows: list[list[int]], x: Tensor, y: Tensor, count: int
) -> Tensor:
    order = [row for found in rows for row in found]
    where = type(layer.base_layer).__name__
    x_rows = blocks(x, count, where)  # (rows, positions, in)
    y_rows = blocks(y, count, where)  # (rows, positions, out)
    chosen = None if order == list(range(count)) else index(order, x)
    x_rows = x_rows if chosen is None else x_rows[chosen]
    A, B = _stacked(layer, names, x.dtype)
    h = torch.bmm(x_rows.reshape(len(names), -1, x.shape[-1]), A)  # (adapters, rows · positions, r)
    if chosen is None:
        stacked_y = y.reshape(len(names), -1, y.shape[-1])
        return torch.baddbmm(stacked_y, h.to(y.dtype), B.to(y.dtype)).view(y.shape)
    z = torch.bmm(h, B).reshape(len(order), *y_rows.shape[1:])
    return y_rows.index_add(0, chosen, z.to(y.dtype)).view(y.shape)


def _stacked(layer: Any, names: Sequence[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Aᵀ (adapters, in, r) and scaling·Bᵀ (adapters, r, out) of the named adapters, one after another.

    Bᵀ is contiguous: of B itself a batched product on a CPU would make a copy at each call; of A it makes none.
    """

    def stack() -> tuple[Tensor, Tensor]:
        loras = [layer.lora(name) for name in names]
        return (
            torch.stack([lora.A for lora in loras]).to(dtype).mT,
            torch.stack([lora.B * lora.scaling for lora in loras]).to(dtype).mT.contiguous(),
        )

    return _remembered(layer, (*names, dtype), stack)


def _one_adapter(
    layer: Any, name: str, rows: list[int], x: Tensor, y: Tensor, count: int
) -> Tensor:
    chosen = repeated(rows, x, count, type(layer.base_layer).__name__)
    part = y[chosen]
    return y.index_copy(0, chosen, add_output_change(layer, name, x[chosen], part, part, rows))


def by_adapter(
    routing: Routing,
    adapters: Collection[str],
    x: Tensor,
    y: Any,
    change: Callable[[str, Tensor, Tensor], Tensor],
    where: str,
) -> Any:
    """`y` with change(adapter, x, y) in place of the rows that go through each of `adapters`."""
    names = routing.names or ()
    for name, rows in groups(names).items():
        if name in adapters:
            chosen = repeated(rows, x, len(names), where)
            part = y[chosen] if isinstance(y, Tensor) else y
            y = y.index_copy(0, chosen, change(name, x[chosen], part))
    return y


def repeated(rows: list[int], x: Tensor, count: int, where: str) -> Tensor:
    """The indices into x's first dimension that belong to `rows`, each of which may stand there several times."""
    times = runs(x.shape, x.shape[0], count, where)
    return (index(rows, x)[:, None] * times + torch.arange(times, device=x.device)).flatten()
