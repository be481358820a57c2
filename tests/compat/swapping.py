"""diffusers' hotswap and layerwise casting, on the pipelines of diffusion.py; written against `import peft`.

python tests/compat/swapping.py folder
"""

import sys
from contextlib import suppress
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from diffusion import UNET_TARGETS, adapt, image, sd


def files(folder: Path) -> tuple[Path, Path]:
    """Two LoRAs for the U-Net, of different ranks, alphas and layers."""
    made = []
    for name, seed, targets, r, alpha in (
        ("one", 0, UNET_TARGETS, 3, 5),
        ("two", 1, UNET_TARGETS[:2], 2, 7),
    ):
        pipe = sd()
        layers = convert_state_dict_to_diffusers(adapt(pipe.unet, targets, seed, r=r, alpha=alpha))
        config = pipe.unet.peft_config["default"].to_dict()
        pipe.save_lora_weights(
            folder / name, unet_lora_layers=layers, unet_lora_adapter_metadata=config
        )
        made.append(folder / name)
    return made[0], made[1]


def latents(pipe) -> torch.Tensor:
    return image(pipe, output_type="latent").float()


def main(folder: Path) -> dict[str, torch.Tensor]:
    one, two = files(folder)
    out = {}
    pipe = sd()
    pipe.enable_lora_hotswap(target_rank=5)
    pipe.load_lora_weights(one, adapter_name="it")
    out["first"] = image(pipe)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    whole = pipe.unet
    pipe.unet = torch.compile(whole, backend=counted)
    out["first, compiled"] = image(pipe)
    compiled = len(graphs)
    pipe.load_lora_weights(two, adapter_name="it", hotswap=True)
    out["second, compiled"] = image(pipe)
    out["compiled again"] = torch.tensor(len(graphs) - compiled)
    pipe.unet = whole
    out["second"] = image(pipe)
    pipe.load_lora_weights(one, adapter_name="it", hotswap=True)
    out["first again"] = image(pipe)
    pipe.set_adapters("it", adapter_weights=0.5)
    out["half"] = image(pipe)
    pipe.unload_lora_weights()
    out["unloaded"] = image(pipe)
    pipe.load_lora_weights(two, adapter_name="it")
    out["second, loaded"] = image(pipe)

    for order in ("loaded, then cast", "cast, then loaded"):
        pipe = sd()
        pipe.unet.to(torch.bfloat16), pipe.text_encoder.to(torch.bfloat16)
        if order == "loaded, then cast":
            pipe.load_lora_weights(one)
            out["in bfloat16"] = latents(pipe)
        pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        if order == "cast, then loaded":
            out["cast"] = latents(pipe)
            pipe.load_lora_weights(one)
        with suppress(NotImplementedError):  # PEFT's own factors are left in 8 bits, and not run
            out[order] = latents(pipe)
            out[f"{order}, again"] = latents(pipe)
    return out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.save(main(folder), folder / "found.pt")
