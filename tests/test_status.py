"""What get_layer_status and get_model_status say, and that PEFT says the same."""

import dataclasses

import pytest
import tiny

import lowrank
from lowrank import LoraConfig, get_layer_status, get_model_status, get_peft_model

CONFIG = {"r": 3, "target_modules": ["q_proj", "v_proj"], "use_dora": True}


def told(library):
    """Statuses in several states of a model, as dictionaries."""
    model = library.get_peft_model(tiny.llama(), library.LoraConfig(**CONFIG))
    model.add_adapter(
        "other", library.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    found = []

    def look():
        found.append(dataclasses.asdict(library.get_model_status(model)))
        found.extend(map(dataclasses.asdict, library.get_layer_status(model)))

    look()
    model.set_adapter("other")
    look()
    model.merge_adapter(["other"])
    look()
    model.unmerge_adapter()
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["other"].requires_grad_(False)
    look()
    return found


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_peft_says_the_same():
    import peft

    for ours, theirs in zip(told(lowrank), told(peft), strict=True):
        differ = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
        assert differ == {}, ours.get("name")


def test_a_model_and_its_layers():
    model = get_peft_model(tiny.llama(), LoraConfig(**CONFIG))
    layers = get_layer_status(model)
    assert [layer.name for layer in layers] == [
        f"model.model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")
    ]
    first = layers[0]
    assert first.module_type == "lora.Linear"
    assert first.enabled
    assert first.active_adapters == first.available_adapters == ["default"]
    assert first.requires_grad == {"default": True}
    assert first.devices == {"default": ["cpu"]}
    status = get_model_status(model)
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.peft_types == {"default": "LORA"}
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.num_adapter_layers == 4
    model.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(False)
    assert get_model_status(model).enabled == "irregular"


def test_a_model_without_adapters():
    model = tiny.llama()
    assert get_layer_status(model) == []
    status = get_model_status(model)
    assert status.adapter_model_type == "None"
    assert (status.num_adapter_layers, status.active_adapters, status.available_adapters) == (
        0,
        [],
        [],
    )
