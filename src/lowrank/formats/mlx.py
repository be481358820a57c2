"""MLX's adapters: `adapters.safetensors` beside an `adapter_config.json` of MLX's own.

y + scale·(x @ lora_a) @ lora_b with lora_a (in, r), lora_b (r, out), and one rank and scale for all
layers: smaller ranks are filled up with zeros, other scalings multiplied into lora_b, both exactly.
DoRA's m is PEFT's magnitude; an embedding's is not (one for each token), and is refused. All experts of a layer are
one module, lora_a (expert, r, in) and lora_b (expert, out, r), which has no DoRA.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank.adapter_file import Adapter, load_tensors, save_tensors
from lowrank.adapter_layers import AdapterLayer, read_layers
from lowrank.config import CONFIG_NAME, LoraConfig
from lowrank.errors import AdapterFileError, ConvertError, listed
from lowrank.files import folder_for, replacing
from lowrank.formats import experts
from lowrank.formats.base_model import is_tied, read_config
from lowrank.formats.layers import Options, as_adapter, folded, most_common, shown, unknown

WEIGHTS = "adapters.safetensors"
HOLDS = frozenset({"dora", "embeddings", "target_parameters"})
# where MLX's models call their modules as transformers' do; its experts are stacked into one module, switch_mlp
_PATH = re.compile(r"model\.layers\.\d+\.(?!.*\bexperts\b)(.+)|(model\.embed_tokens|lm_head)")


_BLOCKS = {"mixtral": "block_sparse_moe", "qwen2_moe": "mlp", "qwen3_moe": "mlp"}
_EXPERTS = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.switch_mlp\.(gate|up|down)_proj"
)


def read(path: Path, options: Options) -> dict[str, Adapter]:
    config = _config(path / CONFIG_NAME)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ConvertError(f"{path}: fine_tune_type {kind!r} is no adapter of low rank.")
    said = config.get("lora_parameters")
    scale = said.get("scale") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(scale, int | float):
        raise AdapterFileError(f"{path / CONFIG_NAME} has no lora_parameters with a scale.")
    tensors, _ = load_tensors(path / WEIGHTS)
    parts: dict[str, dict[str, Tensor]] = {}
    stacked: dict[experts.Place, dict[str, Tensor]] = {}
    lost = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_a|lora_b|m)", key)
        dims = 1 if match and match[2] == "m" else 2
        if match and tensor.ndim == 3 and (place := _EXPERTS.fullmatch(match[1])):
            stacked.setdefault((place[1], place[2]), {})[match[2]] = tensor
        elif match is None or tensor.ndim != dims or not _PATH.fullmatch(match[1]):
            lost.append(key)
        else:
            parts.setdefault(match[1], {})[match[2]] = tensor
    unknown(lost, str(path), options)
    named = parts | {" ".join(place): part for place, part in stacked.items()}
    halves = [name for name, part in named.items() if not {"lora_a", "lora_b"} <= part.keys()]
    if halves:
        raise ConvertError(f"{path}: {shown(halves)} has only one of lora_a and lora_b.")
    layers = {}
    for module, part in parts.items():
        A, B = part["lora_a"].T.contiguous(), part["lora_b"].T.contiguous()
        if kind == "dora" and "m" not in part:
            raise ConvertError(f"{path}: {module} has no m, though fine_tune_type is 'dora'.")
        embedding = module.endswith("embed_tokens")
        layer = AdapterLayer(A, B, scale * len(A), part.get("m"), embedding=embedding)
        where, layer = experts.router(module, layer)
        layers[where] = layer
    layers |= experts.fused(
        {
            place: AdapterLayer(part["lora_a"], part["lora_b"], scale * part["lora_a"].shape[1])
            for place, part in stacked.items()
        }
    )
    _check_embeddings(layers, options.base or config.get("model"))
    adapter = as_adapter(
        layers,
        f"mlx: {path.name}",
        lora_dropout=float(said.get("dropout", 0.0)),
        base_model_name_or_path=config.get("model"),
        task_type="CAUSAL_LM",
    )
    return {"": adapter}


def write(path: Path, adapters: Mapping[str, Adapter], options: Options) -> list[Path]:
    (adapter,) = adapters.values()
    config, layers = adapter.config, _layers(adapter)
    foreign = [module for module in layers if not _PATH.fullmatch(module)]
    if foreign:
        raise ConvertError(
            f"MLX's names are known for model.layers.…, model.embed_tokens and lm_head, and not for "
            f"{len(foreign)} modules: {shown(foreign)}."
        )
    _check_embeddings(layers, config.base_model_name_or_path)
    # of experts A is (expert, r, in)
    ranks = {module: layer.A.shape[-2] for module, layer in layers.items()}
    scalings = {module: layer.alpha / ranks[module] for module, layer in layers.items()}
    rank, scale = max(ranks.values()), most_common(scalings.values())
    tensors = {}
    for module, layer in layers.items():
        # where the common scale is 0 every layer's may not be: then the factors carry it
        b = folded(layer.B, scalings[module] / scale if scale else scalings[module])
        missing = rank - ranks[module]
        A, B = pad(layer.A, (0, 0, 0, missing)), pad(b, (0, missing))
        single = A.ndim == 2
        tensors[f"{module}.lora_a"] = _real(A.T.contiguous() if single else A)
        tensors[f"{module}.lora_b"] = _real(B.T.contiguous() if single else B)
        if layer.magnitude is not None:
            tensors[f"{module}.m"] = _real(layer.magnitude)
    keys = dict.fromkeys(m[1] or m[2] for module in layers if (m := _PATH.fullmatch(module)))
    said: dict[str, Any] = {
        "fine_tune_type": "dora" if config.use_dora else "lora",
        # all of them: one without weights in the file starts at ΔW = 0
        "num_layers": -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale or 1.0,
            "dropout": config.lora_dropout,
            "keys": list(keys),
        },
    }
    if config.base_model_name_or_path:
        said["model"] = config.base_model_name_or_path
    with (
        folder_for(path),
        replacing(path / WEIGHTS) as weights,
        replacing(path / CONFIG_NAME) as text,
    ):
        save_tensors(weights, tensors, {})
        text.write_text(json.dumps(said, indent=4) + "\n", encoding="utf-8")
    return [path / WEIGHTS, path / CONFIG_NAME]


def _layers(adapter: Adapter) -> dict[str, AdapterLayer]:
    """By MLX's paths; those of experts with A (expert, r, in) and B (expert, out, r)."""
    layers, config = read_layers(adapter).layers, adapter.config
    if not config.target_parameters and not any(".experts." in path for path in layers):
        return layers
    base = read_config(config.base_model_name_or_path, "how many experts there are")
    stacked, layers = experts.read_adapted(adapter, base)
    if stacked and config.use_dora:
        raise ConvertError("MLX has no DoRA for experts; drop='dora' (--drop dora) leaves it out.")
    block = _BLOCKS.get(base.get("model_type", ""), "mlp")
    if stacked and base.get("model_type") not in _BLOCKS:
        raise ConvertError(
            f"MLX's names of experts are known for {', '.join(_BLOCKS)}, and not for {base.get('model_type')}."
        )
    layers = {
        re.sub(r"\.(mlp|block_sparse_moe)\.gate$", f".{block}.gate", path): layer
        for path, layer in layers.items()
    }
    return layers | {
        f"model.layers.{n}.{block}.switch_mlp.{word}_proj": layer
        for (n, word), layer in stacked.items()
    }


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise AdapterFileError(
            f"{path.parent} has no {path.name}, which says an MLX adapter's scale."
        )
    return LoraConfig.from_json_file(path)


def _real(tensor: Tensor) -> Tensor:
    """MLX has no float64 on its GPUs."""
    return tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor


def _check_embeddings(layers: Mapping[str, AdapterLayer], base: str | None) -> None:
    found = [path for path, layer in layers.items() if layer.embedding]
    problems = []
    if any(layers[path].magnitude is not None for path in found):
        problems.append(
            f"{shown(found)}: an embedding's DoRA has a magnitude for each token in MLX."
        )
    if found and is_tied(read_config(base, "whether embeddings are tied")):
        problems.append(
            f"{shown(found)}: the base's embeddings are tied, and MLX then applies the adapter to the output "
            "head too."
        )
    if problems:
        raise ConvertError(listed(problems))
