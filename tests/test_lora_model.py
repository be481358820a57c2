"""Operations on all layers of a model at once, and the ways in that need no PeftModel."""

import pytest
import torch
from tiny import (
    IDS,
    bert,
    bits,
    gpt2,
    llama,
    logits,
    merged_by_hand,
    randomise,
    same_bits,
    t5,
)
from torch import nn

import lowrank
from lowrank import LoraConfig, LoraLayer, get_peft_model, prepare_model_for_kbit_training
from lowrank.errors import AdapterMismatchError, AdapterNameError, ConfigError, MergeError


def adapted(base, seed=1, **options):
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **options}
    return randomise(get_peft_model(base, LoraConfig(**options)), seed)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- merge and unmerge ----------------------------------------------------------------------------

EVERY_KIND = {
    "linear": (llama, {"target_modules": "all-linear"}),
    "dora": (llama, {"use_dora": True}),
    "Conv1D and embedding": (gpt2, {"target_modules": ["c_attn", "wte", "wpe"]}),
    "lora_bias": (gpt2, {"target_modules": ["c_fc"], "lora_bias": True}),
    "bias all": (bert, {"target_modules": ["query"], "bias": "all"}),
    "seq2seq": (t5, {"target_modules": ["q", "wi", "lm_head"]}),
}


@pytest.mark.parametrize("case", EVERY_KIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_gives_every_bit_back(case, dtype):
    build, options = EVERY_KIND[case]
    model = adapted(build(dtype=dtype), **options)
    before = bits(model)
    model.merge_adapter()
    assert not same_bits(bits(model), before)
    model.unmerge_adapter()
    assert same_bits(bits(model), before)
    model.unmerge_adapter()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_cycles_leave_every_bit_of_the_base(dtype):
    model = adapted(llama(dtype=dtype, layers=1))
    before = bits(model)
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    assert same_bits(bits(model), before)


def test_a_bfloat16_merge_is_the_exact_sum_rounded_once():
    model = adapted(llama(dtype=torch.bfloat16))
    exact = merged_by_hand(
        llama(dtype=torch.bfloat16), lowrank.get_peft_model_state_dict(model), 5 / 3
    )
    merged = model.merge_and_unload()
    for name, W in merged.named_parameters():
        truth = exact.get_parameter(name)
        # half a unit in the last of 8 binary places, and the float32 sum before it
        assert ((W.double() - truth).abs() <= truth.abs() * 2.0**-8 * 1.001).all(), name


def test_merging_twice_merges_once():
    model = adapted(llama())
    model.merge_adapter()
    once = bits(model)
    model.merge_adapter()
    assert same_bits(bits(model), once)


def test_merging_one_by_one_is_merging_together():
    model = adapted(llama(dtype=torch.bfloat16))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    unmerged = bits(model)
    model.merge_adapter(["default", "other"])
    together = bits(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert same_bits(bits(model), together)
    model.unmerge_adapter()
    assert same_bits(bits(model), unmerged)


def test_merging_named_adapters_merges_those():
    model = adapted(llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    truth = merged_by_hand(
        llama(), lowrank.get_peft_model_state_dict(model, adapter_name="other"), 8 / 2
    )
    model.merge_adapter(["other"])
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            assert layer.merged_adapters == (["other"] if path.endswith("v_proj") else [])
            expected = truth.get_submodule(path).weight
            torch.testing.assert_close(layer.base_layer.weight, expected, atol=1e-7, rtol=1e-7)


def poison(model, value, where="layers.1.self_attn.v_proj.lora_B.default.weight"):
    with torch.no_grad():
        model.get_parameter(f"base_model.model.model.{where}")[0, 0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_adapter(safe_merge=True),
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True),
    ],
)
def test_an_adapter_that_is_not_finite_is_not_merged(value, merge):
    model = adapted(llama())
    poison(model, value)
    before = bits(model)
    with pytest.raises(MergeError, match=r"layers\.1\.self_attn\.v_proj\.lora_B.*NaN or infinity"):
        merge(model)
    assert same_bits(bits(model), before)
    assert not any(getattr(module, "merged", False) for module in model.modules())


@pytest.mark.parametrize(
    "merge",
    [lambda model: model.merge_adapter(), lambda model: model.merge_and_unload(safe_merge=True)],
)
def test_a_merge_that_overflows_in_the_middle_is_taken_back(merge):
    """The first layers merge; a later one exceeds float16's 65504."""
    model = adapted(llama(dtype=torch.float16))
    for matrix in "AB":
        poison(model, 300.0, f"layers.1.self_attn.v_proj.lora_{matrix}.default.weight")
    before = bits(model)
    with pytest.raises(MergeError, match=r"layers\.1\.self_attn\.v_proj.*NaN or infinity"):
        merge(model)
    assert same_bits(bits(model), before)
    assert not any(getattr(module, "merged", False) for module in model.modules())


def test_a_bias_that_overflows_is_not_merged():
    model = adapted(gpt2(dtype=torch.float16), target_modules=["c_attn"], lora_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "h.1" in name and name.endswith("lora_B.default.bias"):
                parameter.fill_(6e4)
    before = bits(model)
    with pytest.raises(MergeError, match=r"h\.1\.attn\.c_attn.*NaN or infinity"):
        model.merge_adapter()
    assert same_bits(bits(model), before)


def test_a_failed_merge_leaves_an_earlier_one_in_place():
    model = adapted(llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.merge_adapter()
    before = bits(model)
    for parameter in model.parameters():
        if parameter.shape == (12, 2):
            parameter.data[0, 0] = float("nan")
    with pytest.raises(MergeError):
        model.merge_adapter(["other"])
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            assert layer.merged_adapters == ["default"]
    after = bits(model)
    base = [name for name in before if "lora_" not in name]
    assert same_bits({name: after[name] for name in base}, {name: before[name] for name in base})


def test_an_unsafe_merge_that_fails_says_what_became_of_the_base():
    model = adapted(llama(dtype=torch.float16))
    for matrix in "AB":
        poison(model, 300.0, f"layers.1.self_attn.v_proj.lora_{matrix}.default.weight")
    with pytest.raises(MergeError, match="load the base again, or use safe_merge=True"):
        model.merge_and_unload()


def test_lora_bias_on_a_layer_without_bias_cannot_be_merged():
    """Its configuration says that there is no bias: a saved one would not be loaded."""
    model = adapted(llama(), lora_bias=True)
    before = bits(model)
    for merge in (model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(MergeError, match=r"q_proj.*base layer has none"):
            merge()
    assert same_bits(bits(model), before)


# --- prepare_model_for_kbit_training --------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"modules_to_save": ["wpe", "ln_f"]}])
@pytest.mark.parametrize("first", ["prepare", "adapter"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_prepare_model_for_kbit_training_in_either_order(first, options, reentrant):
    config = LoraConfig(r=3, target_modules=["c_attn"], **options)
    expected = trainable(get_peft_model(gpt2(), config))
    arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    base = gpt2(dtype=torch.bfloat16)
    if first == "prepare":
        base = prepare_model_for_kbit_training(base, **arguments)
        model = get_peft_model(base, config)
    else:
        model = prepare_model_for_kbit_training(get_peft_model(base, config), **arguments)
    assert trainable(model) == expected
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_base_model().is_activation_checkpointing
    randomise(model)
    model.train()
    model.config.use_cache = False
    model(input_ids=IDS, labels=IDS).loss.backward()
    missing = [name for name in expected if model.get_parameter(name).grad is None]
    assert not missing
    zero = [name for name in expected if model.get_parameter(name).grad.abs().max() == 0]
    assert not zero


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = adapted(gpt2(), target_modules=["c_attn"])
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: model.get_parameter(name).grad for name in trainable(model)})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-12, rtol=1e-9)


def test_preparing_without_checkpointing():
    model = prepare_model_for_kbit_training(
        llama(dtype=torch.bfloat16), use_gradient_checkpointing=False
    )
    assert trainable(model) == set()
    assert not model.is_activation_checkpointing
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --- inject_adapter_in_model ----------------------------------------------------------------------


def test_inject_adapter_in_model():
    base = llama()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    model = lowrank.inject_adapter_in_model(config, base)
    assert model is base
    assert list(model.peft_config) == ["default"]
    randomise(model)
    assert all(".lora_" in name for name in trainable(model))
    tensors = lowrank.get_peft_model_state_dict(model)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    truth = logits(merged_by_hand(llama(), tensors, 5 / 3))
    torch.testing.assert_close(logits(model), truth, atol=1e-5, rtol=1e-5)
    other = lowrank.inject_adapter_in_model(config, llama(), adapter_name="other")
    lowrank.set_peft_model_state_dict(other, tensors, adapter_name="other")
    torch.testing.assert_close(logits(other), logits(model), atol=0, rtol=0)


def test_inject_a_second_adapter():
    model = lowrank.inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj"]), llama())
    lowrank.inject_adapter_in_model(LoraConfig(r=2, target_modules=["v_proj"]), model, "other")
    assert list(model.peft_config) == ["default", "other"]
    assert {name.split(".")[-2] for name in trainable(model)} == {"other"}
    with pytest.raises(AdapterNameError, match="already is"):
        lowrank.inject_adapter_in_model(LoraConfig(r=2), model, "other")


def test_inject_on_the_meta_device_is_filled_by_loading():
    source = adapted(llama())
    tensors = {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in lowrank.get_peft_model_state_dict(source).items()
    }
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    model = lowrank.inject_adapter_in_model(config, llama(), low_cpu_mem_usage=True)
    assert all(model.get_parameter(name).device.type == "meta" for name in trainable(model))
    lowrank.set_peft_model_state_dict(model, tensors)
    torch.testing.assert_close(logits(model), logits(source), atol=0, rtol=0)
    assert trainable(model) == {
        name.removeprefix("base_model.model.") for name in trainable(source)
    }


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_inject_takes_layers_and_ranks_from_a_state_dict(prefix):
    saved = lowrank.inject_adapter_in_model(
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["q_proj", "layers.1.self_attn.v_proj", "embed_tokens"],
            rank_pattern={"layers.0.self_attn.q_proj": 4, "embed_tokens": 2},
            init_lora_weights=False,
        ),
        llama(),
    )
    tensors = lowrank.get_peft_model_state_dict(saved)
    named = {prefix + key: tensor for key, tensor in tensors.items()}
    model = lowrank.inject_adapter_in_model(
        LoraConfig(r=3, lora_alpha=5), llama(), state_dict=named
    )
    lowrank.set_peft_model_state_dict(model, tensors)
    torch.testing.assert_close(logits(model), logits(saved), rtol=0, atol=0)
    # and the configuration that it leaves says the same elsewhere
    again = lowrank.inject_adapter_in_model(model.peft_config["default"], llama())
    lowrank.set_peft_model_state_dict(again, tensors)
    torch.testing.assert_close(logits(again), logits(saved), rtol=0, atol=0)


def test_a_state_dict_that_agrees_leaves_the_configuration_alone():
    config = LoraConfig(r=3, target_modules=["q_proj"])
    tensors = lowrank.get_peft_model_state_dict(lowrank.inject_adapter_in_model(config, llama()))
    model = lowrank.inject_adapter_in_model(config, llama(), state_dict=tensors)
    assert model.peft_config["default"].target_modules == ["q_proj"]
    assert model.peft_config["default"].rank_pattern == {}


def test_a_state_dict_of_no_adapter_is_refused():
    with pytest.raises(ConfigError, match="no lora_A"):
        lowrank.inject_adapter_in_model(
            LoraConfig(r=2), llama(), state_dict={"x.weight": torch.ones(2)}
        )


# --- the LoraModel itself -------------------------------------------------------------------------


class TiedNet(nn.Module):
    """One module under two names, and one weight in two modules."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.first(x)))))


def test_a_module_under_two_names_gets_one_adapter():
    model = adapted(TiedNet().double(), target_modules=["first", "again"])
    base = model.get_base_model()
    assert base.first is base.again
    lora = base.first.lora("default")
    W = base.first.base_layer.weight + 5 / 3 * lora.B @ lora.A
    x = torch.randn(4, 6, dtype=torch.float64)
    first = lambda x: torch.tanh(x @ W.T + base.first.base_layer.bias)  # noqa: E731
    truth = base.last(first(first(x)))
    torch.testing.assert_close(model(x), truth)
    last = base.last.weight.clone()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), truth)
    assert merged.first is merged.again
    assert torch.equal(merged.last.weight, last)


def test_loading_into_the_wrong_adapter_is_refused():
    model = adapted(llama())
    tensors = lowrank.get_peft_model_state_dict(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterMismatchError):
        lowrank.set_peft_model_state_dict(model, tensors, "other")


def test_a_set_adapter_that_fails_switches_nothing():
    config = lowrank.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = randomise(lowrank.get_peft_model(llama(), config))
    model.add_adapter("b", config)
    model.set_adapter("b")
    randomise(model, seed=3)
    expected = logits(model)
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterNameError, match=r"lm_head: .*only one"):
        model.set_adapter(["b", "default"])
    assert model.active_adapters == ["b"]
    assert [p.requires_grad for p in model.parameters()] == trainable
    torch.testing.assert_close(logits(model), expected)
