"""Our quantised layers through transformers' from_pretrained and save_pretrained, bytes and numbers."""

import copy
import weakref

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lowrank.quantizer as quantizer
from lowrank import LoraConfig, get_peft_model
from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.errors import ConfigError, TargetError
from lowrank.kernels.quantisation import quantise, rounded
from lowrank.quantizer import QuantizationConfig, in_our_words

FORMATS = {
    "nf4": {},
    "nf4, doubly": {"double": True},
    "fp4": {"format": "fp4", "block_size": 32},
    "int8": {"format": "int8"},
}


@pytest.fixture(scope="module", params=["tied", "apart", "gpt2"])
def stored(request, tmp_path_factory):
    """A model in bfloat16, in several files, and itself."""
    folder = tmp_path_factory.mktemp("stored")
    if request.param == "gpt2":
        model = tiny.gpt2(dtype=torch.bfloat16)
    else:
        model = tiny.llama(dtype=torch.bfloat16, tied=request.param == "tied", attention_bias=True)
    model.save_pretrained(folder, max_shard_size="8kB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder, model


def load(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def quantised(model):
    return {p: m for p, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def rounded_by_hand(model, quantisation):
    """The float model with its linear layers' weights rounded, all but the head's."""
    model = copy.deepcopy(model).float()
    for path, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        if path != "lm_head" and (transposed or isinstance(module, nn.Linear)):
            W = module.weight.data.T if transposed else module.weight.data
            new = rounded(W.contiguous(), quantisation)
            module.weight.data = new.T if transposed else new
    return model


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_the_float_model_with_rounded_weights(stored, name):
    folder, original = stored
    config = QuantizationConfig(**FORMATS[name])
    model = load(folder, quantization_config=config)
    layers = quantised(model)
    assert len(layers) == (8 if hasattr(model, "transformer") else 14)
    for path, layer in layers.items():
        W = original.get_submodule(path).weight
        W = W.T if type(original.get_submodule(path)).__name__ == "Conv1D" else W
        for held, right in zip(layer.packed, quantise(W.float(), config.quantisation), strict=True):
            assert held is right or torch.equal(held, right), path
    assert type(model.get_output_embeddings()) is nn.Linear
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == original.config.tie_word_embeddings
    assert not any(p.requires_grad for layer in layers.values() for p in layer.parameters())
    truth = rounded_by_hand(original, config.quantisation)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(truth), atol=2e-5, rtol=1e-4)


def test_of_the_float_model_one_weight_is_in_memory_at_a_time(stored, monkeypatch):
    folder, _ = stored
    install, seen, most = quantizer.Quantizer.install, [], []

    def watched(self, model, path, weight):
        linear = [model.get_submodule(p) for p in self.paths]
        most.append(
            sum(one() is not None for one in seen)  # weights that were handed over before
            + sum(not m.weight.is_meta for m in linear if not isinstance(m, QuantisedLinear))
        )
        seen.append(weakref.ref(weight))
        install(self, model, path, weight)

    monkeypatch.setattr(quantizer.Quantizer, "install", watched)
    model = load(folder, quantization_config=QuantizationConfig())
    assert len(most) == len(quantised(model)) > 7
    assert max(most) <= 1  # the one before may not be let go of yet
    assert sum(one() is not None for one in seen) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_saved_and_loaded_again_by_either_library(stored, name, tmp_path):
    """Ours is saved; bitsandbytes' layers load it, and so do ours, which save it again."""
    pytest.importorskip("bitsandbytes")
    folder, _ = stored
    model = load(folder, quantization_config=QuantizationConfig(**FORMATS[name]))
    before = {path: layer.packed for path, layer in quantised(model).items()}
    model.save_pretrained(tmp_path / "ours", max_shard_size="8kB")
    theirs = load(tmp_path / "ours")
    assert not quantised(theirs)
    for path, packed in before.items():
        weight = theirs.get_submodule(path).weight
        assert torch.equal(weight.data, packed.codes), path
        scales = weight.SCB if name == "int8" else weight.quant_state.absmax
        assert torch.equal(scales, packed.absmax), path
    config = AutoConfig.from_pretrained(tmp_path / "ours")
    config.quantization_config = in_our_words(config.quantization_config)
    again = load(tmp_path / "ours", config=config)
    again.save_pretrained(tmp_path / "again")
    config.quantization_config = in_our_words(
        AutoConfig.from_pretrained(tmp_path / "again").quantization_config
    )
    last = load(tmp_path / "again", config=config)
    for one in (again, last):
        assert torch.equal(tiny.logits(one), tiny.logits(model))
        for path, layer in quantised(one).items():
            pairs = zip(layer.packed, before[path], strict=True)
            assert all(a is b or torch.equal(a, b) for a, b in pairs), path
    assert quantised(last).keys() == before.keys()


def test_skipped_layers_and_the_dtype_of_products(stored):
    folder, original = stored
    name = "c_fc" if hasattr(original, "transformer") else "up_proj"
    config = QuantizationConfig(
        "int8", compute_dtype=torch.bfloat16, skip_modules=[name, "lm_head"]
    )
    model = load(folder, quantization_config=config)
    assert not any(path.endswith((name, "lm_head")) for path in quantised(model))
    assert all(layer.compute_dtype is torch.bfloat16 for layer in quantised(model).values())
    truth = tiny.logits(model)
    again = model.dequantize()
    assert not quantised(again)
    assert not getattr(again, "is_quantized", False)
    torch.testing.assert_close(tiny.logits(again), truth, atol=0.05, rtol=0.05)


def test_an_unknown_format():
    with pytest.raises(ConfigError, match="Did you mean 'nf4'"):
        QuantizationConfig("nf")


@pytest.mark.filterwarnings("ignore:.*Enum subclass")
def test_what_transformers_calls_trainable_and_is_not_is_refused(stored):
    """torchao's dynamic int8: the Trainer would run, on outputs without a gradient."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    folder, original = stored
    kinds = quantization.Int8DynamicActivationInt8WeightConfig, quantization.Int8WeightOnlyConfig
    dynamic, weight_only = (
        load(folder, quantization_config=TorchAoConfig(kind())) for kind in kinds
    )
    assert dynamic.hf_quantizer.is_trainable
    config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    if not hasattr(original, "transformer"):  # it leaves GPT-2's Conv1D as they are
        with pytest.raises(TargetError, match="Int8WeightOnlyConfig"):
            get_peft_model(dynamic, config)
    model = get_peft_model(weight_only, config).train()
    model(input_ids=tiny.IDS, labels=tiny.IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
