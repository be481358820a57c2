"""Flux's adapters in kohya's names, against ΔW of the fused layers put together by hand in float64."""

import json

import pytest
import torch
from adapters import PREFIX, assert_same, made, of_kohya, of_peft, product, written
from safetensors.torch import load_file, save_file

from lowrank import read_adapter, write_adapter
from lowrank.errors import ConvertError
from lowrank.formats import convert

D, MLP = 6, 24
DOUBLE = {
    f"transformer_blocks.1.{name}": shape
    for name, shape in {
        "attn.to_q": (D, D),
        "attn.to_k": (D, D),
        "attn.to_v": (D, D),
        "attn.add_v_proj": (D, D),
        "attn.to_out.0": (D, D),
        "attn.to_add_out": (D, D),
        "ff.net.0.proj": (MLP, D),
        "ff_context.net.2": (D, MLP),
        "norm1.linear": (6 * D, D),
        "norm1_context.linear": (6 * D, D),
    }.items()
}
SINGLE = {
    f"single_transformer_blocks.12.{name}": shape
    for name, shape in {
        "attn.to_k": (D, D),
        "proj_mlp": (MLP, D),
        "proj_out": (D, D + MLP),
        "norm.linear": (3 * D, D),
    }.items()
}
REST = {
    "x_embedder": (D, 4),
    "context_embedder": (D, 5),
    "time_text_embed.timestep_embedder.linear_1": (D, 8),
    "time_text_embed.text_embedder.linear_2": (D, D),
    "time_text_embed.guidance_embedder.linear_1": (D, 8),
    "norm_out.linear": (2 * D, D),
    "proj_out": (4, D),
}
FLUX = DOUBLE | SINGLE | REST
T5 = {
    "encoder.block.1.layer.0.SelfAttention.o": (7, 9),
    "encoder.block.0.layer.1.DenseReluDense.wi_0": (11, 7),
}
CLIP = {"text_model.encoder.layers.0.self_attn.out_proj": (8, 8)}
SCALINGS = {
    "plain": {},
    "several": {
        "use_rslora": True,
        "rank_pattern": {"to_q": 7, "proj_mlp": 3},
        "alpha_pattern": {"to_v": 9.5, "attn.to_k": 1, "norm_out.linear": 0},
    },
}


def by_hand(deltas):
    """ΔW by Black Forest Labs' names."""
    at = {path.partition(".1.")[2]: d for path, d in deltas.items() if path in DOUBLE}
    single = {path.partition(".12.")[2]: d for path, d in deltas.items() if path in SINGLE}
    zero = torch.zeros(D, D, dtype=torch.float64)
    scale, shift = deltas["norm_out.linear"].chunk(2)
    found = {
        "double_blocks_1_img_attn_qkv": torch.cat([at["attn.to_q"], at["attn.to_k"], at["attn.to_v"]]),
        "double_blocks_1_txt_attn_qkv": torch.cat([zero, zero, at["attn.add_v_proj"]]),
        "double_blocks_1_img_attn_proj": at["attn.to_out.0"],
        "double_blocks_1_txt_attn_proj": at["attn.to_add_out"],
        "double_blocks_1_img_mlp_0": at["ff.net.0.proj"],
        "double_blocks_1_txt_mlp_2": at["ff_context.net.2"],
        "double_blocks_1_img_mod_lin": at["norm1.linear"],
        "double_blocks_1_txt_mod_lin": at["norm1_context.linear"],
        "single_blocks_12_linear1": torch.cat([zero, single["attn.to_k"], zero, single["proj_mlp"]]),
        "single_blocks_12_linear2": single["proj_out"],
        "single_blocks_12_modulation_lin": single["norm.linear"],
        "img_in": deltas["x_embedder"],
        "txt_in": deltas["context_embedder"],
        "time_in_in_layer": deltas["time_text_embed.timestep_embedder.linear_1"],
        "vector_in_out_layer": deltas["time_text_embed.text_embedder.linear_2"],
        "guidance_in_in_layer": deltas["time_text_embed.guidance_embedder.linear_1"],
        "final_layer_adaLN_modulation_1": torch.cat([shift, scale]),
        "final_layer_linear": deltas["proj_out"],
    }  # fmt: skip
    return {f"lora_unet_{name}": delta for name, delta in found.items()}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_flux(tmp_path, scaling):
    for name, shapes in {"transformer": FLUX, "text_encoder": CLIP, "text_encoder_2": T5}.items():
        written(tmp_path / "in" / name, shapes, seed=len(name), **scaling)
    result = convert(tmp_path / "in", tmp_path / "a.safetensors", "kohya")
    wanted = by_hand(of_peft(tmp_path / "in" / "transformer"))
    for start, name in {"lora_te1_": "text_encoder", "lora_te3_": "text_encoder_2"}.items():
        for path, delta in of_peft(tmp_path / "in" / name).items():
            wanted[start + path.replace(".", "_")] = delta
    assert_same(of_kohya(tmp_path / "a.safetensors"), wanted)
    assert any("a T5" in note for note in result.notes)
    assert any("as Flux's" in note for note in result.notes)
    convert(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        before, after = (of_peft(tmp_path / at / name) for at in ("in", "out"))
        assert_same(after, before)
    if not scaling:
        ranks = {k: len(t) for k, t in load_file(tmp_path / "a.safetensors").items() if "down" in k}
        assert ranks["lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight"] == 3 * 4
        assert read_adapter(tmp_path / "out/transformer").config.rank_pattern == {}  # and back


def test_one_A_stays_one(tmp_path):
    """As kohya's trainer writes it, one pair for all the rows: there and back without a greater rank."""
    name = "lora_unet_single_blocks_3_linear1"
    down, up = torch.randn(5, D), torch.randn(3 * D + MLP, 5)
    source = tmp_path / "a.safetensors"
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file({f"{name}.{what}": tensor for what, tensor in parts.items()}, source)
    convert(source, tmp_path / "out", "peft")
    at = "single_transformer_blocks.3"
    q, k, v, mlp = (0.4 * product(up, down)).split([D, D, D, MLP])
    wanted = {f"{at}.attn.to_q": q, f"{at}.attn.to_k": k, f"{at}.attn.to_v": v}
    assert_same(of_peft(tmp_path / "out/transformer"), {**wanted, f"{at}.proj_mlp": mlp})
    convert(tmp_path / "out", tmp_path / "b.safetensors", "kohya")
    again = load_file(tmp_path / "b.safetensors")
    assert again[f"{name}.lora_down.weight"].shape == down.shape
    assert_same(of_kohya(tmp_path / "b.safetensors"), of_kohya(source))


def test_an_adapter_that_is_not_trained_yet_keeps_its_places(tmp_path):
    adapter = made(FLUX)
    zeros = {k: t * 0 if "lora_B" in k else t for k, t in adapter.tensors.items()}
    write_adapter(tmp_path / "in", adapter._replace(tensors=zeros))
    convert(tmp_path / "in", tmp_path / "a.safetensors", "kohya", component="transformer")
    convert(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    found = read_adapter(tmp_path / "out/transformer").tensors
    assert f"{PREFIX}single_transformer_blocks.12.attn.to_k.lora_A.weight" in found


def test_dora_needs_the_magnitudes_of_all_rows(tmp_path):
    shapes = {path: DOUBLE[path] for path in DOUBLE if path.endswith(("to_q", "to_k", "to_v"))}
    source = written(tmp_path / "in", shapes, dora=True)
    convert(source, tmp_path / "a.safetensors", "kohya", component="transformer")
    before = read_adapter(source).tensors
    m = [before[f"{PREFIX}{path}.lora_magnitude_vector"] for path in shapes]
    scale = load_file(tmp_path / "a.safetensors")[
        "lora_unet_double_blocks_1_img_attn_qkv.dora_scale"
    ]
    assert torch.equal(scale, torch.cat(m)[:, None])
    convert(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    after = read_adapter(tmp_path / "out/transformer").tensors
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    lacking = written(tmp_path / "in2", dict(list(shapes.items())[:2]), dora=True)
    with pytest.raises(ConvertError, match=r"img_attn_qkv holds .*to_v: DoRA needs"):
        convert(lacking, tmp_path / "b.safetensors", "kohya", component="transformer")


def test_what_is_no_flux_is_refused(tmp_path):
    def refused(source, message, **options):
        with pytest.raises(ConvertError, match=message):
            convert(source, tmp_path / "a.safetensors", "kohya", component="transformer", **options)

    source = written(tmp_path / "in", DOUBLE | {"transformer_blocks.1.attn2.to_q": (D, D)})
    refused(source, r"transformer\.transformer_blocks\.1\.attn2\.to_q")
    refused(
        written(tmp_path / "wide", {"transformer_blocks.0.attn.to_q": (9, D)}),
        "Flux's B has 6 rows",
    )
    wide = {"transformer_blocks.0.ff.net.0.proj": (6 * D, D)}  # as in Flux 2
    refused(written(tmp_path / "wide2", wide), r"mlp_0 .*has 24 rows")
    fields = {"auto_mapping": {"base_model_class": "SD3Transformer2DModel"}}
    refused(written(tmp_path / "sd3", DOUBLE, **fields), "not for SD3Transformer2DModel")
    (tmp_path / "pipe" / "transformer").mkdir(parents=True)
    said = tmp_path / "pipe" / "transformer" / "config.json"
    said.write_text(json.dumps({"_class_name": "QwenImageTransformer2DModel"}))
    good = written(tmp_path / "good", DOUBLE)
    refused(good, "not for QwenImage", base=str(tmp_path / "pipe"))
    said.write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    base = str(tmp_path / "pipe")
    result = convert(good, tmp_path / "a.safetensors", "kohya", component="transformer", base=base)
    assert result.notes == []
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    wrong = {
        f"{name}.lora_down.weight": torch.ones(2, 5),
        f"{name}.lora_up.weight": torch.ones(9, 2),
    }
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(ConvertError, match="Flux's B has 15 rows"):
        convert(tmp_path / "w.safetensors", tmp_path / "out", "peft")


def test_names_of_diffusers_with_underscores(tmp_path):
    """As OneTrainer writes them."""
    tensors = {}
    for path, (out, in_) in FLUX.items():
        at = f"lora_transformer_{path.replace('.', '_')}"
        tensors[f"{at}.lora_down.weight"] = torch.randn(2, in_)
        tensors[f"{at}.lora_up.weight"] = torch.randn(out, 2)
        tensors[f"{at}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out", "peft", component="transformer")
    found = of_kohya(tmp_path / "a.safetensors")
    wanted = {path: found[f"lora_transformer_{path.replace('.', '_')}"] for path in FLUX}
    assert_same(of_peft(tmp_path / "out"), wanted)
