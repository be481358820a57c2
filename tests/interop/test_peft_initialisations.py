"""Initialisations that change W, with PEFT's files: same logits both ways, and as a plain LoRA everywhere."""

import dataclasses
import importlib
import sys
import types

import pytest
import torch
from tiny import IDS, gpt2, llama, logits, randomise

import lowrank

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

FIELDS = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}
METHODS = [{}, {"use_dora": True}, {"use_rslora": True}]


def base():
    return llama(dtype=torch.float32)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_file_acts_here_as_there(init, method, tmp_path):
    config = peft.LoraConfig(**FIELDS, init_lora_weights=init, **method)
    theirs = randomise(peft.get_peft_model(base(), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = lowrank.PeftModel.from_pretrained(base(), tmp_path)
    close(logits(ours), logits(theirs))
    ours.merge_adapter()
    close(logits(ours), logits(theirs))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_our_file_acts_there_as_here(init, method, tmp_path):
    config = lowrank.LoraConfig(**FIELDS, init_lora_weights=init, **method)
    ours = randomise(lowrank.get_peft_model(base(), config)).eval()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    close(logits(theirs), logits(ours))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_as_a_plain_lora_peft_loads_it_onto_the_untouched_base(init, method, tmp_path):
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 7}}
    config = lowrank.LoraConfig(**FIELDS, **patterns, init_lora_weights=init, **method)
    ours = randomise(lowrank.get_peft_model(base(), config)).eval()
    ours.save_pretrained(tmp_path, as_plain_lora=True)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert theirs.peft_config["default"].init_lora_weights is True
    close(logits(theirs), logits(ours))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_conv1d_goes_to_peft_as_a_plain_lora(init, tmp_path, caplog):
    """PEFT's own start of a Conv1D takes B·A out of Wᵀ for OLoRA; ours is written on W (out, in)."""
    config = lowrank.LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights=init)
    model = gpt2(dtype=torch.float32)
    before = logits(model)
    ours = lowrank.get_peft_model(model, config).eval()
    assert torch.equal(logits(ours), before)
    randomise(ours)
    ours.save_pretrained(tmp_path / "own")
    assert "as_plain_lora=True" in caplog.text
    ours.save_pretrained(tmp_path / "plain", as_plain_lora=True)
    theirs = peft.PeftModel.from_pretrained(gpt2(dtype=torch.float32), tmp_path / "plain")
    close(logits(theirs), logits(ours))


def test_the_starts_are_pefts():
    """B·A of each layer; the signs of singular vectors are anyone's choice."""
    for init in ("pissa", "olora"):
        config = peft.LoraConfig(**FIELDS, init_lora_weights=init)
        theirs = peft.get_peft_model(base(), config).state_dict()
        config = lowrank.LoraConfig(**FIELDS, init_lora_weights=init)
        ours = lowrank.get_peft_model(base(), config).state_dict()
        keys = [key for key in theirs if ".lora_A." in key]
        assert keys
        for key in keys:
            one, other = (
                state[key.replace("lora_A", "lora_B")] @ state[key] for state in (ours, theirs)
            )
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_initial_adapter_of_peft_is_recognised(tmp_path):
    """A run begun in PEFT: its initial adapter, with the signs that its SVD gave, has our B₀·A₀."""
    config = peft.LoraConfig(**FIELDS, init_lora_weights="pissa")
    theirs = peft.get_peft_model(base(), config).eval()
    theirs.save_pretrained(tmp_path / "start")
    randomise(theirs).save_pretrained(tmp_path / "trained")
    ours = lowrank.PeftModel.from_pretrained(base(), tmp_path / "trained")
    start = str(tmp_path / "start")
    ours.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=start)
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "plain")
    close(logits(again), logits(theirs))


# --- starts from data, and LoftQ ------------------------------------------------------------------


def started(library, init, monkeypatch):
    """The library's model with an adapter that started from the same data."""
    # PEFT's CorDA imports attrs, for dataclass, without asking for it to be installed
    attr = types.ModuleType("attr")
    attr.dataclass = dataclasses.dataclass
    monkeypatch.setitem(sys.modules, "attr", attr)
    where = {lowrank: "lowrank", peft: "peft.tuners.lora.config"}[library]
    kind = {"corda": "CordaConfig", "lora_ga": "LoraGAConfig", "eva": "EvaConfig"}[init]
    options = {f"{init}_config": getattr(importlib.import_module(where), kind)()}
    config = library.LoraConfig(**FIELDS, init_lora_weights=init, **options)
    model = base()
    torch.manual_seed(3)
    ids = torch.randint(3, 93, (12, 9))
    if init == "corda":
        corda = lowrank if library is lowrank else importlib.import_module("peft.tuners.lora.corda")
        # PEFT looks at one row at a time
        corda.preprocess_corda(
            model, config, run_model=lambda: [model(input_ids=row[None]) for row in ids]
        )
    if init == "lora_ga":
        library.preprocess_loraga(
            model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward()
        )
    adapted = library.get_peft_model(model, config)
    if init == "eva":
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        library.initialize_lora_eva_weights(adapted, [batch], show_progress_bar=False)
    return adapted.eval()


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_starts_from_data_go_both_ways_as_plain_loras(init, tmp_path, monkeypatch):
    """As PEFT's users do it: the initial adapter is kept, and taken off when the trained one is saved."""
    before = logits(base())
    theirs = started(peft, init, monkeypatch)
    close(logits(theirs), before)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    randomise(theirs)
    start = str(tmp_path / "start")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=start)
    ours = started(lowrank, init, monkeypatch)
    close(logits(ours), before)
    randomise(ours).save_pretrained(tmp_path / "ours", as_plain_lora=True)
    for writer, reader, folder in ((theirs, lowrank, "theirs"), (ours, peft, "ours")):
        read = reader.PeftModel.from_pretrained(base(), tmp_path / folder).eval()
        close(logits(read), logits(writer))


@pytest.mark.filterwarnings("ignore")
def test_eva_goes_both_ways(tmp_path, monkeypatch):
    for writer, reader in ((lowrank, peft), (peft, lowrank)):
        written = randomise(started(writer, "eva", monkeypatch))
        written.save_pretrained(tmp_path / writer.__name__)
        read = reader.PeftModel.from_pretrained(base(), tmp_path / writer.__name__).eval()
        close(logits(read), logits(written))


def test_a_base_that_loftq_quantised_carries_its_adapter_there(tmp_path):
    """The other way needs a GPU: PEFT's LoftQ computes on one, whatever the model."""
    options = {"init_lora_weights": "loftq", "loftq_config": lowrank.LoftQConfig(loftq_bits=4)}
    ours = lowrank.get_peft_model(base(), lowrank.LoraConfig(**FIELDS, **options))
    expected = logits(randomise(ours).eval())
    ours.peft_config["default"].init_lora_weights = True
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(ours.unload(keep_quantised=True), tmp_path)
    close(logits(theirs.eval()), expected)
