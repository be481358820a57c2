"""Several adapters as one, and one adapter at another rank: on their tensors, without any model."""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank import __version__
from lowrank.adapter_file import Adapter
from lowrank.adapter_layers import AdapterLayer, pattern_of, read_layers
from lowrank.bare_parameters import LORA_KEY, PREFIX, Bare, bare_parameters
from lowrank.bases.kinds import EXPERTS
from lowrank.combinable import (
    check_arguments,
    check_configs,
    check_layers,
    common_base,
    common_quantisation,
    layers_of,
    saved_tensors,
    tied_heads,
)
from lowrank.config import LoraConfig
from lowrank.errors import CombineError, ShapeError, listed
from lowrank.quantised_base import METADATA_KEY
from lowrank.task_arithmetic import METHODS, Combined, Options, Weighted


class LayerError(NamedTuple):
    """What a layer of a combined or resized adapter costs."""

    path: str
    r: int
    norm: float | None  # ‖M‖ (Frobenius), M the matrix that the method means, Σ wᵢ·ΔWᵢ for most
    error: float | None  # ‖ΔW − M‖ / ‖M‖; None where the method works on the factors alone


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str = "svd",
    *,
    svd_rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    check_base: bool = True,
    names: Sequence[str] | None = None,
) -> Adapter:
    """One ordinary LoRA adapter in place of several, ΔW = Σ wᵢ·ΔWᵢ or what `method` makes of it.

    A layer that an adapter does not have gets nothing from it. All ΔWᵢ count with their own scaling (rsLoRA,
    alpha_pattern); the result's scaling is 1 everywhere, its tensors float32 (float64 if one was).

    method: "linear" and "cat", the sum exactly, with rank Σ rᵢ. "svd", its best approximation of rank
        `svd_rank` (None: the highest rank among the adapters), or that keeps the share `energy` of ‖ΔW‖².
        "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd": the same of the ΔWᵢ trimmed
        (`density`: the share of entries that is kept), one layer's matrices at a time. "linear_factors",
        "ties", "dare_linear", "dare_ties", "magnitude_prune": PEFT's arithmetic on the Aᵢ and Bᵢ, each by
        itself; PEFT calls the first of them "linear".
    majority_sign_method: "total" or "frequency", TIES' election of a sign. seed: what DARE drops.
    check_base: raise if the adapters' fingerprints say that they were trained on different bases.
    names: what to call the adapters in errors.

    One adapter with weight 1 comes back as it is, whatever is in it, unless the method would approximate
    it. `errors(result)` says what the method cost at each layer.
    Raises CombineError, with everything that does not fit; BaseMismatchError.
    """
    names = list(names or (f"adapter {i + 1}" for i in range(len(adapters))))
    given = {"svd_rank": svd_rank, "energy": energy, "density": density}
    check_arguments(adapters, weights, method, given, majority_sign_method)
    bare, problems = bare_parameters(adapters)
    ranks = [r for a, own in zip(adapters, bare, strict=True) for r in _ranks(a, own)]
    if svd_rank is None and energy is None and METHODS[method].takes_rank:
        svd_rank = max(ranks, default=1)
    if _nothing_to_do(weights, method, svd_rank, energy, ranks):
        return adapters[0]
    check_configs(adapters, names)
    base = common_base(adapters, names, check_base)
    if problems:
        raise CombineError(listed(problems))
    layers = layers_of(adapters, names, bare)
    paths = list(dict.fromkeys(path for found in layers for path in found))
    saved = saved_tensors(adapters, names, paths)
    check_layers(layers, paths, names, method)

    parts = {
        path: [(f[path], w) for f, w in zip(layers, weights, strict=True) if path in f]
        for path in paths
    }
    combined: dict[str, Combined] = {}
    tied = tied_heads(adapters, layers)
    for path in paths:
        if path in tied:
            continue
        options = Options(
            random=_generators(seed, path),
            rank=svd_rank,
            energy=energy,
            density=1.0 if density is None else density,
            majority_sign_method=majority_sign_method,
        )
        combined[path] = _combined(path, parts[path], method, options)
    for path, embedding in tied.items():
        same = combined[embedding]
        embedded = any(layer.embedding for layer, _ in parts[path])
        combined[path] = same if embedded else same._replace(A=same.B.mT, B=same.A.mT)
    combined = _of_even_rank(combined, parts)

    with_bias = any(a.config.lora_bias for a in adapters)
    keys = _keys(layers)
    tensors: dict[str, Tensor] = {}
    for path, found in combined.items():
        tensors |= _as_saved(keys[path], found, parts[path], with_bias)
    report = {
        path: {"r": found.A.shape[-2], "norm": found.norm, "error": found.error}
        for path, found in combined.items()
    }
    config = _config([a.config for a in adapters], parts, combined)
    how = {"method": method, "weights": [float(w) for w in weights], "adapters": names, **given}
    metadata: dict[str, Any] = {
        "versions": {"lowrank": __version__, "torch": torch.__version__},
        "combined": {**{k: v for k, v in how.items() if v is not None}, "layers": report},
    }
    quantisation = common_quantisation(adapters, names)
    known = {"base": base, METADATA_KEY: quantisation}
    return Adapter(config, tensors | saved, metadata | {k: v for k, v in known.items() if v})


def resize(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> Adapter:
    """The best approximation of `adapter` with another rank, the same at each layer, or by kept energy.

    energy: of each layer as many singular values as hold this share of ‖ΔW‖²; the ranks then differ.
    A layer keeps its rank where that is lower than `rank`. `errors(result)` says what it cost.
    Raises CombineError.
    """
    if (rank is None) == (energy is None):
        raise CombineError("resize needs either rank=… or energy=….")
    return combine(
        [adapter],
        [1.0],
        "svd",
        svd_rank=rank,
        energy=energy,
        check_base=False,
        names=["the adapter"],
    )


def errors(adapter: Adapter) -> list[LayerError]:
    """What combining, resizing or extracting cost, the worst layer first; zeros for an adapter that never was."""
    made = adapter.metadata.get("combined") or adapter.metadata.get("extracted") or {}
    layers = made.get("layers")
    if layers is None:
        return [
            LayerError(path, row.r, None, 0.0) for path, row in read_layers(adapter).layers.items()
        ]
    rows = [LayerError(path, row["r"], row["norm"], row["error"]) for path, row in layers.items()]
    return sorted(rows, key=lambda row: -(row.error or 0.0))


def total_error(rows: Iterable[LayerError]) -> float | None:
    """The error over all layers together, relative as theirs; None if one is not known."""
    lost = whole = 0.0
    for row in rows:
        if row.error is None:
            return None
        lost += (row.error * (row.norm or 0.0)) ** 2
        whole += (row.norm or 0.0) ** 2
    return math.sqrt(lost / whole) if whole else 0.0


# --- what is asked ------------------------------------------------------------------------------


def _nothing_to_do(
    weights: Sequence[float], method: str, rank: int | None, energy: float | None, ranks: list[int]
) -> bool:
    """Whether the result is the one adapter itself, whose layers have these ranks."""
    if len(weights) != 1 or weights[0] != 1:
        return False
    if method == "svd":
        return energy is None and all(r <= (rank or 0) for r in ranks)
    return method in ("linear", "cat", "linear_factors")


def _ranks(adapter: Adapter, bare: Mapping[str, Bare]) -> Iterator[int]:
    """The rank of ΔW at each layer: 2r where the start was taken out of W."""
    for key, tensor in adapter.tensors.items():
        match = LORA_KEY.fullmatch(key)
        if match and match[2].endswith("A"):
            own = bare.get(match[1].removeprefix(PREFIX))
            rows = tensor.shape[0] * (2 if key in adapter.start else 1)
            yield rows // own.experts if own else rows


def _generators(seed: int, path: str) -> Callable[[str, int], torch.Generator]:
    """Random numbers that depend on the seed and the place, not on what other layers there are."""

    def generator(what: str, i: int) -> torch.Generator:
        digest = hashlib.sha256(f"{seed}/{path}/{what}/{i}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    return generator


# --- what comes out -----------------------------------------------------------------------------


def _combined(
    path: str, parts: list[tuple[AdapterLayer, float]], method: str, options: Options
) -> Combined:
    weighted = [Weighted(layer.lora, weight) for layer, weight in parts]
    try:
        combined = METHODS[method].combine(weighted, options)
    except ShapeError as error:
        raise CombineError(
            f'{path}: {error}. {method!r} works on the factors, which must be of one rank; "linear" and "svd" take any.'
        ) from error
    if not (combined.A.isfinite().all() and combined.B.isfinite().all()):
        raise CombineError(f"{path}: the result of {method!r} is not finite.")
    return combined


def _of_even_rank(
    combined: dict[str, Combined], parts: Mapping[str, list[tuple[AdapterLayer, float]]]
) -> dict[str, Combined]:
    """Those parameters that a file does not tell apart all at one rank, padded with zeros: a rank_pattern names them."""
    groups: dict[tuple[str, ...], int] = {}
    among = {path: bare.among if (bare := parts[path][0][0].bare) else () for path in combined}
    for path, found in combined.items():
        group = tuple(sorted(among[path]))
        groups[group] = max(groups.get(group, 0), found.A.shape[-2])
    even = {}
    for path, found in combined.items():
        more = groups[tuple(sorted(among[path]))] - found.A.shape[-2] if len(among[path]) > 1 else 0
        even[path] = found._replace(A=pad(found.A, (0, 0, 0, more)), B=pad(found.B, (0, more)))
    return even


def _as_saved(
    path: str, combined: Combined, parts: list[tuple[AdapterLayer, float]], with_bias: bool
) -> dict[str, Tensor]:
    """The tensors of one layer under PEFT's keys and in PEFT's shapes."""
    layer = parts[0][0]
    A, B = combined.A, combined.B
    if layer.experts > 1:
        A, B = EXPERTS.A_saved(A).flatten(0, 1), EXPERTS.B_saved(B).flatten(1)
    A = A.reshape(-1, *layer.A.shape[1:]).contiguous()
    B = B.reshape(layer.B.shape[0], -1, *layer.B.shape[2:]).contiguous()
    if layer.embedding:
        return {f"{PREFIX}{path}.lora_embedding_A": A, f"{PREFIX}{path}.lora_embedding_B": B}
    tensors = {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}
    if with_bias:
        bias = B.new_zeros(B.shape[0])
        for part, weight in parts:
            if part.bias is not None:
                bias = bias + part.bias.to(bias) * (part.scaling * weight)
        tensors[f"{PREFIX}{path}.lora_B.bias"] = bias
    return tensors


def _keys(layers: Sequence[Mapping[str, AdapterLayer]]) -> dict[str, str]:
    """By path, what the keys of the result's file begin with."""
    adapted = {
        row.bare.module if row.bare else path for found in layers for path, row in found.items()
    }
    keys = {path: _key_path(path, adapted) for found in layers for path in found}
    nested: dict[
        str, dict[str, str]
    ] = {}  # by module, of the adapter that has most of its parameters
    for found in layers:
        own: dict[str, dict[str, str]] = {}
        for path, row in found.items():
            if row.bare:
                own.setdefault(row.bare.module, {})[path] = row.bare.key
        for module, places in own.items():
            nested[module] = max(nested.get(module, {}), places, key=len)
    for places in nested.values():
        keys |= places
    return keys


def _key_path(path: str, adapted: set[str]) -> str:
    """`path` as keys have it: an adapted module around it (MultiheadAttention) is entered by its base_layer."""
    found: list[str] = []
    words = path.split(".")
    for i, word in enumerate(words):
        found.append(word)
        if i + 1 < len(words) and ".".join(words[: i + 1]) in adapted:
            found.append("base_layer")
    return ".".join(found)


def _config(
    configs: list[LoraConfig],
    parts: Mapping[str, list[tuple[AdapterLayer, float]]],
    combined: Mapping[str, Combined],
) -> LoraConfig:
    """The configuration that describes the result: scaling 1 at each layer, whatever its rank."""
    first = configs[0]
    ranks: dict[str, int] = {}
    modules = []
    for path, found in combined.items():
        bare = parts[path][0][0].bare
        ranks |= dict.fromkeys(bare.among if bare else [path], found.A.shape[-2])
        modules += [] if bare else [path]
    parameters = dict.fromkeys(name for c in configs for name in c.target_parameters or [])
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else first.r
    pattern = pattern_of(ranks, r)
    saved = dict.fromkeys(name for c in configs for name in c.modules_to_save or [])
    return dataclasses.replace(
        first,
        r=r,
        lora_alpha=r,
        use_rslora=False,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        **_targets(configs, modules),
        target_parameters=list(parameters) or None,
        modules_to_save=list(saved) or None,
        init_lora_weights=True,
        base_model_name_or_path=_first(c.base_model_name_or_path for c in configs),
        task_type=_first(c.task_type for c in configs),
        bias=_first(c.bias for c in configs if c.bias != "none") or "none",
        lora_bias=any(c.lora_bias for c in configs),
        fan_in_fan_out=any(c.fan_in_fan_out for c in configs),
        inference_mode=True,
    )


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _targets(configs: list[LoraConfig], paths: list[str]) -> dict[str, Any]:
    """Names that select the result's layers: the adapters' own where those say it, else every path."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    selections = [{name: getattr(config, name) for name in fields} for config in configs]
    if all(selection == selections[0] for selection in selections):
        return selections[0]
    plain = all(
        isinstance(s["target_modules"], list) and all(s[name] in (None, []) for name in fields[1:])
        for s in selections
    )
    names = paths
    if plain:
        names = list(dict.fromkeys(name for s in selections for name in s["target_modules"]))
    return {**dict.fromkeys(fields), "target_modules": names}
