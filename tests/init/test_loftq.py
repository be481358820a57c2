"""LoftQ: Q + s·B·A ≈ W, with Q quantised (Li et al. 2023, Algorithm 1); W comes back when asked for."""

import copy
import pickle

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank import LoftQConfig, LoraConfig, PeftModel, get_peft_model, read_adapter
from lowrank.errors import AdapterFileError, AdapterNameError, ConfigError, TargetError
from lowrank.init import loftq
from lowrank.init.weight import LOFTQ
from lowrank.kernels import quantisation
from lowrank.wrappers import lora_layers


def rounded(W, bits):
    return quantisation.rounded(W, LOFTQ[bits])


def config(bits=4, iterations=1, **options):
    values = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **options}
    quantisation = LoftQConfig(loftq_bits=bits, loftq_iter=iterations)
    return LoraConfig(init_lora_weights="loftq", loftq_config=quantisation, **values)


def base():
    return tiny.llama(dtype=torch.float32)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_turns_are_those_of_the_algorithm(bits, iterations):
    torch.manual_seed(0)
    W, r, s = torch.randn(40, 30), 4, 2.5
    found = loftq(lambda: W, (40, 30), r, s, bits=bits, iterations=iterations)
    change = torch.zeros(40, 30, dtype=torch.float64)
    for _ in range(iterations):
        Q = rounded((W.double() - change).float(), bits).double()
        U, S, Vh = torch.linalg.svd(W.double() - Q)
        change = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
    torch.testing.assert_close(found.base.double(), Q, atol=1e-5, rtol=0)
    torch.testing.assert_close(s * found.B.double() @ found.A.double(), change, atol=1e-4, rtol=0)
    # the whole point: nearer to W than the quantised weight alone
    alone = (W - rounded(W, bits)).norm()
    assert (W - found.base - s * found.B @ found.A).norm() < 0.95 * alone


def test_in_bfloat16_the_base_is_rounded_and_made_up_for():
    torch.manual_seed(0)
    W = torch.randn(40, 30).bfloat16()
    found = loftq(lambda: W, (40, 30), 4, 1.0)
    assert found.base.dtype == torch.bfloat16
    U, S, Vh = torch.linalg.svd(W.double() - found.base.double())
    best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
    torch.testing.assert_close((found.B @ found.A).double(), best, atol=1e-5, rtol=0)


def test_the_original_answers_when_the_adapter_is_disabled():
    model = base()
    before, bits = tiny.logits(model), tiny.bits(model)
    adapted = get_peft_model(model, config()).eval()
    start = tiny.logits(adapted)
    assert not torch.equal(start, before)
    with adapted.disable_adapter():
        assert torch.equal(tiny.logits(adapted), before)
    assert torch.equal(tiny.logits(adapted), start)
    adapted.merge_adapter()
    merged = tiny.logits(adapted)
    torch.testing.assert_close(merged, start)
    with adapted.disable_adapter():
        assert torch.equal(tiny.logits(adapted), before)
    assert torch.equal(tiny.logits(adapted), merged)
    assert tiny.same_bits(tiny.bits(adapted.unload()), bits)


def test_deleting_the_adapter_brings_the_original_back():
    model = base()
    before = tiny.logits(model)
    adapted = get_peft_model(model, config()).eval()
    adapted.delete_adapter("default")
    assert torch.equal(tiny.logits(adapted), before)


@pytest.mark.parametrize("conv1d", [False, True])
def test_rows_without_an_adapter_see_the_original(conv1d):
    make = tiny.gpt2 if conv1d else tiny.llama
    targets = ["c_attn", "c_proj"] if conv1d else ["q_proj", "down_proj"]
    model = make(dtype=torch.float32)
    before = tiny.logits(model)
    adapted = tiny.randomise(get_peft_model(model, config(target_modules=targets))).eval()
    alone = tiny.logits(adapted)
    with torch.no_grad():
        for names in (["__base__", "default", "__base__"], ["__base__"] * 3):
            mixed = adapted(input_ids=tiny.IDS, adapter_names=names).logits
            for row, name in enumerate(names):
                expected = before if name == "__base__" else alone
                torch.testing.assert_close(mixed[row], expected[row])
    assert (before - alone).abs().max() > 0.01


def test_others_on_the_quantised_base_keep_it():
    model = base()
    before = tiny.logits(model)
    adapted = get_peft_model(model, config()).eval()
    adapted.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"]))
    adapted.set_adapter("other")
    expected = tiny.logits(tiny.randomise(adapted))
    with pytest.raises(AdapterNameError, match=r"(?s)quantised the base.*'other'"):
        adapted.delete_adapter("default")
    assert torch.equal(tiny.logits(adapted), expected)
    adapted.delete_adapter("other")
    adapted.delete_adapter("default")
    assert torch.equal(tiny.logits(adapted), before)


def test_merged_for_good_it_is_q_and_the_change():
    adapted = tiny.randomise(get_peft_model(base(), config())).eval()
    expected = tiny.logits(adapted)
    torch.testing.assert_close(tiny.logits(adapted.merge_and_unload()), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_casts_keep_both_weights(copied):
    model = base()
    before = tiny.logits(model)
    adapted = copied(get_peft_model(model, config()).eval())
    with adapted.disable_adapter():
        assert torch.equal(tiny.logits(adapted), before)
    adapted.double()
    with adapted.disable_adapter():
        torch.testing.assert_close(tiny.logits(adapted).float(), before)


def test_saved_and_loaded_onto_the_original(tmp_path, monkeypatch):
    adapted = tiny.randomise(get_peft_model(base(), config(iterations=2))).eval()
    adapted.save_pretrained(tmp_path)
    assert read_adapter(tmp_path).config.loftq_config == {"loftq_bits": 4, "loftq_iter": 2}
    with (
        monkeypatch.context() as no_svd
    ):  # the base that is made again is that of the file, on any machine
        no_svd.delattr(torch.linalg, "svd")
        again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(adapted))
    again.save_pretrained(tmp_path / "again")
    first, second = read_adapter(tmp_path).start, read_adapter(tmp_path / "again").start
    assert first.keys() == second.keys() == read_adapter(tmp_path).tensors.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(AdapterFileError, match="full rank"):
        adapted.save_pretrained(tmp_path / "plain", as_plain_lora=True)


@pytest.mark.filterwarnings("ignore:loftq_config does nothing")
def test_the_quantised_base_and_its_adapter_for_later(tmp_path):
    """As PEFT's users prepare a 4-bit model: the base as LoftQ left it, and an adapter that needs no start."""
    adapted = tiny.randomise(get_peft_model(base(), config())).eval()
    expected = tiny.logits(adapted)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "adapter")
    quantised = adapted.unload(keep_quantised=True)
    weight = quantised.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(rounded(weight, 4), weight.detach(), atol=1e-7, rtol=0)
    again = PeftModel.from_pretrained(quantised, tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), expected)


def test_conv1d_is_quantised_as_out_in():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(33, 65))
    W = model[0].weight.detach().T.clone()
    adapted = get_peft_model(model, config(target_modules=["0"]))
    [(_, layer)] = lora_layers(adapted)
    assert torch.equal(layer.unmerged_weight(), rounded(W, 4))
    assert torch.equal(layer.original_weight(), W)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(TargetError, match=r"(?s)embed_tokens.*linear layers"):
        get_peft_model(base(), config(target_modules=["embed_tokens"]))
    with pytest.raises(TargetError, match="linear layers"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 5, 3)), config(target_modules=["0"]))
    with pytest.raises(TargetError, match=r"(?s)lm_head.*untie"):
        get_peft_model(tiny.llama(tied=True), config(target_modules=["lm_head"]))
    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterNameError, match="first adapter"):
        model.add_adapter("second", config())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "needs loftq_config"),
        ({"loftq_config": {"loftq_bits": 3}}, "loftq_bits=3 must be 2, 4 or 8"),
        ({"loftq_config": {"loftq_bit": 4}}, "loftq_bits"),
        ({"loftq_config": {"loftq_iter": 0}}, "loftq_iter=0"),
        ({"loftq_config": LoftQConfig(), "lora_alpha": -1}, "above 0"),
    ],
    ids=str,
)
def test_configurations_that_mean_nothing_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        LoraConfig(init_lora_weights="loftq", **values)


def test_a_configuration_without_its_initialisation_is_told():
    with pytest.warns(UserWarning, match="loftq_config does nothing"):
        assert LoraConfig(loftq_config=LoftQConfig()).loftq_config == {}
