"""What diffusers' users do with LoRA, on pipelines of a few thousand weights; written against `import peft`.

Run as a program it saves what came out, so that the same steps can be compared under PEFT and under lowrank:

    python tests/compat/diffusion.py sd|sdxl|flux folder
"""

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

PROMPT = "a small red house"
UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<|endoftext|>", "<|startoftext|>", "[UNK]", *PROMPT.split()]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", 0)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="[UNK]",
        model_max_length=16,
    )


def text_encoder(width: int = 24, cls=CLIPTextModel):
    config = CLIPTextConfig(
        vocab_size=16,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
        hidden_act="gelu",
    )
    return cls(config)


def vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        shift_factor=0.0,
        sample_size=16,
    )


def unet(cross: int, **more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        **more,
    )


def sd(scheduler=DDIMScheduler) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(24, attention_head_dim=4),
        scheduler=scheduler(beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(24),
        text_encoder_2=text_encoder(40, CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=88,
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
    )


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=16, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, is_gated_act=False
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(1),
        text_encoder=text_encoder(32),
        tokenizer=tokenizer(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def image(pipe, **more) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()  # built from a configuration, it is in training mode
    found = pipe(
        PROMPT,
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(7),
        **{"output_type": "pt", **more},
    )
    return found.images


def adapt(module, targets, seed: int, r: int = 3, alpha: float = 5, name: str = "default") -> dict:
    """An adapter that is not where it started; returns its tensors under PEFT's keys."""
    module.add_adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets), name)
    generator = torch.Generator().manual_seed(seed)
    tensors = get_peft_model_state_dict(module, adapter_name=name)
    tensors = {
        key: torch.randn(tensors[key].shape, generator=generator) * 0.3 for key in sorted(tensors)
    }
    set_peft_model_state_dict(module, tensors, adapter_name=name)
    return tensors


TARGETS = {
    "unet": UNET_TARGETS,
    "transformer": ["to_k", "to_q", "to_out.0", "proj_mlp"],
    "text_encoder": TEXT_TARGETS,
    "text_encoder_2": TEXT_TARGETS,
}


def lora_files(pipe, folder: Path, parts=tuple(TARGETS), **more) -> Path:
    """Writes a LoRA for the pipeline's parts, as diffusers' training scripts do."""
    layers, configs = {}, {}
    for seed, part in enumerate(parts):
        module = getattr(pipe, part, None)
        if module is None or isinstance(module, T5EncoderModel):
            continue
        found = adapt(module, TARGETS[part], seed, **more)
        flux = part == "transformer"
        layers[f"{part}_lora_layers"] = found if flux else convert_state_dict_to_diffusers(found)
        configs[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    pipe.save_lora_weights(folder, **layers, **configs)
    return folder


def main(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    make = {"sd": sd, "sdxl": sdxl, "flux": flux}[kind]
    part = "transformer" if kind == "flux" else "unet"
    trained = make()
    out = {"base": image(trained)}
    lora_files(trained, folder / "one")
    out["as trained"] = image(trained)
    second = make()
    lora_files(second, folder / "two", r=2, alpha=7)

    pipe = make()
    pipe.load_lora_weights(folder / "one", adapter_name="one")
    out["loaded"] = image(pipe)
    pipe.load_lora_weights(folder / "two", adapter_name="two")
    out["second"] = image(pipe)
    pipe.set_adapters(["one", "two"], adapter_weights=[0.7, 0.4])
    out["both"] = image(pipe)
    assert pipe.get_active_adapters() == ["one", "two"]
    if kind == "sd":
        scales = {"unet": {"down": 0.2, "up": {"block_0": 0.9}}, "text_encoder": 0.5}
        pipe.set_adapters("one", adapter_weights=scales)
        out["by blocks"] = image(pipe)
    pipe.set_adapters("one", adapter_weights=1.0)
    scale = "joint_attention_kwargs" if kind == "flux" else "cross_attention_kwargs"
    out["half"] = image(pipe, **{scale: {"scale": 0.5}})
    out["whole again"] = image(pipe)
    pipe.disable_lora()
    out["disabled"] = image(pipe)
    pipe.enable_lora()
    out["enabled"] = image(pipe)
    names = [part, "text_encoder"] + ["text_encoder_2"] * (kind == "sdxl")
    pipe.fuse_lora(components=names, lora_scale=0.8, adapter_names=["one"])
    out["fused"] = image(pipe)
    pipe.unfuse_lora(components=names)
    out["unfused"] = image(pipe)
    pipe.delete_adapters("one")
    pipe.set_adapters("two")
    out["after delete"] = image(pipe)
    pipe.unload_lora_weights()
    out["unloaded"] = image(pipe)

    alone = make()
    lora_files(alone, folder / "alone", parts=(part,))
    out[f"saved {part} alone"] = image(alone)
    pipe.load_lora_weights(folder / "alone")
    out[f"saved {part} alone, reloaded"] = image(pipe)
    for key, tensor in getattr(trained, part).state_dict().items():
        if "lora" in key:
            out[f"state {key}"] = tensor
    return out


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.save(main(kind, folder), folder / "found.pt")
