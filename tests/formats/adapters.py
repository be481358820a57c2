"""Adapters to convert, and what each format's file means: ΔW in float64, from the file's own bytes."""

import json
import math
import re

import gguf
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lowrank import Adapter, LoraConfig, write_adapter

PREFIX = "base_model.model."

# (out, in) or (out, in, *kernel)
LLAMA = {
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "self_attn.q_proj": (24, 22),
            "self_attn.k_proj": (12, 22),
            "self_attn.v_proj": (12, 22),
            "self_attn.o_proj": (22, 24),
            "mlp.gate_proj": (34, 22),
            "mlp.up_proj": (34, 22),
            "mlp.down_proj": (22, 34),
        }.items()
    }
}
UNET = {
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (12, 10),
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": (12, 12),
    "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj": (26, 12),
    "mid_block.resnets.1.conv2": (14, 10, 3, 3),
    "mid_block.attentions.0.proj_in": (14, 10, 1, 1),
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": (12, 12),
    "text_model.encoder.layers.1.mlp.fc1": (18, 12),
}


def made(shapes, seed=0, dtype=torch.float32, dora=False, lora_bias=False, **fields):
    """An adapter with random tensors for these weights; those of `embed_tokens` are an embedding's."""
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 6,
            "target_modules": list(shapes),
            "use_dora": dora,
            "lora_bias": lora_bias,
            **fields,
        }
    )
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (out, in_, *kernel) in shapes.items():
        r = value(config.rank_pattern, path, config.r)
        a, b = "lora_A.weight", "lora_B.weight"
        if path.endswith(("embed_tokens", "wte")):
            a, b = "lora_embedding_A", "lora_embedding_B"
        new = {a: (r, in_, *kernel), b: (out, r, *[1] * len(kernel))}
        if dora:
            new["lora_magnitude_vector"] = (1, out, *[1] * len(kernel)) if kernel else (out,)
        if lora_bias:
            new["lora_B.bias"] = (out,)
        for name, shape in new.items():
            tensor = torch.randn(shape, generator=random).to(dtype)
            tensors[f"{PREFIX}{path}.{name}"] = tensor.abs() if "magnitude" in name else tensor
    return Adapter(config, tensors, {"step": 7})


def written(folder, shapes, **options):
    write_adapter(folder, made(shapes, **options))
    return folder


def value(pattern, path, default):
    """PEFT's rule: a key is the end of the path, or a regular expression for one."""
    found = [v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", path)]
    return found[0] if found else default


def product(B, A):
    return B.double().flatten(1) @ A.double().flatten(1)


def of_config(config, tensors):
    """ΔW by path, from tensors by PEFT's keys without its prefix and the fields of a configuration."""
    found = {}
    for key, A in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?A(?:\.weight)?", key)
        if match:
            B = tensors[re.sub(r"lora_(embedding_)?A", r"lora_\1B", key)]
            r = len(A)
            alpha = value(config.get("alpha_pattern") or {}, match[1], config["lora_alpha"])
            assert r == value(config.get("rank_pattern") or {}, match[1], config["r"])
            scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
            found[match[1]] = scaling * product(B, A)
    return found


def of_peft(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return of_config(config, {k.removeprefix(PREFIX): t for k, t in tensors.items()})


def of_diffusers(file, component):
    """By diffusers' rules: with the header's configuration, or alpha = r without one."""
    start = f"{component}."
    tensors = {
        k.removeprefix(start)
        .replace("lora_linear_layer.down", "lora_A")
        .replace("lora_linear_layer.up", "lora_B"): t
        for k, t in load_file(file).items()
        if k.startswith(start)
    }
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    return of_config(
        {k.removeprefix(start): v for k, v in said.items() if k.startswith(start)}, tensors
    )


def of_kohya(file):
    """By name with underscores."""
    tensors, found = load_file(file), {}
    for key, down in tensors.items():
        name, _, what = key.partition(".")
        if what == "lora_down.weight":
            scaling = tensors[f"{name}.alpha"].item() / len(down)
            found[name] = scaling * product(tensors[f"{name}.lora_up.weight"], down)
    return found


def of_mlx(folder):
    """mlx-lm's LoRALinear: y + scale · (x @ lora_a) @ lora_b, so that ΔWᵀ = scale · lora_a @ lora_b.

    Of its experts, LoRASwitchLinear, both are transposed.
    """
    tensors = load_file(folder / "adapters.safetensors")
    said = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]
    return {
        key.removesuffix(".lora_a"): said["scale"]
        * _mlx_product(a.double(), tensors[key.replace("lora_a", "lora_b")].double())
        for key, a in tensors.items()
        if key.endswith(".lora_a")
    }


def _mlx_product(a, b):
    return (a @ b).T if a.ndim == 2 else b @ a


def of_gguf(file):
    """llama.cpp: scale = alpha / b's rank if alpha, else 1; by the weight's name."""
    reader = gguf.GGUFReader(file)
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {t.name: torch.from_numpy(t.data.copy()).double() for t in reader.tensors}
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            b = tensors[name.replace("lora_a", "lora_b")]
            if name.startswith("token_embd"):
                a = a.T
            found[name.removesuffix(".lora_a")] = (alpha / b.shape[-1] if alpha else 1.0) * b @ a
    return found


def rotary_order(weight, heads):
    """llama.cpp's conversion of a llama's q and k: of each head the rows i and i + half lie side by side."""
    rows = torch.arange(len(weight)).reshape(heads, 2, -1)
    return weight[torch.stack([rows[:, 0], rows[:, 1]], -1).flatten()]


def assert_same(found, wanted, atol=1e-5):
    assert found.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], rtol=0, atol=atol, msg=path)
