"""Several adapters as one, and one adapter at another rank: on their tensors, without any model."""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank import __version__
from lowrank.adapter_file import Adapter
from lowrank.adapter_layers import LORA_KEY, PREFIX, pattern_of, read_layers
from lowrank.config import LoraConfig
from lowrank.errors import BaseMismatchError, CombineError, ShapeError, did_you_mean, listed
from lowrank.fingerprint import differences
from lowrank.log import logger
from lowrank.lora import Lora
from lowrank.start_factors import start_problems
from lowrank.task_arithmetic import METHODS, Combined, Options, Weighted

SIGN_METHODS = ("total", "frequency")
# what the result has of its own, or what does not bear on the tensors' meaning; all else must agree
_FREE_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias", "lora_bias", "fan_in_fan_out", "task_type", "inference_mode"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "runtime_config"),
}


class LayerError(NamedTuple):
    """What a layer of a combined or resized adapter costs."""

    path: str
    r: int
    norm: float | None  # ‖M‖ (Frobenius), M the matrix that the method means, Σ wᵢ·ΔWᵢ for most
    error: float | None  # ‖ΔW − M‖ / ‖M‖; None where the method works on the factors alone


class _Layer(NamedTuple):
    """One adapter's tensors at one layer."""

    lora: Lora  # A and B as matrices
    A_shape: tuple[int, ...]  # as saved
    B_shape: tuple[int, ...]
    embedding: bool


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
    _check_arguments(adapters, weights, method, given, majority_sign_method)
    if svd_rank is None and energy is None and METHODS[method].takes_rank:
        svd_rank = max((r for a in adapters for r in _ranks(a)), default=1)
    if _nothing_to_do(adapters, weights, method, svd_rank, energy):
        return adapters[0]
    _check_configs(adapters, names)
    base = _common_base(adapters, names, check_base)
    layers = [_layers(a, name) for a, name in zip(adapters, names, strict=True)]
    paths = list(dict.fromkeys(path for found in layers for path in found))
    saved = _saved_tensors(adapters, names, paths)
    _check_layers(layers, paths, names, method)

    adapted = set(paths)
    tensors: dict[str, Tensor] = {}
    report: dict[str, dict[str, Any]] = {}
    with_bias = any(a.config.lora_bias for a in adapters)
    for path in paths:
        parts = [
            (found[path], weight)
            for found, weight in zip(layers, weights, strict=True)
            if path in found
        ]
        options = Options(
            random=_generators(seed, path),
            rank=svd_rank,
            energy=energy,
            density=1.0 if density is None else density,
            majority_sign_method=majority_sign_method,
        )
        combined = _combined(path, parts, method, options)
        tensors |= _as_saved(_key_path(path, adapted), combined, parts, with_bias)
        report[path] = {"r": len(combined.A), "norm": combined.norm, "error": combined.error}

    ranks = {path: row["r"] for path, row in report.items()}
    config = _config([a.config for a in adapters], layers, ranks)
    how = {"method": method, "weights": [float(w) for w in weights], "adapters": names, **given}
    metadata: dict[str, Any] = {
        "versions": {"lowrank": __version__, "torch": torch.__version__},
        "combined": {**{k: v for k, v in how.items() if v is not None}, "layers": report},
    }
    return Adapter(config, tensors | saved, metadata | ({"base": base} if base else {}))


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
        found = _layers(adapter, "the adapter")
        return [LayerError(path, len(layer.lora.A), None, 0.0) for path, layer in found.items()]
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


# --- what is asked --------------------------------------------------------------------------------


def _check_arguments(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    given: Mapping[str, Any],
    sign: str,
) -> None:
    if method not in METHODS:
        raise CombineError(
            f"There is no method {method!r}.{did_you_mean(method, METHODS)} There are: {', '.join(METHODS)}."
        )
    row = METHODS[method]
    problems = []
    if not adapters:
        problems.append("There is no adapter to combine.")
    if len(adapters) != len(weights):
        problems.append(
            f"{len(adapters)} adapters need as many weights; {len(weights)} were given."
        )
    if not all(math.isfinite(weight) for weight in weights):
        problems.append(f"The weights must be finite numbers, not {list(weights)}.")
    taken_by = {
        "svd_rank": [m for m, r in METHODS.items() if r.takes_rank],
        "energy": ["svd"],
        "density": [m for m, r in METHODS.items() if r.takes_density],
    }
    for name, value in given.items():
        if value is not None and method not in taken_by[name]:
            problems.append(
                f"{name}={value!r} means nothing to the method {method!r}; it belongs to {', '.join(taken_by[name])}."
            )
    rank, energy, density = given["svd_rank"], given["energy"], given["density"]
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        problems.append(f"svd_rank={rank!r} must be a whole number of at least 1.")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy={energy!r} must be above 0 and at most 1.")
    if rank is not None and energy is not None:
        problems.append("svd_rank and energy both decide the rank: give one of them.")
    if row.takes_density and density is None:
        problems.append(f"The method {method!r} needs density, the share of entries that is kept.")
    elif density is not None and not 0 < density <= 1:
        problems.append(f"density={density!r} must be above 0 and at most 1.")
    if sign not in SIGN_METHODS:
        problems.append(f"majority_sign_method={sign!r} must be 'total' or 'frequency'.")
    elif sign != "total" and not row.takes_sign:
        problems.append(f"majority_sign_method={sign!r} means nothing to the method {method!r}.")
    if problems:
        raise CombineError(listed(problems))


def _nothing_to_do(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    energy: float | None,
) -> bool:
    """Whether the result is the one adapter itself."""
    if len(adapters) != 1 or weights[0] != 1:
        return False
    if method == "svd":
        return energy is None and all(r <= (rank or 0) for r in _ranks(adapters[0]))
    return method in ("linear", "cat", "linear_factors")


def _ranks(adapter: Adapter) -> Iterator[int]:
    """The rank of ΔW at each layer: 2r where the start was taken out of W."""
    for key, tensor in adapter.tensors.items():
        if key.endswith((".lora_A.weight", ".lora_embedding_A")):
            yield tensor.shape[0] * (2 if key in adapter.start else 1)


def _generators(seed: int, path: str) -> Callable[[str, int], torch.Generator]:
    """Random numbers that depend on the seed and the place, not on what other layers there are."""

    def generator(what: str, i: int) -> torch.Generator:
        digest = hashlib.sha256(f"{seed}/{path}/{what}/{i}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    return generator


# --- what is there --------------------------------------------------------------------------------


def _check_configs(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    problems = []
    configs = [adapter.config for adapter in adapters]
    for adapter, config, name in zip(adapters, configs, names, strict=True):
        if config.use_dora:
            problems.append(
                f"{name} is DoRA: its magnitudes belong to W + its own ΔW, and W′ is no sum of changes; only "
                "one adapter with weight 1 and its own rank comes back as it is. Merge it into the base instead."
            )
        problems += start_problems(adapter, name)
        if config.target_parameters:
            problems.append(
                f"{name} adapts bare parameters (target_parameters), whose factors are stacked."
            )
    for what in ("task_type", "bias"):
        values = {getattr(c, what) for c in configs} - {None, "none"}
        if len(values) > 1:
            problems.append(f"{what} differs: {', '.join(sorted(map(str, values)))}.")
    for f in dataclasses.fields(LoraConfig):
        values_ = [getattr(config, f.name) for config in configs]
        if f.name not in _FREE_FIELDS | {"use_dora", "target_parameters"} and any(
            value != values_[0] for value in values_
        ):
            found = ", ".join(f"{n} {v!r}" for n, v in zip(names, values_, strict=True))
            problems.append(f"{f.name} differs: {found}.")
    if problems:
        what = "These adapters cannot be combined"
        if len(adapters) == 1:
            what = "No other adapter can be made of this one"
        raise CombineError(f"{what}. {listed(list(dict.fromkeys(problems)))}")


def _common_base(
    adapters: Sequence[Adapter], names: Sequence[str], check: bool
) -> dict[str, Any] | None:
    """The fingerprint of the base under all of them, or None if none has one."""
    marked = [(a.metadata.get("base"), n) for a, n in zip(adapters, names, strict=True)]
    known = [(base, name) for base, name in marked if base and base.get("weights")]
    unknown = [name for base, name in marked if not base]
    if check and unknown and len(adapters) > 1:
        logger.warning(
            "%s: no fingerprint of the base, so that it could not be checked that all belong to one.",
            ", ".join(unknown),
        )
    common: dict[str, Any] | None = None
    for base, name in known:
        found = differences(common, base) if common and check else []
        if found:
            rest = f"\n  … and {len(found) - 5} more" if len(found) > 5 else ""
            raise BaseMismatchError(
                f"{name} was trained on another base than {known[0][1]}:\n  "
                + "\n  ".join(found[:5])
                + rest
                + "\nAdapters of different bases do not add up; check_base=False (--any-base) combines them all the same."
            )
        weights = {**base["weights"], **(common["weights"] if common else {})}
        common = {**(common or base), "weights": weights}
    return common


def _layers(adapter: Adapter, name: str) -> dict[str, _Layer]:
    """By the path of each adapted module in the base: its factors as matrices, and its own scaling."""
    layers, _, problems = read_layers(adapter)
    if problems:
        raise CombineError(listed([f"{name}: {problem}" for problem in problems]))
    found = {}
    for path, (A, B, _, _, bias, embedding) in layers.items():
        lora = Lora(A.flatten(1), B.flatten(1), layers[path].scaling, bias=bias)
        found[path] = _Layer(lora, tuple(A.shape), tuple(B.shape), embedding)
    return found


def _check_layers(
    layers: list[dict[str, _Layer]], paths: list[str], names: Sequence[str], method: str
) -> None:
    problems = []
    for path in paths:
        here = [
            (found[path], name) for found, name in zip(layers, names, strict=True) if path in found
        ]
        (first, first_name), *others = here
        for layer, name in others:
            shapes = [(x.A_shape[1:], (x.B_shape[0], *x.B_shape[2:])) for x in (first, layer)]
            if shapes[0] != shapes[1] or first.embedding != layer.embedding:
                problems.append(
                    f"{path}: A {first.A_shape} and B {first.B_shape} in {first_name}, "
                    f"{layer.A_shape} and {layer.B_shape} in {name}."
                )
        biased = [name for layer, name in here if layer.lora.bias is not None]
        if biased and not METHODS[method].is_sum:
            problems.append(
                f"{path}: {biased[0]} has a bias (lora_bias), which {method!r} does not mean anything for."
            )
    if problems:
        shown = problems[:8] + ([f"… and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CombineError("These adapters cannot be combined. " + listed(shown))


def _saved_tensors(
    adapters: Sequence[Adapter], names: Sequence[str], paths: list[str]
) -> dict[str, Tensor]:
    """What the adapters hold whole (modules_to_save, trained biases): taken over where there is one of it."""
    found: dict[str, tuple[Tensor, str]] = {}
    problems = []
    adapted = {f"{PREFIX}{path}.weight" for path in paths}
    for adapter, name in zip(adapters, names, strict=True):
        for key, tensor in adapter.tensors.items():
            if LORA_KEY.fullmatch(key) or ".original_module." in key or ".modules_to_save." in key:
                continue
            if key in adapted:
                problems.append(f"{key}: saved whole in {name}, adapted in another.")
            elif key in found and not torch.equal(found[key][0], tensor):
                problems.append(
                    f"{key}: saved whole in {found[key][1]} and in {name}, and not the same."
                )
            else:
                found.setdefault(key, (tensor, name))
    if problems:
        raise CombineError(
            "Modules that are saved whole (modules_to_save, bias) are no changes that add up. "
            + listed(problems[:8])
        )
    return {key: tensor for key, (tensor, _) in found.items()}


# --- what comes out -------------------------------------------------------------------------------


def _combined(
    path: str, parts: list[tuple[_Layer, float]], method: str, options: Options
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


def _as_saved(
    path: str, combined: Combined, parts: list[tuple[_Layer, float]], with_bias: bool
) -> dict[str, Tensor]:
    """The tensors of one layer under PEFT's keys and in PEFT's shapes."""
    layer = parts[0][0]
    r = combined.A.shape[0]
    A = combined.A.reshape(r, *layer.A_shape[1:]).contiguous()
    B = combined.B.reshape(layer.B_shape[0], r, *layer.B_shape[2:]).contiguous()
    if layer.embedding:
        return {f"{PREFIX}{path}.lora_embedding_A": A, f"{PREFIX}{path}.lora_embedding_B": B}
    tensors = {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}
    if with_bias:
        bias = B.new_zeros(B.shape[0])
        for part, weight in parts:
            if part.lora.bias is not None:
                bias = bias + part.lora.bias.detach().to(bias) * (part.lora.scaling * weight)
        tensors[f"{PREFIX}{path}.lora_B.bias"] = bias
    return tensors


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
    configs: list[LoraConfig], layers: list[dict[str, _Layer]], ranks: dict[str, int]
) -> LoraConfig:
    """The configuration that describes the result: scaling 1 at each layer, whatever its rank."""
    first = configs[0]
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
        **_targets(configs, list(ranks)),
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
