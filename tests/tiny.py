"""Tiny whole models with random weights, and what a model with an adapter must compute, in float64."""

import copy

import torch
import transformers
from torch import Tensor, nn

IDS = torch.tensor([[1, 5, 7, 9, 33, 12, 4], [2, 4, 6, 8, 10, 3, 88], [11, 9, 2, 71, 7, 3, 5]])

SIZES = {
    "vocab_size": 93,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODER = {
    **SIZES,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(tied=False, vocab=93, layers=2, dtype=torch.float64, seed=0, **options):
    sizes = {**DECODER, "vocab_size": vocab, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(
        **sizes, intermediate_size=40, tie_word_embeddings=tied, **options
    )
    return _built(transformers.LlamaForCausalLM, config, dtype, seed)


def llama_classifier(dtype=torch.float64, seed=0, **options):
    config = llama(dtype=dtype, **{"num_labels": 3, **options}).config
    return _built(transformers.LlamaForSequenceClassification, config, dtype, seed)


def gpt2(dtype=torch.float64, seed=0):
    config = transformers.GPT2Config(
        vocab_size=93,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _built(transformers.GPT2LMHeadModel, config, dtype, seed)


def t5(dtype=torch.float64, seed=0, **options):
    sizes = {
        "vocab_size": 93,
        "d_model": 24,
        "d_kv": 5,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
    }
    rest = {"decoder_start_token_id": 0, "dropout_rate": 0.0}
    config = transformers.T5Config(**{**sizes, **rest, **options})
    return _built(transformers.T5ForConditionalGeneration, config, dtype, seed)


def bert(kind=transformers.BertForMaskedLM, dtype=torch.float64, seed=0, **options):
    rest = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**{**SIZES, "intermediate_size": 40, **rest, **options})
    return _built(kind, config, dtype, seed)


def mixtral(dtype=torch.float64, seed=0, **options):
    """Experts of (32, 24) and (24, 16), three of them, of which a token meets two."""
    config = transformers.MixtralConfig(
        **DECODER,
        intermediate_size=16,
        num_local_experts=3,
        num_experts_per_tok=2,
        **options,
    )
    return _built(transformers.MixtralForCausalLM, config, dtype, seed)


def qwen3_moe(dtype=torch.float64, seed=0):
    config = transformers.Qwen3MoeConfig(
        **DECODER,
        intermediate_size=28,
        moe_intermediate_size=12,
        head_dim=6,
        num_experts=5,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    )
    return _built(transformers.Qwen3MoeForCausalLM, config, dtype, seed)


def gpt_oss(dtype=torch.float64, seed=0):
    """Experts held transposed, (24, 32) and (16, 24), with biases."""
    config = transformers.GptOssConfig(
        **DECODER,
        intermediate_size=16,
        head_dim=6,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    return _built(transformers.GptOssForCausalLM, config, dtype, seed)


def llama4(dtype=torch.float64, seed=0):
    """Experts held transposed, (24, 32) and (16, 24), which their module does not say."""
    config = transformers.Llama4TextConfig(
        **DECODER,
        intermediate_size=16,
        intermediate_size_mlp=28,
        head_dim=6,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    return _built(transformers.Llama4ForCausalLM, config, dtype, seed)


def _built(kind, config, dtype, seed):
    """A model whose biases and norms are random too: zeros and ones would hide mistakes."""
    torch.manual_seed(seed)
    model = kind(config).to(dtype).eval()
    if dtype == torch.float64 and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # torch's grouped_mm knows no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def randomise(model, seed=1):
    """Every trainable parameter becomes random, none zero, as if it had been trained. Returns `model`."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def logits(model):
    """The model's logits for IDS, without a gradient."""
    extra = {"decoder_input_ids": IDS.flip(0)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **extra).logits


def bits(model):
    """A copy of every tensor of the model, to see later that no bit of it changed."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a, b):
    def raw(tensor):
        return tensor.contiguous().flatten().view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(raw(a[name]), raw(b[name]))
        for name in a
    )


def merged_by_hand(base, tensors: dict[str, Tensor], scaling: float) -> nn.Module:
    """A float64 copy of `base` whose weights are W + scaling·B·A (DoRA: m·V/‖V‖), from PEFT's keys.

    Tensors of modules_to_save and biases replace those of the base. Each weight is a new parameter, so
    that what was tied to it is not changed.
    """
    model = copy.deepcopy(base).double()
    tensors = {key.removeprefix("base_model.model."): t.double() for key, t in tensors.items()}
    used = set()

    def put(path, value):
        owner, _, name = path.rpartition(".")
        old = model.get_submodule(owner)._parameters[name]
        model.get_submodule(owner)._parameters[name] = nn.Parameter(value.reshape(old.shape))

    for key in tensors:
        path, _, what = key.partition(".lora_")
        if what not in ("A.weight", "embedding_A"):
            continue
        module = model.get_submodule(path)
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B").replace("ding_A", "ding_B")]
        used |= {key, key.replace("lora_A", "lora_B").replace("ding_A", "ding_B")}
        delta = scaling * (B.flatten(1) @ A.flatten(1))  # (out, in)
        name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        W = module._parameters[name]
        transposed = type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)
        V = (W.T if transposed else W.flatten(1)) + delta
        magnitude = f"{path}.lora_magnitude_vector"
        if magnitude in tensors:
            used.add(magnitude)
            V = tensors[magnitude].flatten()[:, None] * V / V.norm(dim=1, keepdim=True)
        put(f"{path}.{name}", V.T if transposed else V)
        bias = f"{path}.lora_B.bias"
        if bias in tensors:
            used.add(bias)
            module.bias = nn.Parameter(module.bias + scaling * tensors[bias])
    for key in set(tensors) - used:
        name = key.replace(".base_layer.", ".")
        if name.endswith("bias"):  # bias="all" trains a tied bias, which stays tied
            model.get_parameter(name).data.copy_(tensors[key])
        else:
            put(name, tensors[key])
    return model
