"""Which parameter (target_parameters) each factor in an adapter's file adapts. The file does not say it.

Its keys name the module alone. Those of several parameters of one module are nested in that module's own
order, the last one outermost, and only the model knows that order. Ranks, and the shapes in the fingerprint of
the base, mostly tell them apart; where they do not, the parameters are known as a group.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

from torch import Size

from lowrank.adapter_file import Adapter
from lowrank.path_patterns import is_or_ends, pattern_value

PREFIX = "base_model.model."
LORA_KEY = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(weight|bias))?")


class Bare(NamedTuple):
    """What the factors under one key adapt."""

    path: str  # the parameter's; `key` where it could be one or another of `among`
    module: str
    key: str  # the module as the file's keys have it, base_layers included
    experts: int  # how many the factors stack
    r: int
    alpha: float
    among: tuple[str, ...]  # the parameters, by path, that this one is known to be among


class _Place(NamedTuple):
    key: str
    A: Size
    B: Size


Shapes = Mapping[str, tuple[int, ...]]  # by parameter: (experts, out, in)


def bare_parameters(
    adapters: Sequence[Adapter], base: Shapes | None = None
) -> tuple[list[dict[str, Bare]], list[str]]:
    """For each adapter, by the key of its factors' module, what they adapt; and what cannot be told, a sentence each.

    Only modules whose parameters target_parameters names are in it. What one adapter makes known of the base's
    shapes serves the others. base: shapes that are known from elsewhere.
    """
    shapes = dict(base or {})
    for adapter in adapters:
        weights = (adapter.metadata.get("base") or {}).get("weights") or {}
        shapes |= {
            path: (1, *row["shape"])[-3:]
            for path, row in weights.items()
            if len(row["shape"]) in (2, 3)
        }
    for _ in range(2):  # what is told apart at first may tell the others apart
        found = [_of_adapter(adapter, shapes) for adapter in adapters]
        shapes |= {path: shape for _, _, known in found for path, shape in known.items()}
    return [bare for bare, _, _ in found], [text for _, texts, _ in found for text in texts]


def _of_adapter(adapter: Adapter, shapes: Shapes) -> tuple[dict[str, Bare], list[str], Shapes]:
    found: dict[str, Bare] = {}
    problems: list[str] = []
    known: dict[str, tuple[int, ...]] = {}
    config = adapter.config
    for module, places in _places(adapter).items():
        paths = [
            f"{module}.{name.rpartition('.')[2]}"
            for name in config.target_parameters or ()
            if is_or_ends(f"{module}.{name.rpartition('.')[2]}", name)
        ]
        own = len(places) == 1 and places[0].A[0] == pattern_value(
            config.rank_pattern, module, config.r
        )
        named_only = all("." not in name for name in config.target_parameters or ())
        if not paths or (named_only and own):  # a name alone would fit every module
            continue
        orders = _orders(places, list(dict.fromkeys(paths)), adapter, shapes)
        numbers = {tuple((bare.r, bare.alpha) for bare in order) for order in orders}
        if len(numbers) != 1:
            problems.append(
                f"{module}: which of its {len(places)} pairs of factors belongs to which of "
                f"{', '.join(path.rpartition('.')[2] for path in paths)} "
                + ("does not show from" if orders else "does not go with")
                + " their ranks and shapes."
            )
            continue
        for i, place in enumerate(places):
            among = tuple(sorted({order[i].path for order in orders}))
            bare = orders[0][i]._replace(among=among)
            if len(among) == 1:
                known[bare.path] = (bare.experts, place.B[0], place.A[1])
            found[place.key] = bare if len(among) == 1 else bare._replace(path=place.key)
    return found, problems, known


def _places(adapter: Adapter) -> dict[str, list[_Place]]:
    """By module, where its factors are, the outermost first."""
    found: dict[str, list[_Place]] = {}
    if not adapter.config.target_parameters:
        return found
    for key, A in adapter.tensors.items():
        match = LORA_KEY.fullmatch(key)
        if not match or match[2] != "lora_A" or match[3] != "weight" or A.ndim != 2:
            continue
        B = adapter.tensors.get(f"{match[1]}.lora_B.weight")
        if B is not None and B.ndim == 2 and B.shape[1] == len(A):
            place = match[1].removeprefix(PREFIX)
            module = re.sub(r"(\.base_layer)+$", "", place).replace(".base_layer.", ".")
            found.setdefault(module, []).append(_Place(place, A.shape, B.shape))
    for places in found.values():
        places.sort(key=lambda place: len(place.key))
    return found


def _orders(
    places: list[_Place], paths: list[str], adapter: Adapter, shapes: Shapes
) -> list[list[Bare]]:
    """Every way to give the factors to parameters that ranks and shapes allow."""
    config, orders = adapter.config, []
    for chosen in permutations(paths, len(places)):
        order = []
        for path, place in zip(chosen, places, strict=True):
            r = pattern_value(config.rank_pattern, path, config.r)
            alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
            experts = place.A[0] // r
            shape = (experts, place.B[0], place.A[1])
            if place.A[0] % r or shapes.get(path, shape) != shape:
                break
            order.append(Bare(path, path.rpartition(".")[0], place.key, experts, r, alpha, ()))
        else:
            orders.append(order)
    # the fused parameters of one module stack the same experts
    alike = [order for order in orders if len({bare.experts for bare in order}) == 1]
    return alike or orders
