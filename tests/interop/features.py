"""What lowrank and PEFT both have, feature by feature: a model, its input, fields of the configuration."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
import transformers
from tiny import IDS, bert, gpt2, llama, llama_classifier, t5
from torch import Tensor, nn


@dataclass
class Feature:
    build: Callable[[], nn.Module]
    fields: dict[str, Any] = field(default_factory=dict)
    x: Tensor = field(default_factory=lambda: IDS)
    # whose merged model gives what the adapter gives; the others' gives an error, or something else
    merges: tuple[str, ...] = ("lowrank", "peft")


class Convolutions(nn.Module):
    """(batch, 3, 9, 8) -> (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        # PEFT's conv layers know neither dilation nor padding_mode nor (in part) groups
        self.conv = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).flatten(2)
        return self.head(torch.tanh(self.line(x)).mean(-1))


class Cube(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 5, (3, 2, 1), stride=(1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Attention(nn.Module):
    """(batch, sequence, 12) -> the same, through torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.linear = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


def plain(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return kind().double().eval()

    return build


def tied() -> nn.Module:
    return llama(tied=True)


def with_biases() -> nn.Module:
    return llama(attention_bias=True)


def classifier() -> nn.Module:
    return bert(transformers.BertForSequenceClassification)


def token_classifier() -> nn.Module:
    return bert(transformers.BertForTokenClassification)


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output for x, or its logits for token ids x."""
    if x.dtype != torch.int64:
        return model(x=x)
    decoder = {"decoder_input_ids": x.flip(0)} if model.config.is_encoder_decoder else {}
    return model(input_ids=x, **decoder).logits


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The same without a gradient."""
    with torch.no_grad():
        return forward(model, x)


def on(*names: str, **fields: Any) -> dict[str, Any]:
    return {"target_modules": list(names), **fields}


QV = ("q_proj", "v_proj")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
PICTURES, VOLUMES, SEQUENCES = numbers(2, 3, 9, 8), numbers(2, 2, 4, 5, 3), numbers(2, 6, 12)


def tokens(build: Callable[[], nn.Module], rows: Any, **options: Any) -> Feature:
    return Feature(build, on("q_proj", trainable_token_indices=rows), **options)


FEATURES: dict[str, Feature] = {
    # --- which layers
    "linear": Feature(llama, on(*QV, "down_proj")),
    "all-linear": Feature(llama, {"target_modules": "all-linear"}),
    "all-linear, tied": Feature(tied, {"target_modules": "all-linear"}),
    "by architecture": Feature(llama),
    "expression": Feature(llama, {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
    "some layers": Feature(llama, on("q_proj", layers_to_transform=[1])),
    "one layer": Feature(llama, on("q_proj", layers_to_transform=1, layers_pattern="layers")),
    "all but some": Feature(
        llama,
        {
            "target_modules": "all-linear",
            "exclude_modules": ["down_proj", "layers.1.self_attn.o_proj"],
        },
    ),
    "expressions for and against": Feature(
        llama, {"target_modules": r".*\.(q|v|up)_proj", "exclude_modules": r".*layers\.1\..*"}
    ),
    "encoder": Feature(bert, on("query", "dense")),
    "encoder and decoder": Feature(t5, on("q", "v", "wo", "wi", task_type="SEQ_2_SEQ_LM")),
    # --- kinds of layers
    "Conv1D": Feature(gpt2, on("c_attn", "c_proj", fan_in_fan_out=True)),
    "Conv1D, dora": Feature(gpt2, on("c_attn", use_dora=True, fan_in_fan_out=True)),
    "embedding": Feature(gpt2, on("wpe", "c_attn", fan_in_fan_out=True)),
    "embedding, dora": Feature(gpt2, on("wpe", use_dora=True)),
    "word embedding": Feature(llama, on("embed_tokens", "q_proj")),
    "lm_head": Feature(llama, on("lm_head", "q_proj")),
    # PEFT merges into the one weight of both
    "lm_head, tied": Feature(tied, on("lm_head"), merges=("lowrank",)),
    "both of a tied pair": Feature(
        tied, on("embed_tokens", "lm_head", "v_proj"), merges=("lowrank",)
    ),
    "convolutions": Feature(plain(Convolutions), on("conv", "line", "head"), PICTURES),
    "convolutions, dora": Feature(plain(Convolutions), on("conv", "head", use_dora=True), PICTURES),
    "convolution in three dimensions": Feature(plain(Cube), on("conv"), VOLUMES),
    # --- methods
    "rslora": Feature(llama, on("q_proj", use_rslora=True)),
    "dora": Feature(llama, on(*QV, use_dora=True)),
    "dora and rslora": Feature(llama, on(*QV, use_dora=True, use_rslora=True)),
    "patterns": Feature(
        llama,
        on(
            *QV,
            rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 5},
            alpha_pattern={"q_proj": 11},
        ),
    ),
    "patterns by suffix, path and expression": Feature(
        llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, r"layers\.1\..*": 2, "v_proj": 4},
            "alpha_pattern": {"v_proj": 11, r"model\.layers\.0\.mlp\.(up|down)_proj": 7},
        },
    ),
    "a pattern from the path's first name": Feature(
        llama, on("q_proj", rank_pattern={"^model.layers.1.self_attn.q_proj": 6})
    ),
    "lora_bias": Feature(with_biases, on(*QV, lora_bias=True)),
    # which a merged model has no place for
    "lora_bias without a bias": Feature(
        llama, on("q_proj", lora_bias=True), merges=()
    ),
    "lora_bias, rslora": Feature(
        bert, on("query", "intermediate.dense", lora_bias=True, use_rslora=True)
    ),
    "lora_bias on Conv1D, ranks by layer": Feature(
        gpt2,
        on(
            "c_attn",
            "mlp.c_proj",
            lora_bias=True,
            fan_in_fan_out=True,
            rank_pattern={"h.1.attn.c_attn": 2},
        ),
    ),
    "bias lora_only": Feature(
        gpt2, on("c_attn", "c_fc", bias="lora_only", fan_in_fan_out=True)
    ),
    "bias all": Feature(bert, on("query", bias="all")),
    "bias all, saved head": Feature(classifier, on("query", bias="all", task_type="SEQ_CLS")),
    "gaussian": Feature(llama, on(*QV, init_lora_weights="gaussian")),
    "orthogonal": Feature(llama, on(*QV, init_lora_weights="orthogonal", r=4)),
    "activated": Feature(
        llama, on(*QV, alora_invocation_tokens=[9], task_type="CAUSAL_LM"), merges=()
    ),
    # PEFT merges into copies that share their weights
    "layers replicated": Feature(
        llama, on(*QV, layer_replication=[[0, 2], [1, 2]]), merges=("lowrank",)
    ),
    # --- modules saved whole
    "modules_to_save": Feature(llama, on("q_proj", modules_to_save=["lm_head", "norm"])),
    "embedding saved": Feature(llama, on("q_proj", modules_to_save=["embed_tokens", "lm_head"])),
    "both of a tied pair saved": Feature(
        tied, on("q_proj", modules_to_save=["lm_head", "embed_tokens"])
    ),
    "one of a tied pair saved": Feature(tied, on("q_proj", modules_to_save=["lm_head"])),
    "a block saved": Feature(
        llama, on(*QV, modules_to_save=["layers.1.mlp", "model.norm"])
    ),
    "sequence classification": Feature(llama_classifier, on("q_proj", task_type="SEQ_CLS")),
    "sequence classification, head named": Feature(
        llama_classifier, on("q_proj", task_type="SEQ_CLS", modules_to_save=["score"])
    ),
    "sequence classification, another module": Feature(
        classifier, on("query", task_type="SEQ_CLS", modules_to_save=["pooler.dense"])
    ),
    "token classification": Feature(token_classifier, on("query", task_type="TOKEN_CLS")),
    # --- rows of embeddings
    "tokens": tokens(llama, [9, 4, 71]),
    "tokens, tied": tokens(tied, [9, 4, 71]),
    "tokens by name, tied": tokens(tied, {"embed_tokens": [9, 4, 71]}),
    "tokens of both, tied": tokens(tied, {"embed_tokens": [9, 4], "lm_head": [9, 4]}),
    "tokens of both apart, tied": tokens(
        tied, {"embed_tokens": [9, 4], "lm_head": [71, 4, 3]}, merges=("lowrank",)
    ),
    "tokens of both": tokens(llama, {"model.embed_tokens": [9, 4], "lm_head": [71, 4, 3]}),
    "tokens of the head": tokens(llama, {"lm_head": [71, 4, 3]}),
    # --- parameters
    "experts": Feature(tiny.mixtral, on(target_parameters=EXPERTS)),
    "experts, one of two": Feature(tiny.mixtral, on(target_parameters=EXPERTS[1:])),
    "experts, layers and other parameters": Feature(
        tiny.mixtral,
        on(
            "q_proj",
            target_parameters=["gate.weight", *EXPERTS, "k_proj.weight"],
            use_rslora=True,
            rank_pattern={"experts.gate_up_proj": 2},
            alpha_pattern={"experts.down_proj": 7},
        ),
    ),
    "experts beside ordinary layers": Feature(tiny.qwen3_moe, on(target_parameters=EXPERTS)),
    "transposed experts": Feature(tiny.gpt_oss, on(target_parameters=EXPERTS)),
    "transposed experts that do not say so": Feature(
        tiny.llama4, on(target_parameters=EXPERTS)
    ),
}  # fmt: skip
