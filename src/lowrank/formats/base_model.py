"""What a conversion has to know of the base: its config.json."""

from pathlib import Path
from typing import Any, NamedTuple

from lowrank.config import LoraConfig
from lowrank.errors import AdapterFileError, ConvertError
from lowrank.hub import adapter_file

_LLAMA = (
    *(f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
    *("model.embed_tokens", "lm_head"),
)
_MOE = (
    *(path for path in _LLAMA if ".mlp." not in path),
    *("model.layers.{}.block_sparse_moe.gate", "model.layers.{}.mlp.gate"),
    *(f"model.layers.{{}}.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
    "model.layers.{}.mlp.shared_expert_gate",
    *(f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_GPT_OSS = (*(path for path in _LLAMA if ".mlp." not in path), "model.layers.{}.mlp.router")
_PHI3 = (
    *("model.layers.{}.self_attn.qkv_proj", "model.layers.{}.self_attn.o_proj"),
    *("model.layers.{}.mlp.gate_up_proj", "model.layers.{}.mlp.down_proj"),
    *("model.embed_tokens", "lm_head"),
)
_GPT2 = (
    *("transformer.h.{}.attn.c_attn", "transformer.h.{}.attn.c_proj"),
    *("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
    *("transformer.wte", "lm_head"),
)


class Architecture(NamedTuple):
    """How llama.cpp holds the models of one model_type."""

    gguf: str  # its name there
    modules: tuple[str, ...] = (
        _LLAMA  # the paths that can be adapted, {} for the number of the layer
    )
    rotary: bool = False  # rows of q_proj and k_proj are reordered for its rotary embedding
    tied: bool = False  # what a config.json means that does not say
    transposed: bool = False  # transformers' Conv1D: fan_in_fan_out
    experts: bool = False  # several of each MLP, in one tensor
    interleaved: bool = False  # gate's and up's rows by turns, not one after the other


ARCHITECTURES = {
    "llama": Architecture("llama", rotary=True),
    "mistral": Architecture("llama", rotary=True),
    "mixtral": Architecture("llama", _MOE, rotary=True, experts=True),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe", _MOE, experts=True),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", _MOE, experts=True),
    "gemma": Architecture("gemma", tied=True),
    "gemma2": Architecture("gemma2", tied=True),
    "gemma3_text": Architecture("gemma3", tied=True),
    "gpt_oss": Architecture("gpt-oss", _GPT_OSS, experts=True, interleaved=True),
    "phi3": Architecture("phi3", _PHI3),
    "gpt2": Architecture("gpt2", _GPT2, tied=True, transposed=True),
}


def read_config(base: str | None, what_for: str) -> dict[str, Any]:
    """The base's config.json. Raises ConvertError, saying what it is needed for, if there is none."""
    if not base:
        raise ConvertError(
            f"The base's config.json says {what_for}: give its folder or name on the Hub as base= (--base)."
        )
    try:
        path = adapter_file(base, "config.json")
    except AdapterFileError as error:
        raise ConvertError(f"The base's config.json says {what_for}. {error}") from error
    assert path is not None
    return LoraConfig.from_json_file(Path(path))


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the input embedding is the output head as well."""
    row = ARCHITECTURES.get(config.get("model_type", ""))
    return bool(config.get("tie_word_embeddings", row.tied if row else True))
