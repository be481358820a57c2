"""kohya's file: `lora_unet_down_blocks_0_….lora_down.weight`, `.lora_up.weight`, `.alpha`, `.dora_scale`.

ΔW = (alpha / r)·up·down; alpha is r where the file has none. The names have lost which of their
underscores were dots: they are read back by the words of the SD, SDXL and T5 layouts, or by the names in
the base's own files; Flux's transformer has names of its own (flux.py). `lora_mid` (LoCon's Tucker form) is multiplied into `lora_down`, which is exact.
`dora_scale` is LyCORIS' m / ‖W + ΔW‖ by output row, as PEFT's.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lowrank.adapter_file import Adapter, load_tensors, save_tensors
from lowrank.adapter_layers import AdapterLayer, read_layers
from lowrank.config import LoraConfig
from lowrank.errors import ConvertError, listed
from lowrank.files import folder_for, replacing
from lowrank.formats import flux
from lowrank.formats.layers import Options, as_adapter, shown, unknown

HOLDS = frozenset({"dora", "convolutions"})
PREFIXES = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",  # OneTrainer's, with diffusers' names
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",  # T5, which is Flux's second
}
_PARTS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale")

_UNET = (
    *(
        "down_blocks",
        "mid_block",
        "up_blocks",
        "attentions",
        "resnets",
        "downsamplers",
        "upsamplers",
    ),
    *(
        "transformer_blocks",
        "attn1",
        "attn2",
        "to_q",
        "to_k",
        "to_v",
        "to_out",
        "ff",
        "net",
        "proj",
    ),
    *("proj_in", "proj_out", "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut"),
    *("time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2"),
)
_TEXT = (
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("mlp", "fc1", "fc2", "text_projection"),
)
_T5 = (
    *("encoder", "block", "layer", "SelfAttention", "DenseReluDense"),
    *("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
)
_FLUX = (
    *("transformer_blocks", "single_transformer_blocks", "attn", "ff", "ff_context", "net", "proj"),
    *("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("norm", "norm1", "norm1_context", "linear", "proj_mlp", "proj_out", "norm_out"),
    *("x_embedder", "context_embedder", "time_text_embed", "linear_1", "linear_2"),
    *("timestep_embedder", "text_embedder", "guidance_embedder"),
)
_WORDS = {"lora_unet_": _UNET, "lora_transformer_": _FLUX, "lora_te3_": _T5}  # else _TEXT
# Stability's own names, which SDXL's trainers write -> diffusers'
_SGM_WHOLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_SGM_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SGM_MIDDLE = {0: "resnets_0", 1: "attentions_0", 2: "resnets_1"}


def read(path: Path, options: Options) -> dict[str, Adapter]:
    """By component."""
    tensors, _ = load_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {}
    lost = []
    for key, tensor in tensors.items():
        name, _, what = key.partition(".")
        if what in _PARTS and _prefix(name):
            parts.setdefault(name, {})[what] = tensor
        else:
            lost.append(key)
    unknown(
        lost, str(path), options, " LoHa, LoKr, norms and whole differences have no form as LoRA."
    )
    sd3 = any(name.startswith("lora_te2_") for name in parts)
    components = PREFIXES if sd3 else {**PREFIXES, "lora_te3_": "text_encoder_2"}
    readers = {prefix: _reader(prefix, name, options) for prefix, name in components.items()}
    found: dict[str, dict[str, AdapterLayer]] = {}
    problems, nameless = [], []
    for name, part in parts.items():
        prefix = _prefix(name)
        component, short = components[prefix], name.removeprefix(prefix)
        try:
            if prefix == "lora_unet_" and flux.is_flux(short):
                found.setdefault("transformer", {}).update(flux.modules(short, _layer(part)))
            elif (module := readers[prefix](short)) is not None:
                found.setdefault(component, {})[module] = _layer(part)
            else:
                nameless.append(name)
        except ConvertError as error:
            problems.append(f"{name}: {error}")
    if nameless:
        hint = "of the base's files" if options.base else "of the SD, SDXL, Flux and T5 layouts"
        problems.append(
            f"{len(nameless)} names are none {hint}: {shown(nameless)}. base= (--base) reads the names "
            "from a pipeline's folder."
        )
    if problems:
        raise ConvertError(f"{path}: " + listed(problems))
    return {name: as_adapter(layers, f"kohya: {path.name}") for name, layers in found.items()}


def write(path: Path, adapters: Mapping[str, Adapter], options: Options) -> list[Path]:
    problems = [
        f"kohya's files have no component {name!r}; they have {', '.join(dict.fromkeys(PREFIXES.values()))}."
        for name in adapters
        if name not in PREFIXES.values()
    ]
    if path.suffix != ".safetensors":
        problems.append(f"{path} must be the name of a file: {path}.safetensors.")
    if problems:
        raise ConvertError(listed(problems))
    tensors: dict[str, Tensor] = {}
    nameless, sizes = [], set()
    for component, adapter in adapters.items():
        layers = read_layers(adapter).layers
        prefix = _written_prefix(component, layers, adapters)
        if component == "transformer":
            _known_as_flux(adapter)
            placed, foreign = flux.named(layers)
        else:
            placed, foreign = _underscored(layers, _reader(prefix, component, options))
        nameless += [f"{component}.{module}" for module in foreign]
        for short, layer in placed.items():
            tensors |= _tensors(prefix + short, layer)
            sizes.add((layer.r, layer.alpha))
    if nameless:
        raise ConvertError(
            f"{len(nameless)} modules have no name in the SD, SDXL, Flux and T5 layouts, by which kohya's "
            f"readers find them: {shown(nameless)}. base= (--base) takes the names of a pipeline's folder instead, "
            "but for transformers."
        )
    header = {"ss_network_module": "networks.lora"}
    if len(sizes) == 1:
        ((r, alpha),) = sizes
        header |= {"ss_network_dim": str(r), "ss_network_alpha": str(alpha)}
    with folder_for(path.parent), replacing(path) as temporary:
        save_tensors(temporary, tensors, header)
    return [path]


def _written_prefix(
    component: str, layers: Mapping[str, AdapterLayer], adapters: Mapping[str, Adapter]
) -> str:
    if component == "transformer":
        return "lora_unet_"
    if component == "text_encoder" and not {"text_encoder_2", "transformer"} & adapters.keys():
        return "lora_te_"
    if component == "text_encoder_2" and any(path.startswith("encoder.block.") for path in layers):
        return "lora_te3_"
    return {name: prefix for prefix, name in PREFIXES.items()}[component]


def _underscored(
    layers: Mapping[str, AdapterLayer], reader: Callable[[str], str | None]
) -> tuple[dict[str, AdapterLayer], list[str]]:
    """By name with underscores, and the paths that no reader would find again."""
    found, foreign = {}, []
    for path, layer in layers.items():
        # transformers 5 has dropped CLIPTextModel's `text_model`; kohya's readers look for it
        path = f"text_model.{path}" if path.startswith("encoder.layers.") else path
        short = path.replace(".", "_")
        if (reader(short) or "").removeprefix("text_model.") != path.removeprefix("text_model."):
            foreign.append(path)
        found[short] = layer
    return found, foreign


def _known_as_flux(adapter: Adapter) -> bool:
    """Whether the adapter or its base says that it is a Flux transformer's, whose names others have too.

    Raises ConvertError where they say that it is another's.
    """
    said = (adapter.config.auto_mapping or {}).get("base_model_class")
    file = Path(adapter.config.base_model_name_or_path or "", "transformer", "config.json")
    if file.exists():
        said = LoraConfig.from_json_file(file).get("_class_name")
    if said not in (None, "FluxTransformer2DModel"):
        raise ConvertError(f"kohya's names are known for Flux's transformer, and not for {said}.")
    return said is not None


def notes(adapters: Mapping[str, Adapter]) -> list[str]:
    """Where programs that read these files differ from what the file says, for these adapters."""
    layers = {name: read_layers(adapter).layers for name, adapter in adapters.items()}
    transformer = layers.pop("transformer", {})
    t5 = [name for name, inner in layers.items() if any("encoder.block." in path for path in inner)]
    clip = {name: i for name, i in layers.items() if name.startswith("text") and name not in t5}
    found = []
    if any(adapter.config.use_dora for adapter in adapters.values()):
        found.append(
            "dora_scale has LyCORIS' meaning; diffusers leaves it out, ComfyUI divides by another norm."
        )
    if any(len({layer.alpha for layer in inner.values()}) > 1 for inner in layers.values()):
        found.append(
            "Layers differ in alpha; diffusers gives all attention layers of a component one alpha: write its format for it."
        )
    for name, inner in clip.items():
        if not any(path.endswith("out_proj") for path in inner):
            found.append(
                f"{name} has no out_proj, by which diffusers recognises kohya's names there: write its format for it."
            )
    found += [f"diffusers leaves out {name}, a T5: write its format for it." for name in t5]
    if transformer and not _known_as_flux(adapters["transformer"]):
        found.append(
            "The transformer is written as Flux's, by its names alone: no configuration says what it is."
        )
    ends = [path for path in transformer if "blocks." not in path]
    if ends:
        found.append(
            f"diffusers leaves out what lies outside of the blocks, {shown(ends)}: write its format for it."
        )
    return found


# --- tensors --------------------------------------------------------------------------------------


def _layer(part: Mapping[str, Tensor]) -> AdapterLayer:
    down, up, mid = (part.get(f"lora_{name}.weight") for name in ("down", "up", "mid"))
    if down is None or up is None:
        raise ConvertError("it has only one of lora_down and lora_up.")
    if mid is not None:
        down = _through(mid, down)
    up = up.reshape(*up.shape, *[1] * (down.ndim - up.ndim))
    alpha, scale = part.get("alpha"), part.get("dora_scale")
    if scale is not None and (scale.shape[0] != len(up) or scale.numel() != len(up)):
        raise ConvertError(
            f"dora_scale {tuple(scale.shape)} goes by input column; PEFT's DoRA goes by output row, of which "
            f"there are {len(up)}."
        )
    return AdapterLayer(
        A=down,
        B=up,
        alpha=float(len(down) if alpha is None else alpha),
        magnitude=None if scale is None else scale.flatten(),
    )


def _through(mid: Tensor, down: Tensor) -> Tensor:
    """One kernel (r, in, *k) for a 1×1 convolution `down` (r, in, 1, 1) and `mid` (r, r, *k) after it."""
    if mid.ndim < 3 or mid.shape[1] != len(down) or down[0, 0].numel() != 1:
        raise ConvertError(f"lora_mid {tuple(mid.shape)} does not go with {tuple(down.shape)}.")
    wide = torch.promote_types(mid.dtype, torch.float32)
    return torch.einsum("rs...,sc->rc...", mid.to(wide), down.flatten(1).to(wide)).contiguous()


def _tensors(at: str, layer: AdapterLayer) -> dict[str, Tensor]:
    found = {
        f"{at}.lora_down.weight": layer.A,
        f"{at}.lora_up.weight": layer.B,
        f"{at}.alpha": torch.tensor(float(layer.alpha)),
    }
    if layer.magnitude is not None:
        found[f"{at}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.A.ndim - 1))
    return found


# --- names ----------------------------------------------------------------------------------------


def _prefix(name: str) -> str:
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")


def _reader(prefix: str, component: str, options: Options) -> Callable[[str], str | None]:
    """From a name with underscores to the module's path, or None if it is none."""
    if options.base:
        known = module_names(Path(options.base), component)
        return lambda name: known.get(name) or known.get(name.removeprefix("text_model_"))
    words = _WORDS.get(prefix, _TEXT)
    return lambda name: dotted(_from_sgm(name), words)


def module_names(base: Path, component: str) -> dict[str, str]:
    """The paths of all modules with a weight in a pipeline's folder, by their names with underscores.

    Raises ConvertError if two paths have one name.
    """
    found: dict[str, str] = {}
    files = sorted((base / component).glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                path = key.rpartition(".")[0]
                other = found.setdefault(path.replace(".", "_"), path)
                if other != path:
                    raise ConvertError(
                        f"{path} and {other} of {base} have one name in kohya's files."
                    )
    return found


def dotted(name: str, words: tuple[str, ...]) -> str | None:
    """`name` with dots where the layout's words end, or None if it is not made of them."""
    word = "|".join(sorted(words, key=len, reverse=True))  # conv_in before conv
    if not re.fullmatch(rf"(?:{word}|\d+)(?:_(?:{word}|\d+))*", name):
        return None
    return ".".join(re.findall(rf"(?:{word}|\d+)(?=_|$)", name))


def _from_sgm(name: str) -> str:
    """Stability's name of a module in diffusers' words, for two resnets a block as SD and SDXL have."""
    if name in _SGM_WHOLE:
        return _SGM_WHOLE[name]
    match = re.fullmatch(r"(input_blocks|output_blocks)_(\d+)_(\d)_(.+)", name)
    if match:
        up, n, part, rest = match[1][0] == "o", int(match[2]), int(match[3]), match[4]
        block, layer = divmod(n if up else n - 1, 3)
        sampler = "upsamplers_0_conv" if up else "downsamplers_0_conv"
        at = f"{'up' if up else 'down'}_blocks_{block}"
        if rest in ("op", "conv"):
            return f"{at}_{sampler}"
        return (
            f"{at}_attentions_{layer}_{rest}" if part else f"{at}_resnets_{layer}_{_resnet(rest)}"
        )
    match = re.fullmatch(r"middle_block_([012])_(.+)", name)
    if match:
        return f"mid_block_{_SGM_MIDDLE[int(match[1])]}_{_resnet(match[2])}"
    return name


def _resnet(rest: str) -> str:
    return _SGM_RESNET.get(rest, rest)
