"""A model of transformers' as GGUF in float32, as far as the tests need it."""

import re

import gguf
import torch

# norms that scale by 1 + w in transformers, and by what the file holds in llama.cpp
ONE_PLUS = ("gemma", "gemma2", "gemma3_text")


def write_base(model, path, arch, rotary=False, transposed=False):
    """arch: llama.cpp's name. rotary: the rows of q and k are reordered. transposed: as transformers' Conv1D."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head_dim)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        if "sliding_attention" in rope:
            writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        if getattr(config, "sliding_window", None):
            writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if arch == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    for field, add in {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "num_local_experts" if hasattr(config, "num_local_experts") else "num_experts": (
            writer.add_expert_count
        ),
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
    }.items():
        if getattr(config, field, None):
            add(getattr(config, field))
    for name, tensor in tensors(model, arch, heads, kv_heads, rotary, transposed):
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model, arch, heads, kv_heads, rotary, transposed):
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if "norm" in key and model.config.model_type in ONE_PLUS:
            tensor = tensor + 1
        if rotary and key.endswith(("q_proj.weight", "k_proj.weight")):
            n = heads if "q_proj" in key else kv_heads
            # of each head the rows i and i + half side by side
            tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        if (
            transposed
            and key.endswith("weight")
            and any(w in key for w in ("c_attn", "c_proj", "c_fc"))
        ):
            tensor = tensor.T
        match = re.search(r"layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?$", key)
        if match:
            number, word, bias = match.groups()
            end = "bias" if bias else "weight"
            if (
                getattr(model.get_submodule(key.rpartition(".")[0]), "is_transposed", False)
                and not bias
            ):
                tensor = tensor.transpose(1, 2)
            parts = {"down": tensor}
            if word == "gate_up" and arch == "gpt-oss":
                parts = {"gate": tensor[:, ::2], "up": tensor[:, 1::2]}
            elif word == "gate_up":
                parts = dict(zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True))
            for part, rows in parts.items():
                yield f"blk.{number}.ffn_{part}_exps.{end}", rows
            continue
        if key.endswith("sinks"):
            key += ".weight"
        name = known.get_name(key, (".weight", ".bias"))
        assert name, key
        yield name, torch.squeeze(tensor)
