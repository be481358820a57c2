"""diffusers' LoRA file: the adapters of a pipeline's components, with PEFT's tensors and configurations.

Keys are `<component>.<path>.lora_A.weight`, text encoders' `….lora_linear_layer.down.weight`; the header
holds the configurations as JSON, `<component>.<field>`, under "lora_adapter_metadata". Without that
diffusers takes alpha = r. Older spellings are read (`to_q_lora.down`, `.processor.`).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank.adapter_file import METADATA_KEY, Adapter, load_tensors, save_tensors
from lowrank.adapter_layers import AdapterLayer, read_layers
from lowrank.bare_parameters import PREFIX
from lowrank.config import LoraConfig
from lowrank.errors import AdapterFileError, ConvertError
from lowrank.files import folder_for, replacing
from lowrank.formats.layers import Options, as_adapter, unknown

FILE = "pytorch_lora_weights.safetensors"
CONFIG_KEY = "lora_adapter_metadata"
HOLDS = frozenset({"dora", "lora_bias", "embeddings", "convolutions"})
COMPONENTS = ("unet", "transformer", "transformer_2", "controlnet", "prior")
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")

# older spelling -> PEFT's, the first that fits; down is A, up is B
_UNET_SPELLINGS = (
    (r"\.to_out_lora\.(down|up)\.", r".to_out.0.{}."),
    (r"\.to_(q|k|v)_lora\.(down|up)\.", r".to_\1.{}."),
    (r"\.to_out\.lora_magnitude_vector$", ".to_out.0.lora_magnitude_vector"),
    (r"\.lora(?:_linear_layer)?\.(down|up)\.", ".{}."),
)
_TEXT_SPELLINGS = (
    (r"\.to_out_lora\.(down|up)\.", ".out_proj.{}."),
    (r"\.to_(q|k|v)_lora\.(down|up)\.", r".\1_proj.{}."),
    (r"\.to_out\.lora_magnitude_vector$", ".out_proj.lora_magnitude_vector"),
    (r"\.to_(q|k|v)\.lora_magnitude_vector$", r".\1_proj.lora_magnitude_vector"),
    (r"\.lora(?:_linear_layer)?\.(down|up)\.", ".{}."),
)
_KEY = re.compile(
    r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|alpha)"
)


def read(path: Path, options: Options) -> dict[str, Adapter]:
    """By component. path: the file, or the folder that it is in."""
    path = path / FILE if path.is_dir() else path
    tensors, header = load_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {}
    lost = []
    for key, tensor in tensors.items():
        component, rest = _split(key)
        match = _KEY.fullmatch(_spelled(rest, component in TEXT))
        if match is None or not component:
            lost.append(key)
        else:
            parts.setdefault(component, {})[match[0]] = tensor
    unknown(lost, str(path), options)
    configs, metadata = _json(header, CONFIG_KEY, path), _json(header, METADATA_KEY, path)
    found = {}
    for component, part in parts.items():
        start = f"{component}."
        values = {k.removeprefix(start): v for k, v in configs.items() if k.startswith(start)}
        if values:
            alphas = [key for key in part if key.endswith(".alpha")]
            unknown(
                [start + key for key in alphas], str(path), options, " The header has the alphas."
            )
            kept = {PREFIX + key: tensor for key, tensor in part.items() if key not in alphas}
            config = LoraConfig.from_dict(values)
            found[component] = Adapter(config, kept, metadata.get(component, {}))
        else:
            found[component] = as_adapter(_layers(part), f"diffusers: {path.name}")
    return found


def write(path: Path, adapters: Mapping[str, Adapter], options: Options) -> list[Path]:
    wrong = [name for name in adapters if name not in (*COMPONENTS, *TEXT)]
    if wrong:
        raise ConvertError(
            f"diffusers has no component {', '.join(map(repr, wrong))}. "
            f"component= (--component) names one: {', '.join([*COMPONENTS[:2], *TEXT])}."
        )
    file = path if path.suffix == ".safetensors" else path / FILE
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for component, adapter in adapters.items():
        for key, tensor in adapter.tensors.items():
            name = key.removeprefix(PREFIX)
            if component in TEXT:  # the spelling that diffusers knows text encoders by
                name = name.replace(".lora_A.", ".lora_linear_layer.down.")
                name = name.replace(".lora_B.", ".lora_linear_layer.up.")
                if name.endswith(
                    "magnitude_vector"
                ):  # transformers, which loads them, looks for it so
                    name += ".weight"
            tensors[f"{component}.{name}"] = tensor
        configs |= {f"{component}.{k}": v for k, v in _said(adapter).items()}
    metadata = {name: adapter.metadata for name, adapter in adapters.items() if adapter.metadata}
    header = {CONFIG_KEY: json.dumps(configs, indent=2, sort_keys=True)}
    header |= {METADATA_KEY: json.dumps(metadata, sort_keys=True)} if metadata else {}
    with folder_for(file.parent), replacing(file) as temporary:
        save_tensors(temporary, tensors, header)
    return [file]


def _split(key: str) -> tuple[str, str]:
    """The component, and the rest; keys of the oldest files are the unet's, without saying so."""
    first, _, rest = key.partition(".")
    if first in (*COMPONENTS, *TEXT):
        return first, rest
    return ("unet", key) if first in ("down_blocks", "mid_block", "up_blocks") else ("", key)


def _spelled(key: str, text: bool) -> str:
    key = key.replace(".processor.", ".").replace(
        ".lora_magnitude_vector.weight", ".lora_magnitude_vector"
    )
    for pattern, spelling in _TEXT_SPELLINGS if text else _UNET_SPELLINGS:
        match = re.search(pattern, key)
        if match:
            factor = "lora_A" if ".down." in match[0] else "lora_B"
            return re.sub(pattern, spelling.format(factor), key)
    return key


def _layers(part: Mapping[str, Tensor]) -> dict[str, AdapterLayer]:
    """The layers of a file whose header says nothing: alpha is the file's, else r."""
    paths = dict.fromkeys(key[: match.end(1)] for key in part if (match := _KEY.fullmatch(key)))
    found = {}
    for path in paths:
        embedding = f"{path}.lora_embedding_A" in part
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        A, B = (part.get(f"{path}.{name}") for name in names)
        if A is None or B is None:
            raise ConvertError(f"{path} has only one of A and B.")
        alpha, m = part.get(f"{path}.alpha"), part.get(f"{path}.lora_magnitude_vector")
        found[path] = AdapterLayer(
            A,
            B,
            float(len(A) if alpha is None else alpha),
            None if m is None else m.flatten(),
            part.get(f"{path}.lora_B.bias"),
            embedding,
        )
    return found


def _said(adapter: Adapter) -> dict[str, Any]:
    """The configuration's fields, without those at their default: an older PEFT may not know them."""
    values, plain = adapter.config.to_dict(), LoraConfig().to_dict()
    if values["target_modules"] is None:  # PEFT's default for a language model's architecture
        values["target_modules"] = list(read_layers(adapter).layers)
    always = {"r", "lora_alpha", "target_modules"}
    return {name: v for name, v in values.items() if name in always or v != plain[name]}


def _json(header: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(header.get(key, "{}"))
    except json.JSONDecodeError as error:
        raise AdapterFileError(f"{path}: {key!r} in its header is broken: {error}") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path}: {key!r} in its header is no JSON object.")
    return values
