"""Unusual configurations in lowrank and in PEFT: the same trainable tensors, files and logits."""

import pytest
import torch
import transformers
from tiny import bert, gpt2, llama, llama_classifier, logits, randomise

import lowrank

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # PEFT's own, and transformers' about PEFT's calls
]


def sequence_classifier():
    return bert(transformers.BertForSequenceClassification)


CASES = {
    "tied pair saved whole, each on its own": (
        lambda: llama(tied=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "one of a tied pair saved whole": (
        lambda: llama(tied=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tied pair, both with LoRA": (
        lambda: llama(tied=True),
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    ),
    "a module with others inside saved whole": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["layers.1.mlp", "model.norm"]},
    ),
    "a name that ends many paths": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ),
    "a head by its task, beside another saved module": (
        sequence_classifier,
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["pooler.dense"]},
    ),
    "a head by its task and by its name": (
        llama_classifier,
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS", "modules_to_save": ["score"]},
    ),
    "ranks by suffix, by path, by expression": (
        llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, r"layers\.1\..*": 2, "v_proj": 4},
            "alpha_pattern": {"v_proj": 11, r"model\.layers\.0\.mlp\.(up|down)_proj": 7},
        },
    ),
    "a path from its first name": (
        llama,
        {"target_modules": ["q_proj"], "rank_pattern": {"^model.layers.1.self_attn.q_proj": 6}},
    ),
    "all but some by name": (
        llama,
        {
            "target_modules": "all-linear",
            "exclude_modules": ["down_proj", "layers.1.self_attn.o_proj"],
        },
    ),
    "all but some by expression": (
        llama,
        {"target_modules": r".*\.(q|v|up)_proj", "exclude_modules": r".*layers\.1\..*"},
    ),
    "layers": (
        llama,
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "biases of B": (
        bert,
        {"target_modules": ["query", "intermediate.dense"], "lora_bias": True, "use_rslora": True},
    ),
    "biases of B on GPT-2, ranks by layer": (
        gpt2,
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "lora_bias": True,
            "fan_in_fan_out": True,
            "rank_pattern": {"h.1.attn.c_attn": 2},
        },
    ),
}


def model_of(library, case):
    build, fields = CASES[case]
    config = library.LoraConfig(**{"r": 3, "lora_alpha": 5, **fields})
    return library.get_peft_model(build(), config)


def trained(model):
    return {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_trainable_tensors_logits_and_files(case, tmp_path):
    ours, theirs = randomise(model_of(lowrank, case)), model_of(peft, case)
    assert trained(ours) == trained(theirs)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(logits(ours), logits(theirs))
    for model, reader in ((ours, peft), (randomise(theirs, seed=6), lowrank)):
        folder = tmp_path / reader.__name__
        model.save_pretrained(folder)
        loaded = reader.PeftModel.from_pretrained(CASES[case][0](), folder)
        torch.testing.assert_close(logits(loaded), logits(model))
