"""MLX's adapters: `adapters.safetensors` beside an `adapter_config.json` of MLX's own.

y + scale·(x @ lora_a) @ lora_b with lora_a (in, r), lora_b (r, out), and one rank and scale for all
layers: smaller ranks are filled up with zeros, other scalings multiplied into lora_b, both exactly.
DoRA's m is PEFT's magnitude; an embedding's is not (one for each token), and is refused.
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
from lowrank.formats.base_model import is_tied, read_config
from lowrank.formats.layers import Options, as_adapter, folded, most_common, shown, unknown

WEIGHTS = "adapters.safetensors"
HOLDS = frozenset({"dora", "embeddings"})
# where MLX's models call their modules as transformers' do; its experts are stacked into one module
_PATH = re.compile(r"model\.layers\.\d+\.(?!.*\bexperts\b)(.+)|(model\.embed_tokens|lm_head)")


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
    lost = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_a|lora_b|m)", key)
        stacked = tensor.ndim != (1 if match and match[2] == "m" else 2)
        if match is None or stacked or not _PATH.fullmatch(match[1]):
            lost.append(key)
        else:
            parts.setdefault(match[1], {})[match[2]] = tensor
    unknown(lost, str(path), options)
    layers = {}
    for module, part in parts.items():
        if "lora_a" not in part or "lora_b" not in part:
            raise ConvertError(f"{path}: {module} has only one of lora_a and lora_b.")
        A, B = part["lora_a"].T.contiguous(), part["lora_b"].T.contiguous()
        if kind == "dora" and "m" not in part:
            raise ConvertError(f"{path}: {module} has no m, though fine_tune_type is 'dora'.")
        embedding = module.endswith("embed_tokens")
        layers[module] = AdapterLayer(A, B, scale * len(A), part.get("m"), embedding=embedding)
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
    config, layers = adapter.config, read_layers(adapter).layers
    foreign = [module for module in layers if not _PATH.fullmatch(module)]
    if foreign:
        raise ConvertError(
            f"MLX's names are known for model.layers.…, model.embed_tokens and lm_head, and not for "
            f"{len(foreign)} modules: {shown(foreign)}."
        )
    _check_embeddings(layers, config.base_model_name_or_path)
    rank = max(layer.r for layer in layers.values())
    scale = most_common(layer.scaling for layer in layers.values())
    tensors = {}
    for module, layer in layers.items():
        # where the common scale is 0 every layer's may not be: then the factors carry it
        b = folded(layer.B, layer.scaling / scale if scale else layer.scaling)
        missing = rank - layer.r
        tensors[f"{module}.lora_a"] = _real(pad(layer.A.T, (0, missing)))
        tensors[f"{module}.lora_b"] = _real(pad(b.T, (0, 0, 0, missing)))
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
