"""What the formats have in common: layers as an adapter, and what of an adapter a format can hold."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank import __version__
from lowrank.adapter_file import Adapter
from lowrank.adapter_layers import AdapterLayer, pattern_of, read_layers
from lowrank.bare_parameters import LORA_KEY, PREFIX
from lowrank.config import LoraConfig
from lowrank.errors import ConvertError, listed

# what some formats have no place for, and `drop` leaves out
KINDS = {
    "dora": "DoRA's magnitudes",
    "lora_bias": "biases of the adapter (lora_bias)",
    "embeddings": "adapters of embeddings",
    "convolutions": "adapters of convolutions",
    "saved": "tensors saved whole (modules_to_save, bias, trainable_token_indices)",
    "unknown": "tensors that are none of the format's",
}
# fields that change what the tensors mean -> the value that does not
_MEANING: dict[str, Any] = {
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}
_SHOWN = 12


class Options(NamedTuple):
    """What a reader or a writer may be told."""

    base: str | None = None  # the base model's folder or name on the Hub
    dtype: str | None = None  # GGUF's: f32 or f16
    drop: frozenset[str] = frozenset()  # of KINDS


# --- reading --------------------------------------------------------------------------------------


def as_adapter(layers: Mapping[str, AdapterLayer], source: str, **fields) -> Adapter:
    """An adapter of these layers by path, with a configuration that says their ranks and alphas.

    source: what they were read from, for the metadata. fields: of LoraConfig.
    Raises ConvertError if there are none, or shapes do not go together.
    """
    problems = [p for path, layer in layers.items() for p in _shape_problems(path, layer)]
    with_m = [path for path, layer in layers.items() if layer.magnitude is not None]
    if with_m and len(with_m) != len(layers):
        lacking = [path for path in layers if path not in with_m]
        problems.append(f"DoRA's magnitudes are missing at some layers: {shown(lacking)}.")
    if not layers:
        problems.append(f"{source}: it holds no adapter.")
    if problems:
        raise ConvertError(listed(problems))
    biased = any(layer.bias is not None for layer in layers.values())
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors |= _tensors(path, layer, biased)
    # transformers 5 has a CLIPTextModel without the `text_model` that files name
    names = {path: path.removeprefix("text_model.") for path in layers}
    start = "^" if all(names[path] == path for path in names) else ""
    bare = [path for path, layer in layers.items() if layer.bare is not None]
    modules = [names[path] for path in layers if path not in bare]
    ranks = {names[path]: layer.r for path, layer in layers.items()}
    alphas = {names[path]: _number(layer.alpha) for path, layer in layers.items()}
    r, alpha = most_common(ranks.values()), most_common(alphas.values())
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern=pattern_of(ranks, r, start),
        alpha_pattern=pattern_of(alphas, alpha, start),
        use_dora=bool(with_m),
        lora_bias=biased,
        inference_mode=True,
        # of layers_to_transform target_parameters knows nothing
        **({"target_modules": modules} if bare else _selection(modules)),
        target_parameters=bare or None,
        **fields,
    )
    versions = {"lowrank": __version__, "torch": torch.__version__}
    return Adapter(config, tensors, {"versions": versions, "converted_from": source})


def most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _shape_problems(path: str, layer: AdapterLayer) -> list[str]:
    A, B, m = layer.A, layer.B, layer.magnitude
    found = f"{path}: A {tuple(A.shape)} and B {tuple(B.shape)}"
    if A.ndim < 2 or B.ndim < 2 or B.shape[1] != A.shape[0] or B[0].numel() != A.shape[0]:
        return [f"{found} do not multiply; A is (r, in), B (out, r)."]
    if m is not None and m.numel() != B.shape[0]:
        return [f"{found} and {m.numel()} magnitudes; DoRA has one for each output."]
    return []


def _tensors(path: str, layer: AdapterLayer, biased: bool) -> dict[str, Tensor]:
    """The tensors of one layer under PEFT's keys and in PEFT's shapes."""
    at = f"{PREFIX}{path if layer.bare is None else layer.bare.key}"
    if layer.embedding:
        found = {f"{at}.lora_embedding_A": layer.A, f"{at}.lora_embedding_B": layer.B}
    else:
        found = {f"{at}.lora_A.weight": layer.A, f"{at}.lora_B.weight": layer.B}
    if layer.magnitude is not None:
        m = layer.magnitude
        kernel = layer.A.ndim - 2
        found[f"{at}.lora_magnitude_vector"] = m.reshape(1, -1, *[1] * kernel) if kernel else m
    if biased and not layer.embedding:
        zeros = layer.B.new_zeros(layer.B.shape[0])
        found[f"{at}.lora_B.bias"] = zeros if layer.bias is None else layer.bias
    return found


def _selection(paths: list[str]) -> dict[str, Any]:
    """target_modules for exactly these paths; short where all of a stack's layers have the same modules."""
    places = {path: _place(path) for path in paths}
    stacks = {place[0] for place in places.values()}
    numbers = sorted({place[1] for place in places.values()})
    names = sorted({place[2] for place in places.values()})
    if len(stacks) == 1 and "" not in stacks and len(paths) == len(numbers) * len(names):
        return {"target_modules": names, "layers_to_transform": numbers}
    return {"target_modules": paths}


def _place(path: str) -> tuple[str, int, str]:
    """("model.layers", 3, "self_attn.q_proj") for a module of a stack; ("", 0, path) for any other."""
    words = path.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdigit()]
    if len(numbers) != 1 or not 1 < numbers[0] < len(words) - 1:
        return "", 0, path
    (i,) = numbers
    return ".".join(words[:i]), int(words[i]), ".".join(words[i + 1 :])


# --- writing --------------------------------------------------------------------------------------


def without(adapter: Adapter, drop: frozenset[str]) -> tuple[Adapter, dict[str, list[str]]]:
    """The adapter without the tensors of these kinds, and their keys by kind."""
    gone = {kind: keys for kind, keys in _by_kind(adapter).items() if kind in drop and keys}
    lost = {key for keys in gone.values() for key in keys}
    fields: dict[str, Any] = {}
    if "dora" in gone:
        fields["use_dora"] = False
    if "lora_bias" in gone:
        fields["lora_bias"] = False
    if "saved" in gone:
        fields |= {"modules_to_save": None, "bias": "none"}
        fields |= {"trainable_token_indices": None, "ensure_weight_tying": False}
    values = {**vars(adapter.config), **fields}
    config = LoraConfig(**values) if fields else adapter.config
    tensors = {key: tensor for key, tensor in adapter.tensors.items() if key not in lost}
    start = {key: tensor for key, tensor in adapter.start.items() if key not in lost}
    return Adapter(config, tensors, adapter.metadata, start), gone


def check_holds(adapter: Adapter, format: str, kinds: frozenset[str], any_config: bool) -> None:
    """Raises ConvertError, with every tensor and field concerned, unless the format can hold the adapter.

    kinds: those of KINDS that it has a place for, and fields that it can say. any_config: it carries PEFT's configuration itself.
    """
    problems = []
    for kind, keys in _by_kind(adapter).items():
        if keys and kind not in kinds:
            problems.append(
                f"{format} has no place for {KINDS[kind]}; drop={kind!r} (--drop {kind}) leaves them out: "
                + ", ".join(key.removeprefix(PREFIX) for key in keys)
                + "."
            )
    config = adapter.config
    if not any_config:
        problems += [
            f"{name}={getattr(config, name)!r} cannot be said in {format}."
            for name, plain in _MEANING.items()
            if name not in kinds and getattr(config, name) not in (plain, [], {})
        ]
    if not config.target_parameters:  # whose factors are stacked, and are no layers
        layers, _, wrong = read_layers(adapter)
        problems += wrong if layers or wrong else ["There is no layer to write."]
    if problems:
        raise ConvertError(listed(problems))


def _by_kind(adapter: Adapter) -> dict[str, list[str]]:
    """The keys of each kind. An embedding's magnitude is of two."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    matches = {key: LORA_KEY.fullmatch(key) for key in adapter.tensors}
    embeddings = {m[1] for m in matches.values() if m and "embedding" in m[2]}
    convolutions = {
        m[1]
        for key, m in matches.items()
        if m and m[2] == "lora_A" and adapter.tensors[key].ndim > 2
    }
    for key, match in matches.items():
        if match is None:
            found["saved"].append(key)
            continue
        if match[2] == "lora_magnitude_vector":
            found["dora"].append(key)
        if match[2] == "lora_B" and match[3] == "bias":
            found["lora_bias"].append(key)
        if match[1] in embeddings:
            found["embeddings"].append(key)
        if match[1] in convolutions:
            found["convolutions"].append(key)
    return found


def folded(tensor: Tensor, factor: float) -> Tensor:
    """`tensor` times `factor`; in float32 where its own dtype would round the product."""
    if factor == 1:
        return tensor
    exact = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
    return exact.to(tensor.dtype) if torch.equal(exact.to(tensor.dtype).to(exact), exact) else exact


def shown(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    names = list(names)
    rest = f", … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def unknown(keys: list[str], source: str, options: Options, hint: str = "") -> None:
    """Raises ConvertError for keys that a reader cannot place, unless they are to be dropped."""
    if keys and "unknown" not in options.drop:
        raise ConvertError(
            f"{source} has {len(keys)} tensors that cannot be placed: {shown(sorted(keys))}.{hint} "
            "drop='unknown' (--drop unknown) reads the rest."
        )
