"""`LoraConfig`: PEFT's names and defaults, refusals by name, and its JSON."""

import dataclasses
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.config import (
    CONFIG_NAME,
    LoraConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftType,
)
from lowrank.errors import AdapterFileError, ConfigError, LowrankError, UnknownFieldError
from lowrank.task_types import TaskType


def refusal(**fields) -> str:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**fields)
    return str(caught.value)


# --- values ---------------------------------------------------------------------------------------


def test_the_defaults():
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 8, 0.0, "none")
    assert config.init_lora_weights is True
    assert config.peft_type == "LORA"
    assert config.target_modules is None
    off = "use_rslora use_dora lora_bias inference_mode is_prompt_learning is_adaption_prompt"
    assert not any(getattr(config, name) for name in off.split())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, ["r=0", "at least 1"]),
        ({"r": -3}, ["r=-3"]),
        ({"r": 2.5}, ["r=2.5", "whole number"]),
        ({"r": True}, ["r=True"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj']=0"]),
        ({"rank_pattern": ["q_proj"]}, ["rank_pattern"]),
        ({"alpha_pattern": {"q_proj": "2"}}, ["alpha_pattern['q_proj']='2'", "a finite number"]),
        ({"lora_alpha": "16"}, ["lora_alpha='16'"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha=nan"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha=inf"]),
        ({"lora_dropout": 1.0}, ["lora_dropout=1.0", "below 1"]),
        ({"lora_dropout": -0.1}, ["lora_dropout=-0.1"]),
        ({"lora_dropout": float("nan")}, ["lora_dropout=nan"]),
        ({"bias": "some"}, ["bias='some'", "'lora_only'"]),
        ({"task_type": "CAUSAL"}, ["task_type='CAUSAL'", "Did you mean 'CAUSAL_LM'"]),
        ({"init_lora_weights": "gausian"}, ["'gausian'", "Did you mean 'gaussian'"]),
        ({"init_lora_weights": "pissa_niter_x"}, ["'pissa_niter_x'", "pissa_niter_<iterations>"]),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, ["'pissa'", "lora_alpha", "above 0"]),
        ({"init_lora_weights": None}, ["init_lora_weights=None"]),
        ({"use_dora": True, "lora_bias": True}, ["lora_bias=True with use_dora=True"]),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, ["lora_bias=True", "'gaussian'"]),
        ({"layers_to_transform": "3"}, ["layers_to_transform='3'", "whole number"]),
        ({"layers_to_transform": [0, "1"]}, ["layers_to_transform=[0, '1']"]),
        ({"layers_pattern": 3, "layers_to_transform": 1}, ["layers_pattern=3"]),
        ({"target_modules": ".*q", "layers_to_transform": [1]}, ["layers_to_transform", "list"]),
        ({"layers_pattern": "layers"}, ["layers_pattern", "layers_to_transform"]),
        ({"target_modules": 5}, ["target_modules=5"]),
        ({"target_modules": ["q_proj", 5]}, ["target_modules", "5"]),
        ({"exclude_modules": 5}, ["exclude_modules=5"]),
        ({"modules_to_save": "lm_head"}, ["modules_to_save='lm_head'", "['lm_head']"]),
        (
            {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
            ["ephemeral_gpu_offload"],
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_impossible_values_are_refused_by_name(fields, words):
    text = refusal(**fields)
    for word in words:
        assert word in text


# (value, a word of what to do instead)
OTHER_METHODS = {
    "megatron_config": ({"x": 1}, "FSDP"),
    "megatron_core": ("my.core", "FSDP"),
    "use_qalora": (True, "plain LoRA"),
    "qalora_group_size": (8, "leave it"),
    "velora_config": ({"x": 1}, "gradient checkpointing"),
    "monteclora_config": ({"x": 1}, "lora_dropout"),
    "use_bdlora": ({"x": 1}, "plain LoRA"),
    "arrow_config": ({"x": 1}, "adapter_names"),
    "kasa_config": ({"x": 1}, "pissa"),
    "init_lora_weights": ("mica", "orthogonal"),
    "runtime_config": ({"ephemeral_gpu_offload": True}, "GPU before"),
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_what_is_no_plain_lora_is_refused_with_what_to_do_instead(name):
    value, advice = OTHER_METHODS[name]
    text = refusal(**{name: value})
    assert text.startswith((f"{name}=", f"{name}."))
    assert advice in text


def test_every_problem_is_told_at_once():
    text = refusal(r=0, lora_dropout=2, bias="x", use_qalora=True, rank_pattern={"q": -1})
    assert text.startswith("5 problems:")
    for word in ("r=0", "lora_dropout=2", "bias='x'", "use_qalora=True", "rank_pattern['q']=-1"):
        assert word in text


def test_errors_are_what_callers_of_peft_catch():
    with pytest.raises(ValueError):
        LoraConfig(r=0)
    with pytest.raises(TypeError):
        LoraConfig(rank=8)
    assert issubclass(ConfigError, LowrankError)


def test_an_unknown_keyword_is_an_error_with_the_nearest_name():
    with pytest.raises(UnknownFieldError) as caught:
        LoraConfig(lora_alfa=16, target_module=["q"], rank=4)
    text = str(caught.value)
    assert text.startswith("3 problems:")
    assert "'lora_alfa'. Did you mean 'lora_alpha'" in text
    assert "'target_module'. Did you mean 'target_modules'" in text
    assert "no field 'rank'" in text


def test_lists_lose_their_repetitions_and_keep_their_order():
    config = LoraConfig(target_modules=("v", "q", "v"), modules_to_save=("b", "a", "b"))
    assert config.target_modules == ["v", "q"]
    assert config.modules_to_save == ["b", "a"]


def test_a_set_is_sorted_since_its_order_differs_from_run_to_run():
    names = [f"layer{i}" for i in range(10, 40)]
    assert LoraConfig(target_modules=set(names)).target_modules == names
    assert LoraConfig(exclude_modules=frozenset(names)).exclude_modules == names
    assert LoraConfig(modules_to_save=set(names)).modules_to_save == names


def test_empty_patterns_may_be_none():
    config = LoraConfig(rank_pattern=None, alpha_pattern=None, loftq_config=None)
    assert (config.rank_pattern, config.alpha_pattern) == ({}, {})
    assert LoraConfig(layers_pattern=[]).layers_pattern is None  # as some older files have it


# --- JSON -----------------------------------------------------------------------------------------

FULL = {
    "r": 5,
    "lora_alpha": 7.5,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["layers.0.q_proj"],
    "lora_dropout": 0.1,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"v_proj": 2.5},
    "use_dora": True,
    "task_type": TaskType.CAUSAL_LM,
    "inference_mode": True,
    "base_model_name_or_path": "some/base",
    "revision": "abc",
}


@pytest.mark.parametrize("fields", [{}, FULL])
def test_json_round_trip(fields, tmp_path):
    config = LoraConfig(**fields)
    config.save_pretrained(tmp_path / "new")
    values = json.loads((tmp_path / "new" / CONFIG_NAME).read_text())
    assert values["peft_type"] == "LORA"
    assert "runtime_config" not in values
    for cls in (LoraConfig, PeftConfig):
        read = cls.from_pretrained(tmp_path / "new")
        assert type(read) is LoraConfig
        assert read == config
    assert LoraConfig.from_dict(config.to_dict()) == config
    assert LoraConfig(**json.loads(config.to_json_string())) == config


def test_enumerations_are_their_strings():
    assert (
        json.loads(LoraConfig(task_type=TaskType.SEQ_CLS).to_json_string())["task_type"]
        == "SEQ_CLS"
    )
    assert LoraConfig(task_type="SEQ_CLS") == LoraConfig(task_type=TaskType.SEQ_CLS)
    assert PeftType.LORA == "LORA"


def test_transformers_keywords_for_remote_code_are_let_pass(tmp_path):
    LoraConfig(r=3, target_modules=["q"]).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path, trust_remote_code=False, code_revision=None)
    assert config.r == 3


def test_unknown_keys_of_a_file_are_errors_with_a_way_out(tmp_path):
    values = {**LoraConfig().to_dict(), "lora_alfa": 3, "use_newlora": True}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    with pytest.raises(UnknownFieldError) as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert "unknown key 'lora_alfa'. Did you mean 'lora_alpha'" in str(caught.value)
    assert "'use_newlora'" in str(caught.value)
    assert "ignore_unknown=True" in str(caught.value)
    with pytest.warns(UserWarning, match="lora_alfa, use_newlora"):
        config = PeftConfig.from_pretrained(tmp_path, ignore_unknown=True)
    assert config == LoraConfig()


def test_a_file_of_another_method_is_refused(tmp_path):
    (tmp_path / CONFIG_NAME).write_text('{"peft_type": "LOHA", "r": 8, "module_dropout": 0.1}')
    with pytest.raises(ConfigError, match=r"'LOHA'.*Load this adapter with PEFT"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / CONFIG_NAME).write_text('{"r": 8,')
    with pytest.raises(AdapterFileError, match=r"adapter_config.json is not valid JSON"):
        PeftConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("[1, 2]")
    with pytest.raises(AdapterFileError, match=r"adapter_config.json"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_configuration_says_what_it_has(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(AdapterFileError, match=r"no adapter_config.json. It has: notes.txt"):
        PeftConfig.from_pretrained(tmp_path)


def test_keywords_of_from_pretrained_set_fields(tmp_path):
    LoraConfig(r=3).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path, inference_mode=True, lora_dropout=0.2)
    assert (config.r, config.inference_mode, config.lora_dropout) == (3, True, 0.2)


# --- PEFT -----------------------------------------------------------------------------------------


@pytest.mark.interop
def test_every_field_of_pefts_is_there_with_its_default():
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig()
    for f in dataclasses.fields(theirs):
        if not f.init or f.name == "peft_version":  # which PEFT fills in
            continue
        value = getattr(theirs, f.name)
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        ours = LoraConfig(**{f.name: value})  # accepted by keyword at its default
        found = getattr(LoraConfig(), f.name)
        found = dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found
        assert found == value, f.name
        assert ours == LoraConfig()


@pytest.mark.interop
def test_we_have_no_field_that_peft_does_not_know():
    peft = pytest.importorskip("peft")
    theirs = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert {f.name for f in dataclasses.fields(LoraConfig)} <= theirs


@pytest.mark.interop
def test_task_types_are_pefts():
    peft = pytest.importorskip("peft")
    assert {t.value for t in TaskType} == {t.value for t in peft.TaskType}


names = st.lists(st.sampled_from(["q", "v", "o.up"]), min_size=1, max_size=3, unique=True)


@pytest.mark.interop
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "r": st.integers(1, 64),
            "lora_alpha": st.integers(1, 64) | st.floats(0.25, 8),
            "target_modules": names | st.sampled_from(["all-linear", r".*\.q"]),
            "exclude_modules": names | st.just(r".*0\.q"),
            "lora_dropout": st.sampled_from([0.0, 0.05]),
            "fan_in_fan_out": st.booleans(),
            "bias": st.sampled_from(["none", "all", "lora_only"]),
            "use_rslora": st.booleans(),
            "use_dora": st.booleans(),
            "lora_bias": st.booleans(),
            "modules_to_save": names,
            "init_lora_weights": st.sampled_from([True, False, "gaussian", "orthogonal"]),
            "layers_to_transform": st.integers(0, 3) | st.lists(st.integers(0, 3), min_size=1),
            "layers_pattern": st.sampled_from(["layers", ["h", "layers"], []]),
            "rank_pattern": st.dictionaries(st.sampled_from(["q", "v"]), st.integers(1, 9)),
            "alpha_pattern": st.dictionaries(st.sampled_from(["q", "v"]), st.integers(1, 9)),
            "task_type": st.sampled_from([t.value for t in TaskType]),
            "inference_mode": st.booleans(),
        },
    )
)
def test_what_we_accept_peft_reads_and_writes_the_same(fields, tmp_path_factory):
    peft = pytest.importorskip("peft")
    try:
        ours = LoraConfig(**fields)
    except ConfigError:
        return
    folder = tmp_path_factory.mktemp("adapter")
    ours.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftConfig.from_pretrained(str(folder))
    for f in dataclasses.fields(ours):
        value, expected = getattr(theirs, f.name), getattr(ours, f.name)
        if f.name in ("runtime_config", "peft_version", "megatron_core"):
            continue
        if isinstance(value, set):
            value, expected = value, set(expected)
        assert value == expected, f.name
    theirs.save_pretrained(str(folder))
    back = PeftConfig.from_pretrained(folder)
    for f in dataclasses.fields(ours):
        if f.name == "peft_version":
            continue
        value, expected = getattr(back, f.name), getattr(ours, f.name)
        if f.name in ("target_modules", "exclude_modules") and isinstance(expected, list):
            value, expected = sorted(value), sorted(expected)
        assert value == expected, f.name
