"""The options of the initialisations from data: their values, JSON both ways, and what PEFT makes of them."""

import dataclasses
import json

import pytest

from lowrank import LoraConfig, PeftConfig
from lowrank.errors import ConfigError, UnknownFieldError
from lowrank.init_config import SUB_CONFIGS, CordaConfig, EvaConfig, LoraGAConfig

OPTIONS = {
    "eva_config": ("eva", {"rho": 1.5, "tau": 0.9, "whiten": True, "label_mask_value": -1}),
    "corda_config": ("corda", {"corda_method": "kpm", "cache_file": "c.pt", "verbose": True}),
    "lora_ga_config": ("lora_ga", {"direction": "ArBr", "scale": "unit", "stable_gamma": 4}),
}


@pytest.mark.parametrize("field", list(OPTIONS))
def test_options_are_an_object_or_a_dictionary(field):
    init, values = OPTIONS[field]
    kind, _ = SUB_CONFIGS[field]
    one = LoraConfig(init_lora_weights=init, **{field: values})
    other = LoraConfig(init_lora_weights=init, **{field: kind(**values)})
    assert one == other
    assert getattr(LoraConfig(init_lora_weights=init), field) == kind()
    assert getattr(LoraConfig(), field) is None


@pytest.mark.parametrize("field", list(OPTIONS))
def test_they_are_saved_and_loaded(field, tmp_path):
    init, values = OPTIONS[field]
    config = LoraConfig(init_lora_weights=init, **{field: values})
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path) == config
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved[field] == dataclasses.asdict(getattr(config, field))


@pytest.mark.interop
@pytest.mark.parametrize("field", list(OPTIONS))
def test_peft_reads_ours_and_we_read_pefts(field, tmp_path):
    peft = pytest.importorskip("peft")
    init, values = OPTIONS[field]
    config = LoraConfig(r=3, init_lora_weights=init, **{field: values})
    config.save_pretrained(tmp_path / "ours")
    theirs = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    assert type(getattr(theirs, field)).__name__ == type(getattr(config, field)).__name__
    assert dataclasses.asdict(getattr(theirs, field)) == dataclasses.asdict(getattr(config, field))
    theirs.save_pretrained(tmp_path / "theirs")
    assert getattr(PeftConfig.from_pretrained(tmp_path / "theirs"), field) == getattr(config, field)


def test_options_of_a_start_that_is_over_are_dropped_on_loading():
    """A file that was rewritten as plain LoRA keeps them, in PEFT's words."""
    values = LoraConfig(init_lora_weights="corda", corda_config={"corda_method": "kpm"}).to_dict()
    assert PeftConfig.from_dict({**values, "init_lora_weights": True}).corda_config is None


def problems(**fields):
    with pytest.raises(ConfigError) as error:
        LoraConfig(**fields)
    return str(error.value)


def test_options_without_their_initialisation_are_refused():
    assert "eva_config does nothing without init_lora_weights='eva'" in problems(eva_config={})
    assert "corda_config=3 must be a CordaConfig" in problems(
        init_lora_weights="corda", corda_config=3
    )


def test_impossible_values():
    with pytest.raises(ConfigError, match=r"2 problems:(.|\n)*rho=0\.5 (.|\n)*tau=2"):
        EvaConfig(rho=0.5, tau=2)
    with pytest.raises(ConfigError, match=r"corda_method='imp' is none of ipm, kpm.*'ipm'"):
        CordaConfig(corda_method="imp")
    with pytest.raises(ConfigError, match=r"3 problems:(.|\n)*direction(.|\n)*scale(.|\n)*gamma"):
        LoraGAConfig(direction="up", scale="big", stable_gamma=0)
    with pytest.raises(UnknownFieldError, match=r"eva_config has no key 'roh'.*'rho'"):
        LoraConfig(init_lora_weights="eva", eva_config={"roh": 2})
