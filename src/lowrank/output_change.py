"""What adapters add to one layer's output, or to the weight that it runs with. `layer` is a LoraLayer."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.dora_norm import known_norm
from lowrank.kernels.low_rank_add import low_rank_weight
from lowrank.kernels.quantised_linear import quantised_lora
from lowrank.lora import Lora, check_shapes, merged_bias, weight_change


def add_output_change(
    layer: Any,
    name: str,
    x: Tensor,
    base_output: Tensor,
    y: Tensor,
    rows: list[int] | None = None,
) -> Tensor:
    """`y` and what the adapter adds to the base layer's output, in y's dtype. rows: those in x; None: all."""
    op, lora, base = layer.kind.op, layer.lora(name), layer.base_layer
    assert op is not None
    if lora.by_column and lora.magnitude is not None:
        x, y = _by_column(layer, name, lora.magnitude, x, y)
        lora = lora._replace(magnitude=None)
    # the small A and B take the dtype of the large x, never the reverse
    dtype = x.dtype if op.floating else y.dtype
    h = op.down(base, x, lora.A.to(dtype), layer.lora_dropout[name])
    on = layer.routing.activation(name, h, rows)
    h = h if on is None else h * on
    scaling = lora.scaling
    if isinstance(scaling, Tensor):  # low_rank_add takes a number
        h, scaling = h * scaling, 1.0
    along = [1] * y.ndim
    along[op.channel(base)] = -1
    start = y if lora.magnitude is None else base_output
    if op.up_onto and lora.bias is None:
        changed = op.up_onto(start, h.to(y.dtype), lora.B.to(y.dtype), scaling)
    else:
        z = op.up(base, h * scaling, lora.B.to(h.dtype)).to(y.dtype)
        if lora.bias is not None:
            bias = (lora.bias * lora.scaling).to(y.dtype).view(along)
            z = z + (bias if on is None else bias * on)
        changed = start + z
    if lora.magnitude is None:
        return changed
    changed = _with_magnitude(layer, name, lora, changed, along)
    return changed if y is base_output else y + (changed - base_output)


def output_in_one(layer: Any, names: list[str], args: tuple, kwargs: dict) -> Tensor | None:
    """The output of base and adapter together, where one product for both is faster; None elsewhere.

    That is QLoRA with one plain adapter on a QuantisedLinear, on a CPU.
    """
    base = layer.base_layer
    if len(names) != 1 or not isinstance(base, QuantisedLinear) or kwargs or len(args) != 1:
        return None
    (name,), (x,) = names, args
    dropout = layer.lora_dropout[name]
    plain = (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and base.compute_dtype in (None, x.dtype)
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
        and "forward" not in vars(base)  # as accelerate hooks what it offloads
        and not (layer.use_dora[name] or layer.lora_bias[name])
        and not isinstance(layer.scaling[name], Tensor)
        and name not in layer.routing.invocations
        and (isinstance(dropout, nn.Identity) or not dropout.training)
    )
    if not plain:
        return None
    lora = layer.lora(name)
    A, B = lora.A.to(x.dtype), lora.B.to(x.dtype)
    bias = None if base.bias is None else base.bias.to(x.dtype)
    return quantised_lora(x, base.packed, base.quantisation, bias, A, B, lora.scaling)


def _with_magnitude(layer: Any, name: str, lora: Lora, y: Tensor, along: list[int]) -> Tensor:
    """DoRA: c·(y − b) + b with c = m / ‖W + ΔW‖, from y = (W + ΔW)x + b (Liu et al. 2024, eq. 5)."""
    base = layer.base_layer
    assert lora.magnitude is not None
    c = (lora.magnitude / known_norm(layer, name, lora)).view(along)
    bias = getattr(base, layer.kind.bias, None)
    bias = None if bias is None else bias.to(y.dtype).view(along)
    y = y if bias is None else y - bias
    high = c.to(y.dtype)
    scaled = y * high if bias is None else torch.addcmul(bias, y, high)
    if high.dtype == c.dtype:
        return scaled
    # in bfloat16 a c near 1 would be 1: the rest of c comes after it
    return torch.addcmul(scaled, y, (c - high).to(y.dtype).detach())


def _by_column(layer: Any, name: str, m: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """c ⊙ x, and `y` with W(c ⊙ x) − Wx in it: DoRA at a head whose columns are the rows that the embedding normalises.

    W′x = (W + ΔW)(c ⊙ x) with c = m / ‖W + ΔW‖ of each column. c − 1 is small: what it adds is not lost in bfloat16.
    """
    leader = layer.leader(name)
    change = x * (m / known_norm(leader, name, leader.lora(name)) - 1).to(x.dtype)
    added = layer.base_layer(change)
    bias = getattr(layer.base_layer, layer.kind.bias, None)
    return x + change, y + (added if bias is None else added - bias.to(added.dtype))


def weights_with(layer: Any, names: list[str]) -> dict[str, Tensor]:
    """The base layer's weight, and its bias if one changes, with the adapters in them; with autograd."""
    if not names:
        return {}
    base = layer.get_base_layer()
    store = layer.kind.store(base)
    W, original = store.read(), layer.unmerged_weight()
    loras = [layer.lora(name) for name in names]
    if all(lora.magnitude is None for lora in loras):
        check_shapes(W.shape, loras[0])
        A = torch.cat([lora.A for lora in loras], -2)
        B = torch.cat([lora.B * lora.scaling for lora in loras], -1)
        changed = low_rank_weight(W, A, B)
    else:
        changed = (W + sum(weight_change(original, lora) for lora in loras)).to(W.dtype)
    found = {layer.kind.weight: store.shaped(changed)}
    bias = getattr(base, layer.kind.bias, None)
    bias = merged_bias(W.new_zeros(W.shape[-2]) if bias is None else bias, *loras)
    if bias is not None:
        found[layer.kind.bias] = bias.to(W.dtype)
    return found
