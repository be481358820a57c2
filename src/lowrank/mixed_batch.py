"""One layer's forward when the rows of a batch go through different adapters. `layer` is a LoraLayer."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.errors import RowsError
from lowrank.output_change import add_output_change
from lowrank.routing import BASE, Routing, blocks, groups, index


def mixed_forward(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The base layer's output, each row with the change of its own adapter. Row order does not matter.

    Adapters of one rank that have equally many rows go through one batched product; others, and DoRA,
    lora_bias, dropout, embeddings and convolutions, through one product for each adapter.
    """
    y = layer.base_layer(*args, **kwargs)
    x = args[0] if args else next(iter(kwargs.values()))
    assert layer.routing.names is not None
    count = len(layer.routing.names)
    if layer.disable_adapters:
        return y
    rows = {name: found for name, found in groups(layer.routing.names).items() if name in layer.r}
    if rows and layer.kind.op is None:
        raise one_weight_for_all(layer)
    if rows and y.ndim <= -layer.kind.op.channel(layer.base_layer):
        raise RowsError(
            f"A {type(layer.base_layer).__name__} was given {tuple(x.shape)}, which has no dimension for the rows of a "
            "batch: adapter_names=… does not work with it. Run the adapters one after another."
        )
    y = _original_rows(layer, x, y)
    for names in _batches(layer, rows):
        if len(names) > 1:
            y = _one_product(layer, names, [rows[name] for name in names], x, y, count)
        else:
            y = _one_adapter(layer, names[0], rows[names[0]], x, y, count)
    return y


def one_weight_for_all(layer: Any) -> RowsError:
    """What is raised where rows would need different weights at once."""
    return RowsError(
        f"A {type(layer.get_base_layer()).__name__} is adapted through its weight, of which there is one for all "
        "rows: adapter_names=… does not work with it. Run the adapters one after another."
    )


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


def _batches(layer: Any, rows: dict[str, list[int]]) -> list[list[str]]:
    """The adapters, those together that can share a batched product: plain LoRA, same r, same number of rows."""
    together: dict[tuple, list[str]] = {}
    for name, found in rows.items():
        op = layer.kind.op
        plain = (
            op is not None
            and op.up_onto is not None
            and not layer.use_dora[name]
            and name not in layer.routing.invocations
            and not layer.lora_bias[name]
        )
        dropout = layer.lora_dropout[name]
        plain = plain and (isinstance(dropout, nn.Identity) or not dropout.training)
        together.setdefault((layer.rank(name), len(found)) if plain else (name,), []).append(name)
    return list(together.values())


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

    Contiguous in this order: a batched product on a CPU copies transposed factors at each call.
    """
    key = (id(layer), tuple(names), dtype)
    cache = layer.routing.cache
    if not torch.is_grad_enabled() and key in cache:
        return cache[key]
    loras = [layer.lora(name) for name in names]
    found = (
        torch.stack([lora.A.T for lora in loras]).to(dtype),
        torch.stack([lora.B.T * lora.scaling for lora in loras]).to(dtype),
    )
    if not torch.is_grad_enabled():
        cache[key] = found
    return found


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
    blocks(x.reshape(x.shape[0], -1), count, where)
    times = x.shape[0] // count
    return (index(rows, x)[:, None] * times + torch.arange(times, device=x.device)).flatten()
