"""PEFT's public names: what each does to a whole model."""

from tiny import llama

import lowrank


def test_a_base_with_activation_checkpointing_gives_no_deprecation_warning():
    model = llama()
    model.activation_checkpointing_enable()
    peft_model = lowrank.get_peft_model(model, lowrank.LoraConfig(r=3))
    lowrank.prepare_model_for_kbit_training(peft_model)
