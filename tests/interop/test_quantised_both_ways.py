"""On the same bitsandbytes model PEFT and lowrank read each other's adapters, and LoftQ's start is the same."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lowrank

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

TARGETS = ["q_proj", "down_proj"]
BASES = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 double": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(dtype=torch.float32).save_pretrained(folder)
    return folder


def load(folder, base):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BASES[base]
    )


def logits(model):
    """In training mode, in which no layer repacks its weight or rounds its input."""
    model.train()
    with torch.no_grad():
        return model(input_ids=tiny.IDS).logits


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_each_reads_the_others_adapter(folder, tmp_path, base, use_dora):
    options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "use_dora": use_dora}
    theirs = peft.get_peft_model(load(folder, base), peft.LoraConfig(**options))
    tiny.randomise(theirs).save_pretrained(tmp_path / "theirs")
    ours = lowrank.PeftModel.from_pretrained(
        load(folder, base), tmp_path / "theirs", is_trainable=True
    )
    expected = logits(theirs)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(load(folder, base), tmp_path / "ours")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu  # where PEFT's runs
def test_loftq_replaces_the_same_where_the_scaling_is_one(folder):
    changes = []
    for library in (lowrank, peft):
        settings = library.LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS)
        model = library.get_peft_model(load(folder, "nf4"), settings)
        library.replace_lora_weights_loftq(model, str(folder / "model.safetensors"))
        layers = {p: m for p, m in model.named_modules() if p.endswith(tuple(TARGETS))}
        changes.append({p: m.get_delta_weight("default").detach() for p, m in layers.items()})
    ours, theirs = changes
    assert ours.keys() == theirs.keys()
    for path, change in theirs.items():
        torch.testing.assert_close(ours[path], change, rtol=1e-3, atol=1e-5)
