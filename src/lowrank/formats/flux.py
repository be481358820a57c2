"""Flux's modules in kohya's files: the names of Black Forest Labs, whose layers hold several of diffusers' at once.

There `img_attn.qkv` is to_q, to_k and to_v one under the other, and `linear1` proj_mlp as well. Of several adapters
becomes one, exactly: ΔW = [s₁B₁A₁; s₂B₂A₂; …] has A = [A₁; A₂; …] and B with the sᵢBᵢ on its diagonal, of rank Σ rᵢ; or
one A where they share it. The way back takes the rows of each, and of the ranks those that it uses.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.adapter_layers import AdapterLayer
from lowrank.errors import ConvertError
from lowrank.formats.layers import folded, most_common

_MLP_RATIO = 4  # of every Flux: proj_mlp has four rows where to_q has one


class _Place(NamedTuple):
    name: str  # Black Forest Labs', with underscores; {} for the number of the block
    modules: tuple[str, ...]  # diffusers' paths, in the order of their rows
    rows: tuple[int, ...] = ()  # of each, as multiples of the layer's input, where they are that
    swapped: bool = False  # scale and shift are the other way round


def _places() -> list[_Place]:
    found = []
    for ours, attn, ff, norm in (
        ("img", ("to_q", "to_k", "to_v", "to_out.0"), "ff", "norm1"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), "ff_context", "norm1_context"),
    ):  # fmt: skip
        at, block = f"double_blocks_{{}}_{ours}", "transformer_blocks.{}"
        *qkv, out = (f"{block}.attn.{name}" for name in attn)
        found += [
            _Place(f"{at}_attn_qkv", tuple(qkv), (1, 1, 1)),
            _Place(f"{at}_attn_proj", (out,), (1,)),
            _Place(f"{at}_mlp_0", (f"{block}.{ff}.net.0.proj",), (_MLP_RATIO,)),
            _Place(f"{at}_mlp_2", (f"{block}.{ff}.net.2",)),
            _Place(f"{at}_mod_lin", (f"{block}.{norm}.linear",), (6,)),
        ]
    at, block = "single_blocks_{}", "single_transformer_blocks.{}"
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    found += [
        _Place(f"{at}_linear1", tuple(f"{block}.{p}" for p in parts), (1, 1, 1, _MLP_RATIO)),
        _Place(f"{at}_linear2", (f"{block}.proj_out",)),
        _Place(f"{at}_modulation_lin", (f"{block}.norm.linear",), (3,)),
        _Place("img_in", ("x_embedder",)),
        _Place("txt_in", ("context_embedder",)),
        _Place("final_layer_linear", ("proj_out",)),
        _Place("final_layer_adaLN_modulation_1", ("norm_out.linear",), swapped=True),
    ]
    for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        at = f"time_text_embed.{theirs}_embedder"
        found += [
            _Place(f"{ours}_in_in_layer", (f"{at}.linear_1",)),
            _Place(f"{ours}_in_out_layer", (f"{at}.linear_2",)),
        ]
    return found


_PLACES = {place.name: place for place in _places()}
_OF_MODULE = {module: place for place in _PLACES.values() for module in place.modules}


def is_flux(name: str) -> bool:
    """Whether a name with underscores, without its prefix, is one of Flux's."""
    return _numbered(name, r"(?<=blocks_)\d+")[0] in _PLACES


def named(layers: Mapping[str, AdapterLayer]) -> tuple[dict[str, AdapterLayer], list[str]]:
    """By Black Forest Labs' names, the layers by diffusers' paths; and the paths that are none of Flux's.

    Raises ConvertError where a layer has other sizes than Flux's, or DoRA without the magnitudes of all rows.
    """
    parts: dict[str, dict[int, AdapterLayer]] = {}
    foreign = []
    for module, layer in layers.items():
        template, number = _numbered(module, r"(?<=blocks\.)\d+")
        place = _OF_MODULE.get(template)
        if place is None:
            foreign.append(module)
        else:
            index = place.modules.index(template)
            parts.setdefault(place.name.format(number), {})[index] = layer
    found = {}
    for name, given in parts.items():
        place = _PLACES[_numbered(name, r"(?<=blocks_)\d+")[0]]
        for i, layer in given.items():
            _check(f"{name} ({place.modules[i]})", layer, place.rows[i] if place.rows else 0)
        layer = given[0] if len(place.modules) == 1 else _fused(name, given, place)
        found[name] = _swapped(layer) if place.swapped else layer
    return found, foreign


def modules(name: str, layer: AdapterLayer) -> dict[str, AdapterLayer]:
    """The layers by diffusers' paths that one of Flux's layers, by its name with underscores, stands for.

    Raises ConvertError where it has other sizes than Flux's.
    """
    template, number = _numbered(name, r"(?<=blocks_)\d+")
    place = _PLACES[template]
    _check(name, layer, sum(place.rows))
    if place.swapped:
        layer = _swapped(layer)
    parts = [layer] if len(place.modules) == 1 else _split(layer, place)
    pairs = zip(place.modules, parts, strict=True)
    return {module.format(number): part for module, part in pairs if part is not None}


def _numbered(name: str, pattern: str) -> tuple[str, str]:
    """The name with {} for the number of its block, and that number."""
    match = re.search(pattern, name)
    return (name[: match.start()] + "{}" + name[match.end() :], match[0]) if match else (name, "")


def _check(name: str, layer: AdapterLayer, rows: int) -> None:
    """Raises ConvertError where a layer has other sizes than Flux's; rows: as a multiple of its input, 0 for any."""
    wanted = rows * layer.A.shape[1]
    if rows and (layer.A.ndim != 2 or layer.B.shape[0] != wanted):
        raise ConvertError(
            f"{name} has A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)}; with so many inputs Flux's B has "
            f"{wanted} rows."
        )


def _fused(name: str, given: Mapping[int, AdapterLayer], place: _Place) -> AdapterLayer:
    widths = {layer.A.shape[1] for layer in given.values()}
    if len(widths) > 1:
        raise ConvertError(f"{name}: {', '.join(place.modules)} have different inputs: {widths}.")
    (width,) = widths
    rows = [n * width for n in place.rows]
    layers = [given[i] for i in sorted(given)]
    m = [layer.magnitude for layer in layers]
    if any(part is not None for part in m) and (len(m) < len(rows) or any(p is None for p in m)):
        raise ConvertError(
            f"{name} holds {', '.join(place.modules)}: DoRA needs the magnitudes of all of them."
        )
    scale = most_common(layer.scaling for layer in layers) or 1.0
    Bs = {i: folded(layer.B, layer.scaling / scale) for i, layer in given.items()}
    dtype = layers[0].B.dtype
    for B in Bs.values():
        dtype = torch.promote_types(dtype, B.dtype)
    shared = all(torch.equal(layers[0].A, layer.A) for layer in layers[1:])
    if shared:
        A = layers[0].A
        B = torch.cat([Bs[i] if i in Bs else A.new_zeros(n, len(A)) for i, n in enumerate(rows)])
    else:
        A = torch.cat([layer.A for layer in layers])
        B = torch.block_diag(*[Bs[i] if i in Bs else A.new_zeros(n, 0) for i, n in enumerate(rows)])
    magnitude = None if m[0] is None else torch.cat([part for part in m if part is not None])
    return AdapterLayer(A, B.to(dtype), scale * len(A), magnitude)


def _split(layer: AdapterLayer, place: _Place) -> list[AdapterLayer | None]:
    rows = [n * layer.A.shape[1] for n in place.rows]
    nothing = [None] * len(rows)
    ms = nothing if layer.magnitude is None else layer.magnitude.split(rows)
    zero = not layer.B.any()  # an adapter that is not trained yet has its place all the same
    return [_used(layer, B, m, zero) for B, m in zip(layer.B.split(rows), ms, strict=True)]


def _used(layer: AdapterLayer, B: Tensor, m: Tensor | None, zero: bool) -> AdapterLayer | None:
    """The adapter of these rows, without the ranks that add nothing to them; None if none adds anything."""
    used = B.any(dim=0)
    if not used.any():
        if m is None and not zero:
            return None
        used[:] = True
    A, B = layer.A[used].contiguous(), B[:, used].contiguous()
    return AdapterLayer(A, B, layer.scaling * len(A), m)


def _swapped(layer: AdapterLayer) -> AdapterLayer:
    """Its first half of rows under the second."""
    B, m = layer.B, layer.magnitude
    half = len(B) // 2
    return layer._replace(B=B.roll(half, 0), magnitude=None if m is None else m.roll(half, 0))
