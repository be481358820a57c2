"""What is known of single architectures, by the `model_type` of their configuration."""

# The attention projections that LoRA adapts when target_modules is None (Hu et al. 2021, §4.2 and §7.1:
# query and value; the fused projection where there is only that). Rows are grouped by their names; those of
# a row that a model does not have (another version, another half of a composite model) do not count.
_DEFAULT_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): (
        "llama llama4 llama4_text mistral mistral3 ministral mixtral gemma gemma2 gemma3 gemma3_text gemma3n qwen2 "
        "qwen2_moe qwen2_vl qwen2_5_vl qwen3 qwen3_moe qwen3_next olmo olmo2 olmo3 olmoe cohere cohere2 granite "
        "granitemoe stablelm starcoder2 smollm3 gpt_oss gptj gpt_neo opt glm glm4 exaone4 ernie4_5 nemotron gemma4_text "
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
    ("Wqkv",): "mpt modernbert",
    ("Wqkv", "q_proj", "v_proj"): "modernbert-decoder",
    ("q", "v"): "t5 mt5 umt5 longt5 switch_transformers udop mpnet",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query", "value"): (
        "bert roberta xlm-roberta xlm-roberta-xl camembert electra albert layoutlm layoutlmv3 mobilebert convbert "
        "big_bird nezha roberta-prelayernorm data2vec-text megatron-bert roformer ernie rembert splinter esm"
    ),
    ("query", "value", "q_proj", "v_proj"): "vit deit beit dinov2",  # renamed in transformers 5
    ("q_lin", "v_lin"): "distilbert flaubert xlm",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}

# names, or a regular expression for whole paths
DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    model_type: names
    for names, model_types in _DEFAULT_TARGETS.items()
    for model_type in model_types.split()
} | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}

# Layers that PEFT refuses to adapt, since with the fused kernels their own forward is never called: an
# adapter here would not load there.
BYPASSED: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj", "conv1d")
)

# Layers whose weight the module around them computes with, always or in some of its paths, in place of
# calling them. It is handed the weight with the adapters in it, so that they act all the same.
WEIGHT_TAKEN: dict[str, tuple[str, ...]] = {
    model_type: tuple(names.split())
    for names, model_types in {
        "q_proj k_proj v_proj out_proj": "wavlm",
        "x_proj dt_proj": "mamba falcon_mamba",
        "dt_proj conv1d": "jamba",
        "out_proj conv1d": "bamba granitemoehybrid zamba2",
        "conv1d": (
            "zamba qwen3_next qwen3_5 qwen3_5_moe qwen4_exp kimi_linear olmo_hybrid bailing_hybrid glm5_next "
            "inkling inkling2"
        ),
        "conv_1d": "recurrent_gemma",
        "conv": "lfm2 lfm2_moe lfm3",
        "query_key value": "reformer",
    }.items()
    for model_type in model_types.split()
}

# Fused experts that get every token once for each expert, (experts · tokens, hidden), expert after expert, and
# weigh none: by the name of their class.
EXPERT_AFTER_EXPERT = ("Llama4TextExperts",)
