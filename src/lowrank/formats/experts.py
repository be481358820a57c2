"""Experts in llama.cpp's tensors: one for all experts of a layer, `ffn_gate_exps`, `ffn_up_exps`, `ffn_down_exps`.

A there is (expert, r, in), B (expert, out, r), with one rank and scaling for all. transformers 5 holds gate and up in one
parameter, [gate; up]: each takes its rows of B, and both the same A. Adapters of single experts (modules, before
transformers 5) are stacked: smaller ranks are filled up with zeros, experts without an adapter are zeros.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank.adapter_layers import AdapterLayer
from lowrank.bare_parameters import Bare
from lowrank.bases.kinds import EXPERTS
from lowrank.errors import ConvertError, listed
from lowrank.formats.layers import folded, most_common
from lowrank.fused_experts import fused_factors

NAME = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps")
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
    layers: Mapping[str, AdapterLayer], experts: int
) -> tuple[dict[str, AdapterLayer], dict[str, AdapterLayer]]:
    """The layers of experts by llama.cpp's names, with A (expert, r, in) and B (expert, out, r); and all others.

    experts: how many there are. Raises ConvertError where a layer has others.
    """
    found: dict[str, AdapterLayer] = {}
    rest: dict[str, AdapterLayer] = {}
    singles: dict[str, dict[int, AdapterLayer]] = {}
    problems = []
    for path, layer in layers.items():
        fused, single = _FUSED.fullmatch(path), _SINGLE.fullmatch(path)
        if fused and layer.bare is not None:
            if layer.experts != experts:
                problems.append(f"{path} has {layer.experts} experts, the base {experts}.")
            A = EXPERTS.A_matrix(layer.A, layer.experts)
            B = EXPERTS.B_matrix(layer.B, layer.experts)
            words = ["down"] if fused[2] == "down" else ["gate", "up"]
            for word, part in zip(words, B.chunk(len(words), dim=1), strict=True):
                found[_name(fused[1], word)] = AdapterLayer(A, part, layer.alpha)
        elif single and single[3] in _WORDS:
            if int(single[2]) >= experts:
                problems.append(f"{path}: the base has {experts} experts.")
            name = _name(single[1], _WORDS[single[3]])
            singles.setdefault(name, {})[int(single[2])] = layer
        else:
            rest[path] = layer
    problems += [f"{name} is adapted twice." for name in singles if name in found]
    if problems:
        raise ConvertError(listed(problems))
    found |= {name: _stack(given, experts) for name, given in singles.items()}
    return found, rest


def _name(layer: str, word: str) -> str:
    return f"blk.{layer}.ffn_{word}_exps"


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


def fused(parts: Mapping[str, Mapping[str, Tensor]], alpha: float) -> dict[str, AdapterLayer]:
    """The layers by the paths of transformers' parameters. parts: a and b by llama.cpp's names; alpha: 0 is scale 1.

    Raises ConvertError where a part has only one of a and b.
    """
    by_layer: dict[str, dict[str, AdapterLayer]] = {}
    for name, part in parts.items():
        match = NAME.fullmatch(name)
        assert match is not None
        if len(part) != 2:
            raise ConvertError(f"{name} has only one of lora_a and lora_b.")
        r = part["a"].shape[1]
        by_layer.setdefault(match[1], {})[match[2]] = AdapterLayer(
            part["a"], part["b"], alpha or float(r)
        )
    found = {}
    for number, given in by_layer.items():
        module = f"model.layers.{number}.mlp.experts"
        wide = _gate_up(given)
        # the parameters of one module are nested in its own order, the last one outermost
        inner = f"{module}.base_layer" if "down" in given else module
        for name, key, layer in (
            ("gate_up_proj", inner, wide),
            ("down_proj", module, given.get("down")),
        ):
            if layer is not None:
                path = f"{module}.{name}"
                found[path] = _saved(layer, path, module, key)
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
    Bs = [gate.B, folded(up.B, scales[1] / scales[0])]
    if torch.equal(gate.A, up.A):
        return AdapterLayer(gate.A, torch.cat(Bs, dim=1), gate.alpha)
    A, B = fused_factors([gate.A.unbind(), up.A.unbind()], [B.unbind() for B in Bs])
    A, B = EXPERTS.A_matrix(A, len(gate.A)), EXPERTS.B_matrix(B, len(gate.A))
    return AdapterLayer(A, B, scales[0] * A.shape[1])


def _saved(layer: AdapterLayer, path: str, module: str, key: str) -> AdapterLayer:
    experts, r, _ = layer.A.shape
    A = layer.A.flatten(0, 1).contiguous()
    B = EXPERTS.B_saved(layer.B).flatten(1).contiguous()
    return AdapterLayer(
        A, B, layer.alpha, bare=Bare(path, module, key, experts, r, layer.alpha, (path,))
    )
