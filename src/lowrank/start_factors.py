"""The factors that an adapter started from, where its initialisation takes them out of W (PiSSA, OLoRA, …).

ΔW = scaling·(B·A − B₀·A₀), and W itself is untouched. An adapter's file holds A and B, as PEFT's does; A₀ and
B₀ lie beside it in `lora_start.safetensors`, under the same keys; for LoftQ in several turns those of what was taken out
of W before it was rounded for the last time. Or the four become an ordinary LoRA of rank
2r, which needs to know nothing of all this.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter_file import START_NAME, Adapter
from lowrank.config import LoraConfig
from lowrank.errors import AdapterFileError
from lowrank.init import Init, Start, computed_again, loftq_again, taken_out
from lowrank.init_config import LoftQConfig
from lowrank.state import file_key, tied_copies
from lowrank.wrappers import lora_layers

_FACTOR_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


def start_factors(model: nn.Module, adapter_name: str, loftq: bool = False) -> dict[str, Tensor]:
    """A₀ and B₀ of every layer, under the keys that A and B have in the adapter's file; empty if there are none.

    loftq: those of LoftQ.
    """
    found = {
        f"{path}.{file_key(name, adapter_name)}": tensor
        for path, layer in lora_layers(model)
        if adapter_name in layer.r
        for name, tensor in (layer.loftq_factors if loftq else layer.start_factors)(
            adapter_name
        ).items()
    }
    return found | tied_copies(model, found, adapter_name)


def inits_from(adapter: Adapter) -> dict[str, Init]:
    """By the path of each layer, an initialisation that gives A₀ and B₀ of the adapter's files, or LoftQ's base."""
    config = adapter.config
    if config.init_lora_weights == "loftq":
        bits = LoftQConfig(**config.loftq_config).loftq_bits
        return {
            path: partial(loftq_again, A=A, B=B, bits=bits)
            for path, (A, B) in start_pairs(adapter.start).items()
        }
    return _inits(adapter.start)


def _inits(start: Mapping[str, Tensor]) -> dict[str, Init]:
    return {path: _given(A, B) for path, (A, B) in start_pairs(start).items()}


def start_pairs(start: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """By the path of each layer, A₀ and B₀ of a file."""
    return {
        path: (factors["A"], factors["B"])
        for path, factors in _by_path(start).items()
        if factors.keys() == {"A", "B"}
    }


def _given(A: Tensor, B: Tensor) -> Init:
    def given(read: Callable[[], Tensor], shape: tuple[int, int], r: int, scaling: float) -> Start:
        return Start(A.flatten(1), B.flatten(1), taken_out=True)

    return given


def _by_path(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR_KEY.fullmatch(key)
        if match:
            path = match[1].replace(".base_layer.", ".")
            found.setdefault(path, {})[match[2]] = tensor
    return found


def check_start(
    config: LoraConfig, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], where: Any
) -> None:
    """Raises AdapterFileError if the adapter's start was taken out of W and can neither be read nor computed."""
    init = config.init_lora_weights
    if not taken_out(init) or computed_again(init):
        return
    missing = sorted(_by_path(tensors).keys() - _by_path(start).keys())
    if missing:
        raise AdapterFileError(
            f"{where} was started with init_lora_weights={init!r}, which takes the start out of the base's weights, "
            f"and that start cannot be computed again: {START_NAME} has to lie beside the adapter, and lacks "
            f"{len(missing)} layers ({', '.join(missing[:3])}).\nIf another library wrote it, let that one "
            "convert it to a plain LoRA (PEFT: save_pretrained(…, path_initial_model_for_weight_conversion=…))."
        )


def replace_start(
    model: nn.Module,
    adapter_name: str,
    before: bool | str,
    init: bool | str,
    start: Mapping[str, Tensor],
) -> None:
    """Gives an adapter that is there the start of a file: as it is in `start`, or else as `init` computes it.

    before: the adapter's own `init_lora_weights` so far, whose start stays if it is the same.
    """
    given = {} if init == "loftq" else _inits(start)
    for path, layer in lora_layers(model):
        if adapter_name not in layer.r or layer.leader(adapter_name) is not None:
            continue
        place = path.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if place in given or (taken_out(init) and init != before):
            layer.restart(adapter_name, given.get(place, init))
        elif not taken_out(init):
            layer.set_start(adapter_name, None, None)


def start_problems(adapter: Adapter, name: str) -> list[str]:
    """Why the adapter's ΔW is not known without its base, a sentence; empty if it is."""
    init = adapter.config.init_lora_weights
    if init == "loftq":
        return [
            f'{name} was started with init_lora_weights="loftq" and stands on a quantised base, a change of full '
            "rank that no LoRA for the untouched base can hold. merge_and_unload() it, or save that base "
            "(unload(keep_quantised=True)) and the adapter with init_lora_weights=True for it."
        ]
    lacking = sorted(_by_path(adapter.tensors).keys() - _by_path(adapter.start).keys())
    if not lacking or not (adapter.start or taken_out(init)):
        return []
    return [
        f"{name} was started with init_lora_weights={init!r}, and what that took out of the base is not known here: "
        f"{START_NAME} lacks {', '.join(lacking[:3])}. Load it onto its base, and save_pretrained(…, as_plain_lora=True)."
    ]


def as_plain_lora(adapter: Adapter) -> Adapter:
    """The same ΔW as an ordinary LoRA of rank 2r for the untouched base; `adapter` itself if it is one.

    B·A − B₀·A₀ = [B − B₀, B₀]·[A; A − A₀] = [B, B − B₀]·[A − A₀; A₀]: the second for an embedding, so that a head that has
    its adapter transposed has it still. Every layer keeps its scaling: r and rank_pattern are doubled,
    lora_alpha and alpha_pattern grow by 2, or with rsLoRA by √2. DoRA's magnitudes stay: they belong to W + ΔW.
    Raises AdapterFileError if the start was taken out of W and is not known.
    """
    config = adapter.config
    init = config.init_lora_weights
    if not adapter.start and not taken_out(init) and init != "loftq":
        return adapter
    problems = start_problems(adapter, "The adapter")
    if problems:
        raise AdapterFileError(problems[0])
    growth = math.sqrt(2) if config.use_rslora else 2
    plain = dataclasses.replace(
        config,
        r=2 * config.r,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        lora_alpha=growth * config.lora_alpha,
        alpha_pattern={key: growth * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
        corda_config=None,
        lora_ga_config=None,
    )
    tensors = {
        key: _doubled(key, tensor.detach(), adapter.start.get(key))
        for key, tensor in adapter.tensors.items()
    }
    return Adapter(plain, tensors, adapter.metadata)


def _doubled(key: str, factor: Tensor, start: Tensor | None) -> Tensor:
    """A (r, …) or B (out, r, …) with as many rows or columns again; any other tensor as it is."""
    match = _FACTOR_KEY.fullmatch(key)
    if not match or start is None:
        return factor
    start = start.to(factor)
    first = (match[2] == "A") is not (
        "lora_embedding_" in key
    )  # of the two that make up one factor
    parts = [factor, factor - start] if first else [factor - start, start]
    return torch.cat(parts, dim=0 if match[2] == "A" else 1)
