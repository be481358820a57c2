"""An adapter brings its base model along."""

import pytest
import text
import tiny
import torch
import transformers

from lowrank import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    get_peft_model,
    load_peft_weights,
)
from lowrank.errors import ConfigError


def saved(folder, **options):
    """(folder of an adapter whose base is a folder too, the adapted model)."""
    base = text.save_model(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))
    tiny.randomise(model).save_pretrained(folder / "adapter")
    return folder / "adapter", model


def test_the_base_comes_along(tmp_path):
    folder, model = saved(tmp_path, task_type="CAUSAL_LM")
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    trained = AutoPeftModelForCausalLM.from_pretrained(
        folder, adapter_name="more", is_trainable=True
    )
    assert list(trained.peft_config) == ["more"]
    assert any(p.requires_grad for p in trained.parameters())


def test_without_a_task_the_file_names_the_class(tmp_path):
    folder, model = saved(tmp_path)
    loaded = AutoPeftModel.from_pretrained(folder)
    assert type(loaded.get_base_model()).__name__ == "LlamaForCausalLM"
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_the_vocabulary_follows_the_tokenizer_beside_the_adapter(tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(text.save_model(tmp_path / "base"))
    tokenizer = text.byte_tokenizer()
    tokenizer.add_tokens(["<|new|>", "<|newer|>"])
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    model = tiny.randomise(get_peft_model(base, config))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_what_is_refused(tmp_path):
    folder, _ = saved(tmp_path, task_type="CAUSAL_LM")
    for wrong in (AutoPeftModel, AutoPeftModelForSequenceClassification):
        with pytest.raises(ConfigError, match="use AutoPeftModelForCausalLM"):
            wrong.from_pretrained(folder)
    with pytest.raises(OSError, match="from_pretrained"):
        AutoPeftModel()
    foreign = LoraConfig(auto_mapping={"parent_library": "os.path", "base_model_class": "join"})
    with pytest.raises(ConfigError, match=r"import_allowlist=\['os.path'\]"):
        AutoPeftModel.from_pretrained(folder, config=foreign)
    with pytest.raises(ConfigError, match="neither task_type nor auto_mapping"):
        AutoPeftModel.from_pretrained(folder, config=LoraConfig())


def test_load_peft_weights_renames_by_pattern(tmp_path):
    folder, model = saved(tmp_path)
    tensors = load_peft_weights(folder, key_mapping={r"^model\.layers": "blocks", "q_proj": "q"})
    assert len(tensors) == 4
    first = tensors["base_model.model.blocks.0.self_attn.q_proj.lora_A.weight"]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(first, layer.lora_A["default"].weight)
