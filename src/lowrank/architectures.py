"""What is known of single architectures, by the `model_type` of their configuration."""

# The attention projections that LoRA adapts when target_modules is None (Hu et al. 2021, §4.2 and §7.1:
# query and value; the fused projection where there is only that). Rows are grouped by their names.
_DEFAULT_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): (
        "llama llama4 llama4_text mistral mistral3 ministral mixtral gemma gemma2 gemma3 gemma3_text gemma3n qwen2 "
        "qwen2_moe qwen2_vl qwen2_5_vl qwen3 qwen3_moe qwen3_next olmo olmo2 olmo3 olmoe cohere cohere2 granite "
        "granitemoe stablelm starcoder2 smollm3 gpt_oss gptj gpt_neo opt glm glm4 exaone4 ernie4_5 nemotron "
        "helium arcee apertus bitnet seed_oss hunyuan_v1_dense minimax phimoe xglm bart mbart pegasus pegasus_x "
        "blenderbot blenderbot-small marian m2m_100 plbart bigbird_pegasus led nllb-moe whisper speech_to_text "
        "wav2vec2 hubert wavlm clip siglip"
    ),
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("qkv_proj",): "phi3 codegen",
    (
        "query_key_value",
    ): "bloom gpt_neox gpt_neox_japanese falcon RefinedWeb RefinedWebModel chatglm persimmon",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_proj", "c_attn"): "btlm",
    ("Wqkv",): "mpt modernbert modernbert-decoder",
    ("q", "v"): "t5 mt5 umt5 longt5 switch_transformers udop mpnet",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query", "value"): (
        "bert roberta xlm-roberta xlm-roberta-xl camembert electra albert layoutlm layoutlmv3 mobilebert convbert "
        "big_bird nezha roberta-prelayernorm data2vec-text megatron-bert roformer ernie rembert splinter esm vit "
        "deit beit dinov2"
    ),
    ("q_lin", "v_lin"): "distilbert flaubert xlm",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}

DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    model_type: names
    for names, model_types in _DEFAULT_TARGETS.items()
    for model_type in model_types.split()
}

# Layers whose own forward is never called: the module around them passes their weight to a fused kernel,
# so that an adapter on them would train nothing.
BYPASSED: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj", "conv1d")
)
