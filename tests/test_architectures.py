"""What is known of single architectures: the default targets are there, and are PEFT's where it has some."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowrank.architectures import BYPASSED, DEFAULT_TARGETS
from lowrank.config import LoraConfig
from lowrank.errors import TargetError
from lowrank.inject import inject
from lowrank.targets import plan
from lowrank.wrappers import adapter_parameters, lora_layers

# transformers has their code on the hub only
ON_THE_HUB = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "nezha", "rwkv7"}
# needs timm for its vision tower
NOT_BUILT = {"gemma3n"}

# what a configuration must be given to be built, beside fewer layers
OPTIONS = {
    "esm": {"vocab_size": 33},
    "hunyuan_v1_dense": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
}
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
CLASSES = (
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_MASKED_LM_MAPPING,
    auto.MODEL_MAPPING,
)


def shortened(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    for name in LAYERS:
        if isinstance(vars(config).get(name), int):
            setattr(config, name, 2)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(vars(config).get(name), int):
            setattr(config, name, 4)
    if vars(config).get("layer_types"):
        config.layer_types = config.layer_types[:2]
    for part in list(vars(config).values()):
        if isinstance(part, transformers.PretrainedConfig):
            shortened(part)
    return config


def built(model_type: str) -> nn.Module:
    """The model of the architecture's default configuration, with two layers, on the meta device."""
    config = shortened(CONFIG_MAPPING[model_type]())
    for name, value in OPTIONS.get(model_type, {}).items():
        setattr(config, name, value)
    found = next(mapping[type(config)] for mapping in CLASSES if type(config) in mapping)
    with torch.device("meta"):
        return (found[0] if isinstance(found, tuple) else found)(config)


@pytest.mark.parametrize("model_type", sorted(set(DEFAULT_TARGETS) - ON_THE_HUB - NOT_BUILT))
def test_the_default_targets_are_there(model_type):
    try:
        model = built(model_type)
    except Exception as error:
        pytest.fail(f"could not be built: {type(error).__name__}: {error}")
    names = DEFAULT_TARGETS[model_type]
    targets = plan(model, LoraConfig())
    assert targets
    if isinstance(names, tuple):
        assert {t.path.rpartition(".")[2] for t in targets} <= set(names)
    assert all(t.kind.op is not None for t in targets)  # and the fast way


def test_the_others_are_not_in_transformers():
    assert not ON_THE_HUB & set(CONFIG_MAPPING)


@pytest.mark.interop
def test_the_defaults_are_pefts_where_it_has_some():
    pytest.importorskip("peft")
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    for model_type, names in theirs.items():
        ours = DEFAULT_TARGETS[model_type]
        assert (ours if isinstance(names, str) else set(ours)) == (
            names if isinstance(names, str) else set(names)
        ), model_type


@pytest.mark.interop
@pytest.mark.parametrize("model_type", sorted(BYPASSED))
def test_what_is_bypassed_is_what_peft_refuses(model_type):
    pytest.importorskip("peft")
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check

    class Model:
        class config:
            pass

    Model.config.model_type = model_type

    class Config:
        peft_type = "LORA"

    for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d"):
        if name in BYPASSED[model_type]:
            with pytest.raises(ValueError, match="incompatible"):
                check(Config, Model, name)
        else:
            check(Config, Model, name)


# --- layers whose weight is taken -----------------------------------------------------------------


def adapt(model: nn.Module, **config) -> None:
    config = LoraConfig(r=3, lora_alpha=5, **config)
    inject(model, plan(model, config), "default")
    for _, parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    for _, layer in lora_layers(model):
        layer.set_adapter("default")


def by_hand(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the base with W + 5/3·B·A for each adapter, in float64."""
    state = {
        k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k
    }
    for path, layer in lora_layers(model):
        lora = layer.lora("default")
        W = state[f"{path}.weight"]
        state[f"{path}.weight"] = W + 5 / 3 * (lora.B.double() @ lora.A.double()).view_as(W)
    return state


def check_exact(build, targets: list[str], inputs: dict) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    adapt(model, target_modules=targets)
    merged = build().double().eval()
    merged.load_state_dict(by_hand(model))
    expected = merged(**inputs)[0]
    assert not torch.allclose(expected, build_base(model, build)(**inputs)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-9, atol=1e-9)
    model(**inputs)[0].square().sum().backward()
    without = [k for k, p in adapter_parameters(model) if p.grad is None or not p.grad.any()]
    assert not without, "these learn nothing"


def build_base(model: nn.Module, build) -> nn.Module:
    base = build().double().eval()
    base.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    )
    return base


def test_wavlm_computes_with_the_weights_of_its_projections():
    """F.multi_head_attention_forward takes them; none of the four layers is ever called."""

    def build():
        return transformers.WavLMModel(
            transformers.WavLMConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=20,
                conv_dim=(8, 8),
                conv_stride=(4, 2),
                conv_kernel=(8, 3),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                num_feat_extract_layers=2,
                layerdrop=0.0,
            )
        )

    inputs = {"input_values": torch.randn(2, 200, dtype=torch.double)}
    check_exact(build, ["q_proj", "k_proj", "v_proj", "out_proj"], inputs)


@pytest.mark.parametrize("targets", [["dt_proj"], ["x_proj", "in_proj", "dt_proj"]])
def test_mamba_computes_with_the_weight_of_dt_proj(targets):
    def build():
        return transformers.MambaForCausalLM(
            transformers.MambaConfig(
                vocab_size=31,
                hidden_size=12,
                state_size=3,
                num_hidden_layers=2,
                time_step_rank=2,
                initializer_range=0.5,
            )
        )

    check_exact(build, targets, {"input_ids": torch.tensor([[3, 7, 1, 30, 2]])})


SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
}


@pytest.mark.parametrize(
    ("model_type", "options", "targets"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, ["conv.conv", "in_proj"]),
        (
            "qwen3_next",
            {
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 4,
                "linear_value_head_dim": 4,
                "mlp_only_layers": [0, 1],
                "head_dim": 8,
            },
            ["conv1d", "out_proj"],
        ),
        (
            "jamba",
            {
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 3,
                "expert_layer_offset": 2,
                "mamba_dt_rank": 2,
                "mamba_d_state": 3,
                "use_mamba_kernels": False,
            },
            ["conv1d", "dt_proj", "out_proj"],
        ),
    ],
)
def test_short_convolutions_are_computed_with_their_weight(model_type, options, targets):
    def build():
        config = CONFIG_MAPPING[model_type](**SMALL, **options, initializer_range=0.5)
        return auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)

    check_exact(build, targets, {"input_ids": torch.tensor([[3, 7, 1, 30, 2]])})


def test_dropout_is_refused_where_the_weight_is_taken():
    model = built("wavlm")
    with pytest.raises(
        TargetError, match=r"wavlm computes with this layer's weight.*lora_dropout=0"
    ):
        plan(model, LoraConfig(lora_dropout=0.1))
    assert plan(model, LoraConfig(target_modules=["intermediate_dense"], lora_dropout=0.1))


def test_each_part_of_a_composite_model_is_known_by_its_own_name():
    """The text model inside a vision-language model has its own model_type, and so has the vision tower."""
    text = transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])
    model, tower = nn.Module(), nn.Module()
    model.config, tower.config = transformers.PretrainedConfig(), transformers.SiglipVisionConfig()
    with torch.device("meta"):
        model.language_model = transformers.Lfm2Model(text)
        tower.conv = nn.Conv1d(3, 4, 5)
        tower.out_proj = nn.Linear(3, 4)
    model.tower = tower
    found = plan(model, LoraConfig(target_modules=["conv.conv", "tower.conv"]))
    assert {t.path: t.kind.weight_taken for t in found} == {
        "language_model.layers.0.conv.conv": True,
        "tower.conv": False,
    }
    text.model_type = "mamba"  # whose out_proj is refused
    with pytest.raises(TargetError, match="mamba passes") as caught:
        plan(model, LoraConfig(target_modules=["out_proj"]))
    assert "tower" not in str(caught.value)
