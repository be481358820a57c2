"""Conversions against ΔW worked out in float64 from the bytes of each format's file."""

import json
import re

import gguf
import pytest
import tiny
import torch
from adapters import (
    LLAMA,
    PREFIX,
    TEXT,
    UNET,
    assert_same,
    made,
    of_diffusers,
    of_gguf,
    of_kohya,
    of_mlx,
    of_peft,
    product,
    rotary_order,
    written,
)
from safetensors.torch import load_file, save_file

import lowrank
from lowrank import LoraConfig, read_adapter, write_adapter
from lowrank.errors import ConvertError, LowrankError
from lowrank.formats import FORMATS, convert, detect, kohya
from lowrank.formats.layers import Options, check_holds, folded

# what has to survive, each where formats have no word for it
SCALINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 7, "to_q": 7}},
    "alpha_pattern": {"alpha_pattern": {r".*\.0\..*_proj": 9.5, "proj_in": 3}},
    "all": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 7, "fc1": 2, "ff.net.0.proj": 3},
        "alpha_pattern": {"v_proj": 1, "conv2": 9},
    },
}


@pytest.fixture(params=SCALINGS.values(), ids=SCALINGS)
def scaling(request):
    return request.param


def base_folder(folder, **values):
    folder.mkdir()
    values = {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 3, **values}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def llama_names(deltas, heads={"q_proj": 6, "k_proj": 3}):  # noqa: B006
    """ΔW by llama.cpp's names and in its order of rows, by hand."""
    words = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    words |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    found = {}
    for path, delta in deltas.items():
        _, _, i, _, last = path.split(".")
        n = heads.get(last)
        found[f"blk.{i}.{words[last]}.weight"] = rotary_order(delta, n) if n else delta
    return found


# --- PEFT → another format → PEFT -----------------------------------------------------------------


def test_mlx(tmp_path, scaling):
    source = written(tmp_path / "in", LLAMA, **scaling)
    convert(source, tmp_path / "mlx", "mlx")
    assert_same(of_mlx(tmp_path / "mlx"), of_peft(source))
    said = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert said["fine_tune_type"] == "lora"
    assert said["num_layers"] == -1
    assert set(said["lora_parameters"]["keys"]) == {p.split(".", 3)[3] for p in LLAMA}
    ranks = {
        a.shape[1]
        for k, a in load_file(tmp_path / "mlx/adapters.safetensors").items()
        if k.endswith("_a")
    }
    assert ranks == {said["lora_parameters"]["rank"]}
    result = convert(tmp_path / "mlx", tmp_path / "out", "peft")
    assert result.source == "mlx"
    assert_same(of_peft(tmp_path / "out"), of_peft(source))


def test_gguf(tmp_path, scaling):
    source, base = written(tmp_path / "in", LLAMA, **scaling), base_folder(tmp_path / "base")
    convert(source, tmp_path / "a.gguf", "gguf", base=base)
    assert_same(of_gguf(tmp_path / "a.gguf"), llama_names(of_peft(source)))
    result = convert(
        tmp_path / "a.gguf", tmp_path / "out", "peft"
    )  # it says how many heads there are
    assert result.source == "gguf"
    assert_same(of_peft(tmp_path / "out"), of_peft(source))


def test_diffusers(tmp_path, scaling):
    for name, shapes in {"unet": UNET, "text_encoder": TEXT}.items():
        written(tmp_path / "in" / name, shapes, **scaling)
    convert(tmp_path / "in", tmp_path / "diffusers", "diffusers")
    file = tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"
    for name in ("unet", "text_encoder"):
        assert_same(of_diffusers(file, name), of_peft(tmp_path / "in" / name))
    result = convert(tmp_path / "diffusers", tmp_path / "out", "peft")
    assert result.source == "diffusers"
    for name in ("unet", "text_encoder"):
        before, after = read_adapter(tmp_path / "in" / name), read_adapter(tmp_path / "out" / name)
        assert after.config == before.config
        assert after.metadata == before.metadata == {"step": 7}
        assert after.tensors.keys() == before.tensors.keys()
        assert all(torch.equal(after.tensors[k], before.tensors[k]) for k in before.tensors)


def test_kohya(tmp_path, scaling):
    for name, shapes in {"unet": UNET, "text_encoder": TEXT, "text_encoder_2": TEXT}.items():
        written(tmp_path / "in" / name, shapes, seed=len(name), **scaling)
    result = convert(tmp_path / "in", tmp_path / "a.safetensors", "kohya")
    assert result.files == [tmp_path / "a.safetensors"]
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    wanted = {
        start + path.replace(".", "_"): delta
        for name, start in starts.items()
        for path, delta in of_peft(tmp_path / "in" / name).items()
    }
    assert_same(of_kohya(tmp_path / "a.safetensors"), wanted)
    result = convert(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    assert result.source == "kohya"
    for name in starts:
        assert_same(of_peft(tmp_path / "out" / name), of_peft(tmp_path / "in" / name))


def test_between_two_foreign_formats(tmp_path, scaling):
    source, base = written(tmp_path / "in", LLAMA, **scaling), base_folder(tmp_path / "base")
    convert(source, tmp_path / "mlx", "mlx")
    convert(tmp_path / "mlx", tmp_path / "a.gguf", "gguf", base=base)
    convert(tmp_path / "a.gguf", tmp_path / "mlx2", "mlx")
    assert_same(of_mlx(tmp_path / "mlx2"), of_peft(source))

    written(tmp_path / "parts" / "unet", UNET, **scaling)
    convert(tmp_path / "parts", tmp_path / "k.safetensors", "kohya")
    convert(tmp_path / "k.safetensors", tmp_path / "d.safetensors", "diffusers")
    convert(tmp_path / "d.safetensors", tmp_path / "k2.safetensors", "kohya")
    assert_same(of_kohya(tmp_path / "k2.safetensors"), of_kohya(tmp_path / "k.safetensors"))
    assert_same(
        of_diffusers(tmp_path / "d.safetensors", "unet"), of_peft(tmp_path / "parts" / "unet")
    )


def test_the_configuration_that_comes_back_selects_exactly_the_adapted_modules(tmp_path):
    """Two layers of four and some of their modules: PEFT's rules find those and no others."""
    shapes = {
        f"model.layers.{i}.{name}": (8, 8)
        for i in (1, 3)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    convert(written(tmp_path / "in", shapes), tmp_path / "mlx", "mlx")
    convert(tmp_path / "mlx", tmp_path / "out", "peft")
    config = read_adapter(tmp_path / "out").config
    assert config.layers_to_transform == [1, 3]
    assert config.target_modules == ["mlp.up_proj", "self_attn.q_proj"]
    model = tiny.llama(layers=4)
    assert {target.path for target in lowrank.plan(model, config)} == set(shapes)
    uneven = {path: shape for path, shape in shapes.items() if path != "model.layers.3.mlp.up_proj"}
    convert(written(tmp_path / "in2", uneven), tmp_path / "mlx2", "mlx")
    convert(tmp_path / "mlx2", tmp_path / "out2", "peft")
    config = read_adapter(tmp_path / "out2").config
    assert {target.path for target in lowrank.plan(model, config)} == set(uneven)


def test_half_precision_is_not_rounded_by_a_scaling(tmp_path):
    """bfloat16 factors stay bfloat16 where the product is exact, and become float32 where it is not."""
    source = written(
        tmp_path / "in", LLAMA, dtype=torch.bfloat16, alpha_pattern={"v_proj": 12, "o_proj": 9.1}
    )
    convert(source, tmp_path / "mlx", "mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    dtypes = {key.split(".")[4]: t.dtype for key, t in tensors.items() if key.endswith("lora_b")}
    assert dtypes["v_proj"] == dtypes["q_proj"] == torch.bfloat16  # a factor of 2
    assert dtypes["o_proj"] == torch.float32
    assert_same(of_mlx(tmp_path / "mlx"), of_peft(source))


def test_folded():
    tensor = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    assert folded(tensor, 1) is tensor
    assert folded(tensor, 0.5).dtype == torch.bfloat16
    assert folded(tensor, 0.0).dtype == torch.bfloat16
    found = folded(tensor, 0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([0.1, 0.3]))
    assert folded(tensor.double(), 0.1).dtype == torch.float64


@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_alpha_0_is_no_adapter_at_all(tmp_path, to):
    """llama.cpp takes alpha 0 for scale 1."""
    base = base_folder(tmp_path / "base")
    source = written(tmp_path / "in", LLAMA, lora_alpha=0, alpha_pattern={"v_proj": 2})
    out = tmp_path / ("a.gguf" if to == "gguf" else "mlx")
    convert(source, out, to, base=base)
    wanted = of_peft(source)
    assert_same(
        of_mlx(out) if to == "mlx" else of_gguf(out), wanted if to == "mlx" else llama_names(wanted)
    )


# --- what only some formats hold ------------------------------------------------------------------


def test_dora_in_kohya_and_mlx(tmp_path):
    written(tmp_path / "in" / "unet", UNET, dora=True)
    convert(tmp_path / "in", tmp_path / "a.safetensors", "kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    scales = {k: t for k, t in tensors.items() if k.endswith("dora_scale")}
    assert {tuple(t.shape) for t in scales.values()} >= {(12, 1), (14, 1, 1, 1)}
    convert(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    before, after = read_adapter(tmp_path / "in/unet"), read_adapter(tmp_path / "out/unet")
    assert after.config.use_dora
    assert all(torch.equal(after.tensors[k], before.tensors[k]) for k in before.tensors)

    source = written(tmp_path / "llama", LLAMA, dora=True, alpha_pattern={"v_proj": 1})
    convert(source, tmp_path / "mlx", "mlx")
    assert (
        json.loads((tmp_path / "mlx/adapter_config.json").read_text())["fine_tune_type"] == "dora"
    )
    m = {
        k: t
        for k, t in load_file(tmp_path / "mlx/adapters.safetensors").items()
        if k.endswith(".m")
    }
    for key, tensor in read_adapter(source).tensors.items():
        if "magnitude" in key:
            name = key.removeprefix(PREFIX).replace("lora_magnitude_vector", "m")
            assert torch.equal(m.pop(name), tensor)
    assert not m
    assert_same(of_mlx(tmp_path / "mlx"), of_peft(source))
    convert(tmp_path / "mlx", tmp_path / "again", "peft")
    assert read_adapter(tmp_path / "again").config.use_dora
    assert_same(of_peft(tmp_path / "again"), of_peft(source))


WHOLE = {"lm_head": (31, 22), "model.embed_tokens": (22, 31)}


def test_embeddings_of_an_untied_base(tmp_path):
    base = base_folder(tmp_path / "base", tie_word_embeddings=False)
    source = written(tmp_path / "in", WHOLE, rank_pattern={"lm_head": 3})
    for to, out in {"mlx": tmp_path / "mlx", "gguf": tmp_path / "a.gguf"}.items():
        convert(source, out, to, base=base)
        found = of_mlx(out) if to == "mlx" else of_gguf(out)
        wanted = of_peft(source)
        if to == "mlx":
            keys = json.loads((out / "adapter_config.json").read_text())["lora_parameters"]["keys"]
            assert keys == ["lm_head", "model.embed_tokens"]
        else:
            wanted = {
                "output.weight": wanted["lm_head"],
                "token_embd.weight": wanted["model.embed_tokens"],
            }
        assert_same(found, wanted)
        convert(out, tmp_path / f"{to}-back", "peft", base=base)
        assert_same(of_peft(tmp_path / f"{to}-back"), of_peft(source))
    a = {t.name: t.data.shape for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert a["token_embd.weight.lora_a"] == (31, 4)  # rows to be looked up
    assert a["token_embd.weight.lora_b"] == (22, 4)


@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_embeddings_of_a_tied_base_are_refused(tmp_path, to):
    base = base_folder(tmp_path / "base", tie_word_embeddings=True)
    source = written(tmp_path / "in", WHOLE)
    with pytest.raises(ConvertError, match=r"model\.embed_tokens.*tied"):
        convert(source, tmp_path / "out.gguf", to, base=base)
    if to == "mlx":
        with pytest.raises(ConvertError, match="base="):
            convert(source, tmp_path / "out", to)
    convert(source, tmp_path / "in2.gguf", to, base=base_folder(tmp_path / "b2"), drop="embeddings")


REFUSED = {
    "dora": ("gguf", {"dora": True}, r"self_attn\.q_proj\.lora_magnitude_vector"),
    "lora_bias": ("mlx", {"lora_bias": True}, r"mlp\.up_proj\.lora_B\.bias"),
}


@pytest.mark.parametrize(("to", "options", "named"), REFUSED.values(), ids=REFUSED)
def test_what_a_format_has_no_place_for_is_refused_by_name_or_dropped(tmp_path, to, options, named):
    source, base = written(tmp_path / "in", LLAMA, **options), base_folder(tmp_path / "base")
    (kind,) = [kind for kind, row in REFUSED.items() if row[0] == to]
    out = tmp_path / "out.gguf"
    with pytest.raises(ConvertError, match=named) as caught:
        convert(source, out, to, base=base)
    assert str(caught.value).count("layers.") == len(LLAMA)  # all of them
    assert f"--drop {kind}" in str(caught.value)
    assert not out.exists()
    result = convert(source, out, to, base=base, drop=kind)
    assert len(result.dropped[kind]) == len(LLAMA)
    wanted = of_peft(source)
    assert_same(
        of_gguf(out) if to == "gguf" else of_mlx(out),
        llama_names(wanted) if to == "gguf" else wanted,
    )


def test_modules_saved_whole_and_convolutions(tmp_path):
    adapter = made(LLAMA, modules_to_save=["lm_head"])
    adapter.tensors[f"{PREFIX}lm_head.weight"] = torch.randn(31, 22)
    write_adapter(tmp_path / "in", adapter)
    with pytest.raises(ConvertError, match=r"modules_to_save.*lm_head\.weight"):
        convert(tmp_path / "in", tmp_path / "mlx", "mlx")
    convert(tmp_path / "in", tmp_path / "mlx", "mlx", drop="saved")
    convert(tmp_path / "in", tmp_path / "same", "peft")
    assert read_adapter(tmp_path / "same").tensors.keys() == adapter.tensors.keys()
    with pytest.raises(ConvertError, match=r"convolutions.*conv2"):
        convert(written(tmp_path / "unet", UNET), tmp_path / "mlx2", "mlx")


def test_trained_tokens_are_saved_whole_too(tmp_path):
    adapter = made(LLAMA, trainable_token_indices=[3, 5], ensure_weight_tying=True)
    name = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter.tensors[f"{PREFIX}{name}"] = torch.randn(2, 22)
    write_adapter(tmp_path / "in", adapter)
    with pytest.raises(ConvertError, match=rf"--drop saved.*{re.escape(name)}"):
        convert(tmp_path / "in", tmp_path / "mlx", "mlx")
    result = convert(tmp_path / "in", tmp_path / "mlx", "mlx", drop="saved")
    assert result.dropped == {"saved": [f"{PREFIX}{name}"]}
    assert_same(of_mlx(tmp_path / "mlx"), of_peft(tmp_path / "in"))


def test_an_initialisation_that_is_taken_out_of_the_base(tmp_path):
    """ΔW = scaling·(B·A − B₀·A₀), as a plain LoRA of rank 2r; without A₀ and B₀ it is refused."""
    adapter = made(LLAMA, init_lora_weights="pissa", alpha_pattern={"v_proj": 1})
    start = made(LLAMA, seed=1).tensors
    write_adapter(tmp_path / "in", adapter._replace(start=start))
    write_adapter(tmp_path / "start", adapter._replace(tensors=start))
    write_adapter(tmp_path / "lost", adapter)
    with pytest.raises(ConvertError, match="pissa"):
        convert(tmp_path / "lost", tmp_path / "mlx", "mlx")
    convert(tmp_path / "in", tmp_path / "mlx", "mlx")
    then, now = of_peft(tmp_path / "start"), of_peft(tmp_path / "in")
    assert_same(of_mlx(tmp_path / "mlx"), {path: now[path] - then[path] for path in now})
    convert(tmp_path / "in", tmp_path / "same", "peft")
    assert read_adapter(tmp_path / "same").start.keys() == start.keys()


def test_fields_that_change_what_tensors_mean_are_refused():
    adapter = made(LLAMA)
    adapter.config.target_parameters = ["mlp.experts.up"]
    with pytest.raises(ConvertError, match="target_parameters"):
        check_holds(adapter, "mlx", frozenset(), any_config=False)


def test_stacked_factors_of_experts_go_only_where_their_configuration_goes(tmp_path):
    """Two parameters of three experts: r·experts rows each, one key within the other's base_layer."""
    at = f"{PREFIX}model.layers.0.mlp.experts"
    tensors = {
        f"{at}.lora_A.weight": torch.randn(6, 5),
        f"{at}.lora_B.weight": torch.randn(7, 6),
        f"{at}.base_layer.lora_A.weight": torch.randn(6, 7),
        f"{at}.base_layer.lora_B.weight": torch.randn(9, 6),
    }
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=names)
    write_adapter(tmp_path / "in", lowrank.Adapter(config, tensors, {}))
    convert(tmp_path / "in", tmp_path / "out", "peft")
    assert read_adapter(tmp_path / "out").tensors.keys() == tensors.keys()
    assert read_adapter(tmp_path / "out").config == config
    with pytest.raises(ConvertError, match=r"target_parameters=.*kohya"):
        convert(tmp_path / "in", tmp_path / "a.safetensors", "kohya", component="transformer")


# --- kohya ----------------------------------------------------------------------------------------


def test_kohya_alpha_is_the_rank_where_the_file_has_none(tmp_path):
    tensors = {
        "lora_te_text_model_encoder_layers_0_mlp_fc2.lora_down.weight": torch.randn(3, 7),
        "lora_te_text_model_encoder_layers_0_mlp_fc2.lora_up.weight": torch.randn(5, 3),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out", "peft", component="text_encoder")
    down, up = (tensors[key] for key in sorted(tensors))
    assert_same(
        of_peft(tmp_path / "out"), {"text_model.encoder.layers.0.mlp.fc2": product(up, down)}
    )


def test_kohya_tucker_form_is_one_convolution(tmp_path):
    """down (1×1), mid (3×3), up (1×1) one after the other, against the one convolution that was made of them."""
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = torch.randn(3, 5, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(7, 3, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    save_file(
        {f"{name}.{k}": t for k, t in parts.items()} | {f"{name}.alpha": torch.tensor(2.0)},
        tmp_path / "a.safetensors",
    )
    convert(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    delta = of_peft(tmp_path / "out/unet")["down_blocks.0.resnets.0.conv1"].reshape(7, 5, 3, 3)
    x = torch.randn(2, 5, 6, 4).double()
    conv = torch.nn.functional.conv2d
    wanted = conv(conv(conv(x, down.double()), mid.double(), padding=1), up.double()) * (2 / 3)
    torch.testing.assert_close(conv(x, delta, padding=1), wanted, rtol=0, atol=1e-5)


SGM = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
    "input_blocks_7_0_skip_connection": "down_blocks.2.resnets.0.conv_shortcut",
    "middle_block_1_transformer_blocks_9_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks_0_0_out_layers_3": "up_blocks.0.resnets.0.conv2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_transformer_blocks_1_attn2_to_out_0": "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0",
    "label_emb_0_2": "add_embedding.linear_2",
    "time_embed_0": "time_embedding.linear_1",
    "out_2": "conv_out",
}


def test_kohya_names_of_stability_s_layout():
    read = kohya._reader("lora_unet_", "unet", Options())
    assert {name: read(name) for name in SGM} == SGM


@pytest.mark.parametrize(
    "name", ["down_blocks_0_motion_modules_0_proj", "conv__in", "to", "img_attn_qkv", ""]
)
def test_kohya_names_that_are_none(name):
    assert kohya.dotted(name, kohya._UNET) is None


def test_kohya_names_of_the_base_s_files(tmp_path):
    """Modules of no known layout: the pipeline's own files say where the dots were."""
    shapes = {"odd_name.inner_0.to": (6, 4)}
    written(tmp_path / "in" / "unet", shapes)
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    weights = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({"odd_name.inner_0.to.weight": torch.zeros(6, 4)}, weights)
    base = str(tmp_path / "pipe")
    with pytest.raises(ConvertError, match=r"unet\.odd_name\.inner_0\.to"):
        convert(tmp_path / "in", tmp_path / "a.safetensors", "kohya")
    convert(tmp_path / "in", tmp_path / "a.safetensors", "kohya", base=base)
    with pytest.raises(ConvertError, match=r"lora_unet_odd_name_inner_0_to.*base="):
        convert(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    convert(tmp_path / "a.safetensors", tmp_path / "out", "peft", base=base)
    assert_same(of_peft(tmp_path / "out/unet"), of_peft(tmp_path / "in/unet"))
    save_file({"a.b_c.weight": torch.zeros(1), "a_b.c.weight": torch.zeros(1)}, weights)
    with pytest.raises(ConvertError, match="one name"):
        convert(tmp_path / "a.safetensors", tmp_path / "out2", "peft", base=base)


def test_kohya_refuses_what_is_no_lora(tmp_path):
    name = "lora_unet_mid_block_resnets_0_conv1"
    good = {
        f"{name}.lora_down.weight": torch.ones(2, 3),
        f"{name}.lora_up.weight": torch.ones(4, 2),
    }
    save_file(good | {f"{name}.hada_w1_a": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ConvertError, match=r"hada_w1_a.*LoHa"):
        convert(tmp_path / "a.safetensors", tmp_path / "out", "peft")
    convert(tmp_path / "a.safetensors", tmp_path / "out", "peft", drop="unknown")
    save_file(good | {f"{name}.dora_scale": torch.ones(1, 3)}, tmp_path / "b.safetensors")
    with pytest.raises(ConvertError, match="input column"):
        convert(tmp_path / "b.safetensors", tmp_path / "out2", "peft")
    save_file({f"{name}.lora_down.weight": torch.ones(2, 3)}, tmp_path / "c.safetensors")
    with pytest.raises(ConvertError, match="only one of"):
        convert(tmp_path / "c.safetensors", tmp_path / "out2", "peft")
    with pytest.raises(ConvertError, match=r"no component 'prior'.*\n.*must be the name of a file"):
        convert(written(tmp_path / "in", UNET), tmp_path / "d", "kohya", component="prior")


# --- diffusers ------------------------------------------------------------------------------------

OLD = {
    # key of A -> (component, path)
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": (
        "unet",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight": (
        "unet",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora.down.weight": (
        "unet",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    ),
    "unet.mid_block.attentions.0.proj_in.lora.down.weight": (
        "unet",
        "mid_block.attentions.0.proj_in",
    ),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight": (
        "text_encoder",
        "text_model.encoder.layers.0.self_attn.out_proj",
    ),
    "text_encoder.text_model.encoder.layers.1.self_attn.to_v_lora.down.weight": (
        "text_encoder",
        "text_model.encoder.layers.1.self_attn.v_proj",
    ),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": (
        "text_encoder_2",
        "text_model.encoder.layers.0.mlp.fc1",
    ),
    "transformer.single_blocks.3.proj_mlp.lora_A.weight": (
        "transformer",
        "single_blocks.3.proj_mlp",
    ),
}


def test_diffusers_spellings_of_every_age(tmp_path):
    tensors, wanted = {}, {}
    for i, (key, (component, path)) in enumerate(OLD.items()):
        A, B = torch.randn(2 + i, 7), torch.randn(9, 2 + i)
        tensors |= {key: A, key.replace(".down.", ".up.").replace("lora_A", "lora_B"): B}
        wanted.setdefault(component, {})[path] = product(B, A)  # alpha is r: no header
    save_file(tensors, tmp_path / "old.safetensors")
    convert(tmp_path / "old.safetensors", tmp_path / "out", "peft")
    for component, deltas in wanted.items():
        assert_same(of_peft(tmp_path / "out" / component), deltas)


def test_diffusers_alpha_in_the_file(tmp_path):
    A, B = torch.randn(4, 7), torch.randn(9, 4)
    at = "transformer.single_blocks.3.proj_mlp"
    tensors = {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B, f"{at}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out", "peft", component="transformer")
    assert_same(of_peft(tmp_path / "out"), {"single_blocks.3.proj_mlp": 0.5 * product(B, A)})


def test_diffusers_holds_dora_bias_and_convolutions(tmp_path):
    for name, options in {"unet": {"dora": True}, "text_encoder": {"lora_bias": True}}.items():
        written(tmp_path / "in" / name, UNET if name == "unet" else TEXT, **options)
    convert(tmp_path / "in", tmp_path / "d", "diffusers")
    convert(tmp_path / "d", tmp_path / "out", "peft")
    for name in ("unet", "text_encoder"):
        before, after = read_adapter(tmp_path / "in" / name), read_adapter(tmp_path / "out" / name)
        assert after.config == before.config
        assert before.tensors.keys() == after.tensors.keys()
        assert all(torch.equal(after.tensors[k], before.tensors[k]) for k in before.tensors)


# --- MLX and GGUF, what they are read with --------------------------------------------------------


def test_mlx_files_that_are_refused(tmp_path):
    said = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 3.0}}
    good = {"model.layers.0.self_attn.q_proj.lora_a": torch.ones(3, 2)}
    good |= {"model.layers.0.self_attn.q_proj.lora_b": torch.ones(2, 4)}

    def adapter(tensors, **values):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**said, **values}))
        save_file(tensors, tmp_path / "adapters.safetensors")
        return tmp_path

    for tensors, values, message in [
        (good, {"fine_tune_type": "full"}, "'full'"),
        (good, {"lora_parameters": {"rank": 2}}, "scale"),
        (good, {"fine_tune_type": "dora"}, "no m"),
        (dict(list(good.items())[:1]), {}, "only one of"),
        (
            {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.ones(2, 3, 4), **good},
            {},
            "0 up has only one",
        ),
        (
            {"language_model.model.layers.0.mlp.up_proj.lora_a": torch.ones(2, 3), **good},
            {},
            "language_model",
        ),
        (
            {"model.layers.0.self_attn.q_proj.lora_a_scales": torch.ones(2, 3), **good},
            {},
            "lora_a_scales",
        ),
    ]:
        with pytest.raises(LowrankError, match=message):
            convert(adapter(tensors, **values), tmp_path / "out", "peft")


def test_mlx_knows_no_other_layout_of_names(tmp_path):
    base = base_folder(tmp_path / "base")  # without experts
    for path in ("transformer.h.0.attn.c_attn", "model.layers.0.mlp.experts.3.up_proj"):
        with pytest.raises(ConvertError, match=re.escape(path)):
            convert(written(tmp_path / path, {path: (6, 4)}), tmp_path / "mlx", "mlx", base=base)


LAYOUTS = {
    "mistral": ("llama", {"model.layers.1.self_attn.k_proj": ("blk.1.attn_k", (12, 22), 3)}),
    "qwen2": ("qwen2", {"model.layers.1.self_attn.k_proj": ("blk.1.attn_k", (12, 22), 0)}),
    "qwen3": ("qwen3", {"model.layers.0.self_attn.q_proj": ("blk.0.attn_q", (24, 22), 0)}),
    "gemma": ("gemma", {"model.layers.1.mlp.gate_proj": ("blk.1.ffn_gate", (34, 22), 0)}),
    "gemma2": ("gemma2", {"model.layers.1.mlp.down_proj": ("blk.1.ffn_down", (22, 34), 0)}),
    "gemma3_text": (
        "gemma3",
        {"model.layers.1.self_attn.o_proj": ("blk.1.attn_output", (22, 24), 0)},
    ),
    "phi3": (
        "phi3",
        {
            "model.layers.1.self_attn.qkv_proj": ("blk.1.attn_qkv", (48, 22), 0),
            "model.layers.0.mlp.gate_up_proj": ("blk.0.ffn_up", (68, 22), 0),
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "transformer.h.1.attn.c_attn": ("blk.1.attn_qkv", (66, 22), 0),
            "transformer.h.0.mlp.c_fc": ("blk.0.ffn_up", (88, 22), 0),
            "transformer.h.0.mlp.c_proj": ("blk.0.ffn_down", (22, 88), 0),
        },
    ),
}


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_gguf_names(tmp_path, model_type):
    name, modules = LAYOUTS[model_type]
    base = base_folder(tmp_path / "base", model_type=model_type)
    source = written(tmp_path / "in", {path: shape for path, (_, shape, _) in modules.items()})
    convert(source, tmp_path / "a.gguf", "gguf", base=base)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("general.architecture").contents() == name
    deltas = of_peft(source)
    wanted = {
        f"{name}.weight": rotary_order(deltas[path], heads) if heads else deltas[path]
        for path, (name, _, heads) in modules.items()
    }
    assert_same(of_gguf(tmp_path / "a.gguf"), wanted)
    convert(tmp_path / "a.gguf", tmp_path / "out", "peft")
    assert_same(of_peft(tmp_path / "out"), deltas)
    assert read_adapter(tmp_path / "out").config.fan_in_fan_out == (model_type == "gpt2")


def test_gguf_rows_are_in_the_order_of_llama_cpp_s_rotary_embedding():
    """Attention's scores, once as transformers turns halves of a head, once as llama.cpp turns neighbours."""
    heads, width, positions = 3, 8, 5
    q, k = torch.randn(2, positions, heads * width, dtype=torch.float64)
    angle = torch.outer(
        torch.arange(positions), 100.0 ** -(torch.arange(width // 2) / (width // 2))
    ).double()
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def halves(x):
        a, b = x.reshape(positions, heads, width).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def neighbours(x):
        a, b = rotary_order(x.T, heads).T.reshape(positions, heads, -1, 2).unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def scores(turn):
        return torch.einsum("qhd,khd->hqk", turn(q), turn(k))

    torch.testing.assert_close(scores(neighbours), scores(halves))


def test_gguf_half_precision(tmp_path):
    source, base = written(tmp_path / "in", LLAMA), base_folder(tmp_path / "base")
    convert(source, tmp_path / "a.gguf", "gguf", base=base, dtype="f16")
    assert {t.data.dtype.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors} == {"float16"}
    assert_same(of_gguf(tmp_path / "a.gguf"), llama_names(of_peft(source)), atol=2e-2)
    convert(tmp_path / "a.gguf", tmp_path / "out", "peft")
    assert {t.dtype for t in read_adapter(tmp_path / "out").tensors.values()} == {torch.float16}
    adapter = made(LLAMA)
    next(iter(adapter.tensors.values()))[0, 0] = 1e6
    write_adapter(tmp_path / "large", adapter)
    with pytest.raises(ConvertError, match="float16"):
        convert(tmp_path / "large", tmp_path / "b.gguf", "gguf", base=base, dtype="f16")


def gguf_file(path, arch="llama", alpha=6.0, **strings):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **strings}.items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", alpha)
    return writer


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_of_llama_cpp_s_own_script(tmp_path):
    """Without the heads in the file, quantised to Q8_0, alpha 0: the base says the heads, scale is 1."""
    a, b = torch.randn(4, 64), torch.randn(24, 4)
    writer = gguf_file(tmp_path / "a.gguf", alpha=0.0)
    q8 = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(a.numpy(), q8)
    writer.add_tensor("blk.1.attn_q.weight.lora_a", packed, raw_dtype=q8)
    writer.add_tensor("blk.1.attn_q.weight.lora_b", b.numpy())
    finish(writer)
    with pytest.raises(ConvertError, match=r"how many heads.*base="):
        convert(tmp_path / "a.gguf", tmp_path / "out", "peft")
    convert(tmp_path / "a.gguf", tmp_path / "out", "peft", base=base_folder(tmp_path / "base"))
    (delta,) = of_peft(tmp_path / "out").values()
    exact = torch.from_numpy(gguf.quants.dequantize(packed, q8)).double()
    torch.testing.assert_close(rotary_order(delta, 6), b.double() @ exact, rtol=0, atol=1e-5)


def test_gguf_files_that_are_refused(tmp_path):
    base = base_folder(tmp_path / "base")
    tensor = torch.ones(2, 3).numpy()
    for i, (options, tensors, message) in enumerate(
        [
            ({"general.type": "model"}, [], "general.type is 'model'"),
            ({"arch": "mamba"}, [], "'mamba'"),
            ({}, ["blk.0.attn_norm.weight"], r"blk\.0\.attn_norm"),
            ({}, ["blk.0.ffn_up.weight.lora_a"], "only one of"),
            ({}, [], "no adapter"),
        ]
    ):
        writer = gguf_file(tmp_path / f"{i}.gguf", **options)
        for name in tensors:
            writer.add_tensor(name, tensor)
        finish(writer)
        with pytest.raises(ConvertError, match=message):
            convert(tmp_path / f"{i}.gguf", tmp_path / "out", "peft", base=base)
    source = written(tmp_path / "in", LLAMA)
    for values, message in [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"num_attention_heads": None}, "how many heads"),
    ]:
        other = base_folder(tmp_path / message[:5].strip("'"), **values)
        with pytest.raises(ConvertError, match=message):
            convert(source, tmp_path / "a.gguf", "gguf", base=other)
    with pytest.raises(ConvertError, match="base="):
        convert(source, tmp_path / "a.gguf", "gguf")
    odd = written(tmp_path / "odd", {"model.layers.0.mlp.router": (4, 4)})
    with pytest.raises(ConvertError, match=r"no weight for model\.layers\.0\.mlp\.router"):
        convert(odd, tmp_path / "a.gguf", "gguf", base=base)


# --- the command's checks -------------------------------------------------------------------------


def test_detect(tmp_path):
    written(tmp_path / "peft", LLAMA)
    written(tmp_path / "parts" / "unet", UNET)
    convert(tmp_path / "peft", tmp_path / "mlx", "mlx")
    convert(tmp_path / "peft", tmp_path / "a.gguf", "gguf", base=base_folder(tmp_path / "base"))
    convert(tmp_path / "parts", tmp_path / "diffusers", "diffusers")
    convert(tmp_path / "parts", tmp_path / "kohya.safetensors", "kohya")
    found = {
        "peft": "peft",
        "parts": "peft",
        "mlx": "mlx",
        "a.gguf": "gguf",
        "diffusers": "diffusers",
        "diffusers/pytorch_lora_weights.safetensors": "diffusers",
        "kohya.safetensors": "kohya",
    }
    assert {name: detect(tmp_path / name) for name in found} == found
    assert set(found.values()) == set(FORMATS)
    for name, message in [
        ("base", "config.json"),
        ("base/config.json", "neither"),
        ("mlx/adapters.safetensors", "configuration beside it"),
    ]:
        with pytest.raises(ConvertError, match=message):
            detect(tmp_path / name)
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConvertError, match="weight"):
        detect(tmp_path / "model.safetensors")


def test_components(tmp_path):
    for name, shapes in {"unet": UNET, "text_encoder": TEXT}.items():
        written(tmp_path / "parts" / name, shapes)
    convert(tmp_path / "parts", tmp_path / "d", "diffusers", component="unet")
    assert all(
        k.startswith("unet.") for k in load_file(tmp_path / "d/pytorch_lora_weights.safetensors")
    )
    convert(tmp_path / "parts/unet", tmp_path / "d2", "diffusers", component="unet")
    assert_same(
        of_diffusers(tmp_path / "d2/pytorch_lora_weights.safetensors", "unet"),
        of_peft(tmp_path / "parts/unet"),
    )
    for source, to, options, message in [
        ("parts/unet", "diffusers", {}, "component="),
        ("parts/unet", "diffusers", {"component": "unit"}, "no component 'unit'"),
        ("parts", "diffusers", {"component": "unit"}, "Did you mean 'unet'"),
        ("parts", "mlx", {}, "has text_encoder, unet"),
        ("parts/unet", "peft", {"component": "unet"}, "without components"),
    ]:
        with pytest.raises(ConvertError, match=message):
            convert(tmp_path / source, tmp_path / "out", to, **options)
    assert not (tmp_path / "out").exists()


def test_the_base_that_is_named_stands_in_the_result(tmp_path):
    source = written(tmp_path / "in", LLAMA, base_model_name_or_path="a/b")
    convert(source, tmp_path / "mlx", "mlx")
    convert(tmp_path / "mlx", tmp_path / "out", "peft")
    assert read_adapter(tmp_path / "out").config.base_model_name_or_path == "a/b"
    convert(tmp_path / "mlx", tmp_path / "out2", "peft", base="c/d")
    assert read_adapter(tmp_path / "out2").config.base_model_name_or_path == "c/d"


def test_nothing_left_to_write(tmp_path):
    source = written(tmp_path / "in", {"mid_block.resnets.0.conv1": (6, 4, 3, 3)})
    with pytest.raises(ConvertError, match="no layer to write"):
        convert(source, tmp_path / "mlx", "mlx", drop="convolutions")


def test_wrong_arguments_are_told_at_once(tmp_path):
    source = written(tmp_path / "in", LLAMA)
    with pytest.raises(ConvertError) as caught:
        convert(source, source, "ggml", dtype="q8", drop=["dorra"])
    for word in ("'gguf'", "'dora'", "q8", "what is read", "exists"):
        assert word in str(caught.value)
    convert(source, tmp_path / "mlx", "mlx")
    with pytest.raises(ConvertError, match="overwrite=True"):
        convert(source, tmp_path / "mlx", "mlx")
    convert(source, tmp_path / "mlx", "mlx", overwrite=True)


def test_the_public_name_is_the_function():
    assert lowrank.convert is convert


def test_a_configuration_made_for_a_format_is_an_ordinary_one(tmp_path):
    convert(written(tmp_path / "in", LLAMA), tmp_path / "mlx", "mlx")
    convert(tmp_path / "mlx", tmp_path / "out", "peft")
    adapter = read_adapter(tmp_path / "out")
    assert isinstance(adapter.config, LoraConfig)
    assert (adapter.config.r, adapter.config.lora_alpha) == (4, 6)
    assert adapter.metadata["converted_from"] == "mlx: mlx"


def test_gguf_holds_the_invocation_tokens_of_an_activated_lora(tmp_path):
    base = base_folder(tmp_path / "base")
    source = written(tmp_path / "in", LLAMA, alora_invocation_tokens=[5, 70000])
    result = convert(source, tmp_path / "a.gguf", "gguf", base=base)
    field = gguf.GGUFReader(tmp_path / "a.gguf").get_field("adapter.alora.invocation_tokens")
    assert field.contents() == [5, 70000]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert any("one token before" in note for note in result.notes)
    convert(tmp_path / "a.gguf", tmp_path / "out", "peft")
    assert read_adapter(tmp_path / "out").config.alora_invocation_tokens == [5, 70000]
    with pytest.raises(ConvertError, match=r"alora_invocation_tokens=.*mlx"):
        convert(source, tmp_path / "mlx", "mlx")
