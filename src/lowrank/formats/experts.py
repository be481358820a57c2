"""Experts as llama.cpp and MLX hold them: gate, up and down of a layer, each one tensor of all experts.

A there is (expert, r, in), B (expert, out, r), with one rank and scaling for all. transformers 5 holds gate and up in one
parameter, [gate; up]: each takes its rows of B, and both the same A. Adapters of single experts (modules, before
transformers 5) are stacked: smaller ranks are filled up with zeros, experts without an adapter are zeros.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from lowrank.adapter_file import Adapter
from lowrank.adapter_layers import AdapterLayer, read_layers
from lowrank.bare_parameters import Bare, bare_parameters
from lowrank.bases.kinds import EXPERTS
from lowrank.errors import ConvertError, listed
from lowrank.formats.base_model import ARCHITECTURES
from lowrank.formats.layers import folded, most_common
from lowrank.fused_experts import fused_factors

Place = tuple[str, str]  # the number of a layer, and gate, up or down; gate_up is read as well

_FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj")
_SINGLE = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
_WORDS = {
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    **{f"{word}_proj": word for word in ("gate", "up", "down")},
}


def count(config: Mapping[str, Any]) -> int:
    """How many experts a config.json says that there are."""
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


def read_adapted(
    adapter: Adapter, config: Mapping[str, Any]
) -> tuple[dict[Place, AdapterLayer], dict[str, AdapterLayer]]:
    """`stacked` of an adapter's layers, for a base with this config.json. Raises ConvertError, with all that is wrong."""
    (bare,), problems = bare_parameters([adapter], shapes(config))
    layers, _, wrong = read_layers(adapter, bare)
    if problems or wrong:
        raise ConvertError(listed([*problems, *wrong]))
    row = ARCHITECTURES.get(config.get("model_type", ""))
    if row is None or not row.experts:
        return {}, layers
    return stacked(layers, count(config), row.interleaved)


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """(expert, out, in) of the parameters that hold all experts of a layer, by path."""
    hidden, inner = config.get("hidden_size"), config.get("moe_intermediate_size")
    inner, n = inner or config.get("intermediate_size"), count(config)
    if not (hidden and inner and n):
        return {}
    return {
        f"model.layers.{i}.mlp.experts.{name}": shape
        for i in range(config.get("num_hidden_layers", 0))
        for name, shape in (
            ("gate_up_proj", (n, 2 * inner, hidden)),
            ("down_proj", (n, hidden, inner)),
        )
    }


def stacked(
    layers: Mapping[str, AdapterLayer], experts: int, interleaved: bool = False
) -> tuple[dict[Place, AdapterLayer], dict[str, AdapterLayer]]:
    """The layers of experts, with A (expert, r, in) and B (expert, out, r); and all others, routers by their modules.

    experts: how many there are. interleaved: gate's and up's rows come by turns. Raises ConvertError where a layer has others.
    """
    found: dict[Place, AdapterLayer] = {}
    rest: dict[str, AdapterLayer] = {}
    singles: dict[Place, dict[int, AdapterLayer]] = {}
    problems = []
    for path, layer in layers.items():
        fused, single = _FUSED.fullmatch(path), _SINGLE.fullmatch(path)
        if fused and layer.bare is not None:
            if layer.experts != experts:
                problems.append(f"{path} has {layer.experts} experts, the base {experts}.")
            A = EXPERTS.A_matrix(layer.A, layer.experts)
            B = EXPERTS.B_matrix(layer.B, layer.experts)
            if fused[2] == "down":
                parts = {"down": B}
            else:
                gate, up = (B[:, ::2], B[:, 1::2]) if interleaved else B.chunk(2, dim=1)
                parts = {"gate": gate, "up": up}
            for word, part in parts.items():
                found[fused[1], word] = AdapterLayer(A, part, layer.alpha)
        elif single and single[3] in _WORDS:
            if int(single[2]) >= experts:
                problems.append(f"{path}: the base has {experts} experts.")
            place = single[1], _WORDS[single[3]]
            singles.setdefault(place, {})[int(single[2])] = layer
        elif layer.bare is not None and layer.experts == 1:  # transformers' routers are no Linear
            rest[path.removesuffix(".weight")] = layer._replace(bare=None)
        else:
            rest[path] = layer
    problems += [
        f"model.layers.{number}: {word} of the experts is adapted twice."
        for number, word in singles
        if (number, word) in found
    ]
    if problems:
        raise ConvertError(listed(problems))
    found |= {place: _stack(given, experts) for place, given in singles.items()}
    return found, rest


def _stack(given: Mapping[int, AdapterLayer], experts: int) -> AdapterLayer:
    rank = max(layer.r for layer in given.values())
    scale = most_common(layer.scaling for layer in given.values()) or 1.0
    one = next(iter(given.values()))
    empty = one.A.new_zeros(rank, one.A.shape[1]), one.B.new_zeros(one.B.shape[0], rank)
    As, Bs = [], []
    for e in range(experts):
        if e not in given:
            As.append(empty[0])
            Bs.append(empty[1])
            continue
        layer = given[e]
        missing = rank - layer.r
        As.append(pad(layer.A, (0, 0, 0, missing)))
        Bs.append(pad(folded(layer.B, layer.scaling / scale), (0, missing)))
    wide = torch.float32 if any(B.dtype != one.B.dtype for B in Bs) else one.B.dtype
    return AdapterLayer(torch.stack(As), torch.stack([B.to(wide) for B in Bs]), scale * rank)


def router(module: str, layer: AdapterLayer) -> tuple[str, AdapterLayer]:
    """A layer at a router's module, as transformers has it: the module's parameter, by its path. Others as they are."""
    match = re.fullmatch(r"(model\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.(gate|router)", module)
    if match is None:
        return module, layer
    key = f"{match[1]}mlp.{match[2]}"
    path = f"{key}.weight"
    return path, layer._replace(bare=Bare(path, key, key, 1, layer.r, layer.alpha, (path,)))


def fused(
    layers: Mapping[Place, AdapterLayer], interleaved: bool = False
) -> dict[str, AdapterLayer]:
    """The layers by the paths of transformers' parameters; given with A (expert, r, in) and B (expert, out, r).

    interleaved: gate's and up's rows come by turns.
    """
    by_number: dict[str, dict[str, AdapterLayer]] = {}
    for (number, word), layer in layers.items():
        by_number.setdefault(number, {})[word] = layer
    found = {}
    for number, given in by_number.items():
        module = f"model.layers.{number}.mlp.experts"
        # the parameters of one module are nested in its own order, the last one outermost
        inner = f"{module}.base_layer" if "down" in given else module
        wide = _gate_up(given)
        if wide is not None and interleaved and "gate_up" not in given:
            rows = wide.B.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            wide = wide._replace(B=rows)
        parts = (("gate_up_proj", inner, wide), ("down_proj", module, given.get("down")))
        for name, key, part in parts:
            if part is not None:
                path = f"{module}.{name}"
                found[path] = _saved(part, path, module, key)
    return found


def _gate_up(given: Mapping[str, AdapterLayer]) -> AdapterLayer | None:
    """Of gate and up one adapter, A (expert, r, in) and B (expert, 2·out, r): at one rank where they share A."""
    gate, up = given.get("gate"), given.get("up")
    if gate is None or up is None:
        one = gate or up
        if one is None:
            return given.get("gate_up")
        zero = torch.zeros_like(one.B)
        return one._replace(B=torch.cat([one.B, zero] if gate else [zero, one.B], dim=1))
    scales = [layer.alpha / layer.A.shape[1] for layer in (gate, up)]
    scale = scales[0] or 1.0
    Bs = [folded(layer.B, s / scale) for layer, s in zip((gate, up), scales, strict=True)]
    if torch.equal(gate.A, up.A):
        return AdapterLayer(gate.A, torch.cat(Bs, dim=1), scale * gate.A.shape[1])
    A, B = fused_factors([gate.A.unbind(), up.A.unbind()], [B.unbind() for B in Bs])
    A, B = EXPERTS.A_matrix(A, len(gate.A)), EXPERTS.B_matrix(B, len(gate.A))
    return AdapterLayer(A, B, scale * A.shape[1])


def _saved(layer: AdapterLayer, path: str, module: str, key: str) -> AdapterLayer:
    experts, r, _ = layer.A.shape
    A = layer.A.flatten(0, 1).contiguous()
    B = EXPERTS.B_saved(layer.B).flatten(1).contiguous()
    return AdapterLayer(
        A, B, layer.alpha, bare=Bare(path, module, key, experts, r, layer.alpha, (path,))
    )
