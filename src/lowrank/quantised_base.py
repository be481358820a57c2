"""Which layers of a base are quantised and how: in a model, in an adapter's file, and put onto a model in 16 or 32 bits."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter_file import Adapter
from lowrank.adapter_layers import read_layers
from lowrank.bases.kinds import quantisation_of
from lowrank.init.weight import LOFTQ
from lowrank.init_config import LoftQConfig
from lowrank.kernels.quantisation import rounded
from lowrank.lora import Lora, without
from lowrank.quantisation import IN_BLOCKS, Quantisation
from lowrank.start_factors import start_pairs
from lowrank.wrappers import LoraLayer

METADATA_KEY = "quantisation"  # in our metadata of an adapter's file, beside the base's fingerprint
_PREFIX = "base_model.model."


def quantised_layers(model: nn.Module) -> dict[str, Quantisation]:
    """By its path in the base model, how each quantised layer is rounded; adapted or not. Empty for a float base."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            continue
        quantisation = quantisation_of(module)
        if quantisation is not None:
            path = path.removeprefix(_PREFIX).replace(".base_layer.", ".")
            found[path.removesuffix(".base_layer")] = quantisation
    return found


def to_json(layers: Mapping[str, Quantisation]) -> list[dict[str, Any]]:
    """What an adapter's file names: each quantisation that there is, with its layers."""
    return [
        {**one.to_json(), "layers": [path for path, other in layers.items() if other == one]}
        for one in dict.fromkeys(layers.values())
    ]


def from_json(rows: Iterable[Mapping[str, Any]] | None) -> dict[str, Quantisation]:
    """The reverse of `to_json`; empty for an adapter whose file names none."""
    return {path: Quantisation.from_json(row) for row in rows or () for path in row["layers"]}


def trained_on(adapter: Adapter) -> dict[str, Quantisation]:
    """The layers of the base that were quantised under this adapter; empty if none was, or it is not known.

    LoftQ quantises the layers that it adapts, in several turns after it took `loftq_less` out of them.
    """
    layers = from_json(adapter.metadata.get(METADATA_KEY))
    plain = on_quantised(adapter)
    if not layers and plain is not adapter:
        bits = LoftQConfig(**adapter.config.loftq_config).loftq_bits
        return dict.fromkeys(read_layers(plain).layers, LOFTQ[bits])
    return layers


def remade(layers: Mapping[str, Quantisation]) -> bool:
    """Whether the quantised weights follow from the original ones here, bit for bit: bitsandbytes' rounding and ours."""
    return all(
        q.backend in ("lowrank", "bitsandbytes") and q.format in (*IN_BLOCKS, "int8")
        for q in layers.values()
    )


def is_loftq(adapter: Adapter) -> bool:
    """Whether ΔW makes up for the quantisation, and so belongs to no other weights than the quantised ones."""
    return adapter.config.init_lora_weights == "loftq"


def on_quantised(adapter: Adapter) -> Adapter:
    """LoftQ's adapter as what it is on those quantised weights, an ordinary LoRA; any other as it is.

    So is one of several turns whose folder lacks what was taken out of W before the last: its Q is not known.
    """
    if not is_loftq(adapter):
        return adapter
    config = dataclasses.replace(adapter.config, init_lora_weights=True, loftq_config={})
    plain = adapter._replace(config=config, start={})
    if LoftQConfig(**adapter.config.loftq_config).loftq_iter > 1:
        known = start_pairs(adapter.start).keys()
        return plain if read_layers(plain).layers.keys() <= known else adapter
    return plain


def loftq_less(adapter: Adapter) -> dict[str, Lora]:
    """By the path of each layer, what LoftQ in several turns took out of W before it rounded that; empty for all else."""
    plain = on_quantised(adapter)
    pairs = start_pairs(adapter.start) if plain is not adapter else {}
    layers = read_layers(plain).layers if pairs else {}
    return {path: Lora(A, B, layers[path].scaling) for path, (A, B) in pairs.items()}


def in_words(layers: Mapping[str, Quantisation]) -> str:
    """ "nf4 in blocks of 64 (bitsandbytes)", and where there are several, how many layers each has."""
    counts = {one: list(layers.values()).count(one) for one in dict.fromkeys(layers.values())}
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{one} ({count} layers)" for one, count in counts.items())


@torch.no_grad()
def round_weights(model: nn.Module, layers: Mapping[str, Quantisation]) -> None:
    """Replaces the weights of `layers` by what their quantisation makes of them, in the dtype that they are in.

    A base in bfloat16 has to be loaded as float32 first: rounding to 16 bits once more would be another weight.
    """
    for path, quantisation in layers.items():
        module = model.get_submodule(path)
        W = module.get_parameter("weight")
        Q = rounded_weight(module, quantisation).to(W.dtype)
        module._parameters["weight"] = nn.Parameter(Q, requires_grad=W.requires_grad)


@torch.no_grad()
def rounded_weight(
    module: nn.Module, quantisation: Quantisation, less: Lora | None = None
) -> Tensor:
    """What `quantisation` makes of the weight of a linear layer, as it is held there, without `less`; float32."""
    held = module.get_parameter("weight")
    transposed = type(module).__name__ == "Conv1D"
    W = held.T if transposed else held
    Q = rounded(W if less is None else without(W, less), quantisation)
    return Q.T.contiguous() if transposed else Q
