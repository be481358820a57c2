"""What is converted, read by PEFT and by diffusers; what diffusers writes, converted."""

import json

import pytest
import torch
from tiny import IDS, gpt2, llama, merged_by_hand
from torch import nn

import lowrank
from lowrank import Adapter, LoraConfig, read_adapter, write_adapter
from lowrank.formats import convert, kohya

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # diffusers' and PEFT's own
]

PREFIX = "base_model.model."
OPTIONS = {
    "plain": {"lora_alpha": 2},
    "mixed": {
        "use_rslora": True,
        "rank_pattern": {"to_q": 3, "q_proj": 2},
        "alpha_pattern": {"proj_in": 1, "fc1": 9},
    },
}


def write(folder, model, endings, **fields):
    """A random adapter for the linear layers and convolutions of `model` whose paths end so."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(endings), **fields})
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and path.endswith(endings):
            last = path.rpartition(".")[2]
            r = config.rank_pattern.get(last, config.r)
            out, in_, *kernel = module.weight.shape
            at = f"{PREFIX}{path}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(r, in_, *kernel)
            tensors[f"{at}.lora_B.weight"] = torch.randn(out, r, *[1] * len(kernel))
            if config.use_dora:
                shape = (1, out, 1, 1) if kernel else (out,)
                tensors[f"{at}.lora_magnitude_vector"] = torch.rand(shape) + 0.5
            if config.lora_bias:
                tensors[f"{at}.lora_B.bias"] = torch.randn(out)
    write_adapter(folder, Adapter(config, tensors, {}))
    return folder


def deltas(folder):
    """ΔW by path in float64, from PEFT's files."""
    adapter = read_adapter(folder)
    config, found = adapter.config, {}
    for key, A in adapter.tensors.items():
        if key.endswith("lora_A.weight"):
            path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            last = path.rpartition(".")[2]
            r = config.rank_pattern.get(last, config.r)
            alpha = config.alpha_pattern.get(last, config.lora_alpha)
            assert r == len(A)
            B = adapter.tensors[key.replace("lora_A", "lora_B")]
            scaling = alpha / (r**0.5 if config.use_rslora else r)
            found[path] = scaling * B.double().flatten(1) @ A.double().flatten(1)
    return found


def loaded(model):
    """ΔW by path in float64, from PEFT's layers in the model."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            (name,) = layer.lora_A
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            found[path] = layer.scaling[name] * B.double().flatten(1) @ A.double().flatten(1)
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], rtol=0, atol=1e-5, msg=path)


# --- pipelines ------------------------------------------------------------------------------------


def text_encoder(kind):
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=10,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return kind(config)


def pipeline(xl):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    sdxl = {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 34,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        norm_num_groups=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **(sdxl if xl else {}),
    )
    parts = {
        "unet": unet,
        "vae": diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=4),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        "text_encoder": text_encoder(CLIPTextModel),
        "tokenizer": None,
    }
    if xl:
        second = text_encoder(CLIPTextModelWithProjection)
        return diffusers.StableDiffusionXLPipeline(text_encoder_2=second, tokenizer_2=None, **parts)
    return diffusers.StableDiffusionPipeline(
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    )


MODULES = {
    "unet": ("to_q", "to_out.0", "ff.net.0.proj", "conv1", "proj_in", "time_emb_proj"),
    "text_encoder": ("q_proj", "out_proj", "fc1"),
    "text_encoder_2": ("v_proj", "out_proj", "fc2"),
}


def write_parts(folder, pipe, **fields):
    names = [name for name in MODULES if hasattr(pipe, name)]
    return {
        name: write(folder / name, getattr(pipe, name), MODULES[name], **fields) for name in names
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_diffusers_reads_its_format(tmp_path, xl, options):
    parts = write_parts(tmp_path / "in", pipeline(xl), **options)
    convert(tmp_path / "in", tmp_path / "out", "diffusers")
    pipe = pipeline(xl)
    pipe.load_lora_weights(str(tmp_path / "out"))
    for name, folder in parts.items():
        assert_same(loaded(getattr(pipe, name)), deltas(folder))


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"lora_bias": True}], ids=lambda f: next(iter(f))
)
def test_diffusers_reads_dora_and_biases(tmp_path, fields):
    parts = write_parts(tmp_path / "in", pipeline(False), **fields)
    convert(tmp_path / "in", tmp_path / "out", "diffusers")
    pipe = pipeline(False)
    pipe.load_lora_weights(str(tmp_path / "out"))
    for name, folder in parts.items():
        state = {
            key.replace(".default_0", ""): tensor
            for key, tensor in getattr(pipe, name).state_dict().items()
            if ".lora_" in key
        }
        wanted = read_adapter(folder).tensors
        wanted = {
            key.removeprefix(PREFIX) + ".weight" * key.endswith("magnitude_vector"): tensor
            for key, tensor in wanted.items()
        }
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_diffusers_reads_kohya_s_format(tmp_path, xl):
    """One alpha for each component: see the next test."""
    pipe = pipeline(xl)
    parts = write_parts(tmp_path / "in", pipe, lora_alpha=2)
    result = convert(tmp_path / "in", tmp_path / "out.safetensors", "kohya")
    assert result.notes == []
    pipe.load_lora_weights(str(tmp_path / "out.safetensors"))
    for name, folder in parts.items():
        assert_same(loaded(getattr(pipe, name)), deltas(folder))


def test_diffusers_reads_only_one_alpha_of_attention_from_kohya_s_format(tmp_path):
    """Why there is a note: when diffusers has learnt it, the note can go."""
    pipe = pipeline(False)
    folder = write(
        tmp_path / "in" / "unet", pipe.unet, ("to_q", "conv1"), alpha_pattern={"to_q": 1}
    )
    result = convert(tmp_path / "in", tmp_path / "out.safetensors", "kohya")
    assert "one alpha" in result.notes[0]
    pipe.load_lora_weights(str(tmp_path / "out.safetensors"))
    found, wanted = loaded(pipe.unet), deltas(folder)
    same = {path: torch.allclose(found[path], wanted[path], atol=1e-5) for path in wanted}
    assert {path.rpartition(".")[2] for path, is_same in same.items() if is_same} == {"conv1"}


@pytest.mark.parametrize("with_metadata", [True, False])
def test_what_diffusers_saves_is_read(tmp_path, with_metadata):
    """As its training scripts save; without the configuration alpha is r, by its own rule."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe, layers, wanted = pipeline(False), {}, {}
    for name in ("unet", "text_encoder"):
        model = getattr(pipe, name)
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=list(MODULES[name]), init_lora_weights=False
        )
        model.add_adapter(config)
        state = peft.get_peft_model_state_dict(model, adapter_name="default")
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state)
        wanted[name] = {p: d if with_metadata else d * 4 / 6 for p, d in loaded(model).items()}
    said = _collate_lora_metadata({n: getattr(pipe, n) for n in wanted}) if with_metadata else {}
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "in", **layers, **said)
    convert(tmp_path / "in", tmp_path / "out", "peft")
    for name in wanted:
        assert_same(deltas(tmp_path / "out" / name), wanted[name])


def flux_pipeline():
    from transformers import CLIPTextModel

    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=6,
        num_attention_heads=2,
        joint_attention_dim=7,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 2),
    )
    rest = dict.fromkeys(("tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxPipeline(
        transformer=transformer,
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=text_encoder(CLIPTextModel),
        **rest,
    )


FLUX = (
    "transformer_blocks.1.attn.to_q",
    "transformer_blocks.1.attn.to_v",
    "to_add_out",
    "ff.net.2",
)


@pytest.mark.parametrize("ends", [(), ("x_embedder", "context_embedder", "norm_out.linear")])
def test_diffusers_reads_flux_from_kohya_s_format(tmp_path, ends):
    """But for what lies outside of the blocks, which it does not load: when it has learnt it, the note can go."""
    pipe = flux_pipeline()
    parts = {
        "transformer": write(tmp_path / "in/transformer", pipe.transformer, FLUX + ends),
        "text_encoder": write(tmp_path / "in/text_encoder", pipe.text_encoder, ("out_proj", "fc1")),
    }
    result = convert(tmp_path / "in", tmp_path / "a.safetensors", "kohya")
    assert any("outside of the blocks" in note for note in result.notes) == bool(ends)
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
    wanted = deltas(parts["transformer"])
    found = {path: delta for path, delta in loaded(pipe.transformer).items() if delta.any()}
    assert_same(found, {path: delta for path, delta in wanted.items() if path not in ends})
    assert_same(loaded(pipe.text_encoder), deltas(parts["text_encoder"]))


def test_diffusers_splits_flux_s_linear1_as_we_fuse_it(tmp_path):
    """Of Flux's own size: diffusers knows no other. The state dict alone, no model."""
    at, width = "single_transformer_blocks.3", 3072
    shapes = {"attn.to_q": width, "attn.to_v": width, "proj_mlp": 4 * width}
    tensors = {}
    for name, out in shapes.items():
        tensors[f"{PREFIX}{at}.{name}.lora_A.weight"] = torch.randn(3, width)
        tensors[f"{PREFIX}{at}.{name}.lora_B.weight"] = torch.randn(out, 3)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=list(shapes))
    write_adapter(tmp_path / "in", Adapter(config, tensors, {}))
    convert(tmp_path / "in", tmp_path / "a.safetensors", "kohya", component="transformer")
    found = diffusers.FluxPipeline.lora_state_dict(str(tmp_path / "a.safetensors"))
    for name in shapes:
        A, B = (found[f"transformer.{at}.{name}.lora_{factor}.weight"].double() for factor in "AB")
        a, b = (tensors[f"{PREFIX}{at}.{name}.lora_{factor}.weight"].double() for factor in "AB")
        wanted = 7 / 3 * b[::101] @ a  # some of the rows
        torch.testing.assert_close(B[::101] @ A, wanted, rtol=0, atol=1e-4)
    assert not found[f"transformer.{at}.attn.to_k.lora_B.weight"].any()


def test_kohya_names_of_every_layer_in_sd_and_sdxl():
    """Every linear and convolution of the two layouts keeps its name, there and back."""
    for xl in (False, True):
        pipe = pipeline(xl)
        for component, words in {"unet": kohya._UNET, "text_encoder": kohya._TEXT}.items():
            names = [
                name
                for name, module in getattr(pipe, component).named_modules()
                if isinstance(module, nn.Linear | nn.Conv2d)
                if not name.startswith("embeddings")
            ]
            assert len(names) > 10
            for name in names:
                assert kohya.dotted(name.replace(".", "_"), words) == name


# --- language models ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlx", "gguf"])
def test_peft_reads_what_comes_back(tmp_path, kind):
    """Adapter → MLX or GGUF → PEFT's folder: the logits of W + ΔW worked out by hand."""
    base = llama()
    base.config.save_pretrained(tmp_path / "base")
    endings = ("q_proj", "k_proj", "down_proj")
    folder = write(tmp_path / "in", base, endings, rank_pattern={"k_proj": 2})
    path = tmp_path / ("a.gguf" if kind == "gguf" else "mlx")
    convert(folder, path, kind, base=str(tmp_path / "base"))
    convert(path, tmp_path / "out", "peft", base=str(tmp_path / "base"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    by_hand = llama()
    for name, delta in deltas(folder).items():
        weight = by_hand.get_submodule(name).weight
        weight.data = (weight.double() + delta).to(weight)
    wanted = by_hand(IDS).logits
    for library in (peft, lowrank):
        model = library.PeftModel.from_pretrained(llama(), str(tmp_path / "out")).eval()
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_peft_reads_gpt2_s_transposed_layers(tmp_path):
    base = gpt2()
    base.config.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = lowrank.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "a.gguf", "gguf", base=str(tmp_path / "base"))
    convert(tmp_path / "a.gguf", tmp_path / "out", "peft")
    again = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path / "out")).eval()
    wanted = merged_by_hand(gpt2(), read_adapter(tmp_path / "in").tensors, 5 / 3)
    torch.testing.assert_close(again(IDS).logits, wanted(IDS).logits, rtol=1e-5, atol=1e-5)
