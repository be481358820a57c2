"""prepare_model_for_kbit_training on quantised bases: what it changes, and what it must not touch."""

import pytest
import tiny
import torch
from models import Net
from torch import nn

from lowrank import LoraConfig, Quantisation, get_peft_model, prepare_model_for_kbit_training
from lowrank.bases.kinds import is_quantised, packed_sizes
from lowrank.quantising import quantise_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt", "ignore:.*use_reentrant", "ignore:.*Enum subclass"
)


def stored(tmp_path):
    tiny.llama(dtype=torch.bfloat16, attention_bias=True).save_pretrained(tmp_path)
    return tmp_path


def through_transformers(tmp_path, config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        stored(tmp_path), quantization_config=config, dtype=torch.bfloat16
    )


def bitsandbytes(**options):
    def made(tmp_path):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        return through_transformers(tmp_path, BitsAndBytesConfig(**options))

    return made


def torchao(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return through_transformers(tmp_path, TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def own(quantisation):
    def made(tmp_path):
        model = tiny.llama(dtype=torch.bfloat16, attention_bias=True)
        quantise_model(model, quantisation)
        return model

    return made


BASES = {
    "nf4": own(Quantisation("nf4", block_size=64, double=True)),
    "int8": own(Quantisation("int8")),
    "bitsandbytes nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes, stored as bfloat16": bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"
    ),
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "torchao int8": torchao,
}


def packed(model):
    return {name: p for name, p in model.named_parameters() if id(p) in packed_sizes(model)}


def raw(tensor):
    """A copy of its bytes; of torchao's, those of its parts."""
    if hasattr(tensor, "qdata"):
        return torch.cat([raw(tensor.qdata), raw(tensor.scale)])
    return tensor.detach().as_subclass(torch.Tensor).clone().flatten().view(torch.uint8)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", ["prepare", "adapter"])
@pytest.mark.parametrize("name", BASES)
def test_packed_weights_stay_and_the_rest_is_float32(name, first, reentrant, tmp_path):
    model = BASES[name](tmp_path)
    before = {key: (type(p), raw(p)) for key, p in packed(model).items()}
    assert len(before) == 14
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if first == "prepare":
        model = get_peft_model(prepare_model_for_kbit_training(model, **options), config)
    else:
        model = prepare_model_for_kbit_training(get_peft_model(model, config), **options)
    base = model.get_base_model()
    for key, p in packed(base).items():
        kind, bits = before[key.replace(".base_layer", "")]
        assert type(p) is kind, key
        assert torch.equal(raw(p), bits), key
        assert not p.requires_grad, key
    rest = {n: p for n, p in model.named_parameters() if id(p) not in packed_sizes(model)}
    held = torch.bfloat16 if name.startswith("torchao") else torch.float32
    for key, p in rest.items():
        trained = "lora_" in key or "modules_to_save" in key
        assert p.requires_grad == trained, key
        assert p.dtype == (torch.float32 if "lora_" in key else held), key
    assert base.is_activation_checkpointing
    tiny.randomise(model)
    model.train()
    model(input_ids=tiny.IDS, labels=tiny.IDS, use_cache=False).loss.backward()
    for key, p in rest.items():
        assert not p.requires_grad or p.grad.abs().max() > 0, key


def test_a_model_of_plain_torch():
    model = Net().to(torch.bfloat16)
    quantise_model(model, Quantisation("nf4", block_size=64), skip=["head"])
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for path, module in model.named_modules():
        if not is_quantised(module):
            own = module.named_parameters(recurse=False)
            assert {p.dtype for _, p in own} <= {torch.float32}, path
    assert isinstance(model.head, nn.Linear)
