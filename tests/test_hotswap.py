"""Another adapter in the place of a loaded one: the outputs against W + scaling·B·A in float64, and no recompilation."""

import copy
import re

import pytest
import tiny
import torch
from models import ConvNet, Net
from torch import nn

from lowrank import (
    LoraConfig,
    PeftModel,
    check_hotswap_configs_compatible,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    inject_adapter_in_model,
    prepare_model_for_compiled_hotswap,
    set_peft_model_state_dict,
)
from lowrank.errors import (
    AdapterMismatchError,
    AdapterNameError,
    BaseMismatchError,
    HotswapError,
)
from lowrank.lora import scaling_for

TARGETS = ["q_proj", "v_proj", "down"]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net(layers=2).double().eval()


def tokens() -> torch.Tensor:
    return torch.tensor([[1, 4, 9], [2, 10, 3]])


def saved(folder, seed: int = 1, base: nn.Module | None = None, **fields):
    """An adapter with random tensors, in a folder; returns the folder and its PeftModel."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **fields})
    model = tiny.randomise(get_peft_model(base or net(), config), seed).eval()
    model.save_pretrained(folder)
    return folder, model


def loaded(folder, base: nn.Module | None = None) -> PeftModel:
    return PeftModel.from_pretrained(base or net(), folder)


def truth(model: PeftModel, base: nn.Module | None = None, *inputs):
    """What the base with `model`'s adapter in its weights computes, in float64."""
    config = model.peft_config["default"]
    scaling = scaling_for(config.lora_alpha, config.r, config.use_rslora)
    merged = tiny.merged_by_hand(base or net(), get_peft_model_state_dict(model), scaling)
    return merged(*(inputs or (tokens(),)))


# --- the numbers ----------------------------------------------------------------------------------

OTHERS = {
    "same rank": {"lora_alpha": 5},
    "other alpha": {"lora_alpha": 11},
    "smaller rank": {"r": 2, "lora_alpha": 7},
    "larger rank": {"r": 6, "lora_alpha": 7},
    "rslora": {"r": 2, "use_rslora": True},
    "fewer layers": {"r": 2, "target_modules": ["down"]},
}


@pytest.mark.parametrize("prepared", [False, True], ids=["as loaded", "prepared"])
@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_a_swapped_adapter_computes_what_a_fresh_load_does(tmp_path, fields, prepared):
    first, _ = saved(tmp_path / "first", seed=1)
    second, other = saved(tmp_path / "second", seed=2, **fields)
    model = loaded(first)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    with torch.no_grad():
        before = model(tokens())
        hotswap_adapter(model, second, "default")
        found = model(tokens())
        torch.testing.assert_close(found, truth(other), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found, loaded(second)(tokens()), rtol=1e-12, atol=1e-12)
        assert (found - before).abs().max() > 1e-3
        hotswap_adapter(model, first, "default")  # and back
        torch.testing.assert_close(model(tokens()), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_dora_and_lora_bias_are_swapped_too(tmp_path, field):
    first, _ = saved(tmp_path / "first", seed=1, target_modules=["q_proj", "down"], **{field: True})
    second, other = saved(
        tmp_path / "second", seed=2, r=2, target_modules=["down"], **{field: True}
    )
    model = loaded(first)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap_adapter(model, second, "default")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), truth(other), rtol=1e-10, atol=1e-12)


def test_convolutions_and_embeddings(tmp_path):
    image = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    torch.manual_seed(0)
    conv = ConvNet().double().eval()
    for base, targets, x in (
        (conv, ["conv1", "conv2", "head"], image),
        (net(), ["embed", "up"], tokens()),
    ):
        first, _ = saved(
            tmp_path / targets[0] / "1", 1, copy.deepcopy(base), target_modules=targets
        )
        second, other = saved(
            tmp_path / targets[0] / "2", 2, copy.deepcopy(base), target_modules=targets, r=2
        )
        model = loaded(first, copy.deepcopy(base))
        prepare_model_for_compiled_hotswap(model, target_rank=5)
        hotswap_adapter(model, second, "default")
        with torch.no_grad():
            torch.testing.assert_close(model(x), truth(other, base, x), rtol=1e-9, atol=1e-11)


def test_patterns_come_with_the_swap(tmp_path):
    first, _ = saved(tmp_path / "first", seed=1)
    second, _ = saved(
        tmp_path / "second", seed=2, rank_pattern={"down": 2}, alpha_pattern={"v_proj": 13}
    )
    model = loaded(first)
    hotswap_adapter(model, second, "default")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), loaded(second)(tokens()))
    assert {layer.scaling["default"] for layer in model.modules() if hasattr(layer, "lora_A")} == {
        5 / 3,
        13 / 3,
        5 / 2,
    }


def test_modules_saved_whole_are_swapped(tmp_path):
    first, _ = saved(tmp_path / "first", seed=1, modules_to_save=["head"])
    second, other = saved(tmp_path / "second", seed=2, modules_to_save=["head"])
    model = loaded(first)
    hotswap_adapter(model, second, "default")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), truth(other), rtol=1e-10, atol=1e-12)


def test_the_other_adapters_stay(tmp_path):
    first, _ = saved(tmp_path / "first", seed=1)
    second, other = saved(tmp_path / "second", seed=2, r=2)
    third, _ = saved(tmp_path / "third", seed=3, r=4)
    model = loaded(first)
    model.load_adapter(third, "third")
    model.set_adapter("third")
    with torch.no_grad():
        before = model(tokens())
        hotswap_adapter(model, second, "default")
        assert torch.equal(model(tokens()), before)
        model.set_adapter("default")
        torch.testing.assert_close(model(tokens()), truth(other), rtol=1e-10, atol=1e-12)


# --- a prepared adapter is still the same adapter -------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_a_padded_adapter_is_saved_with_its_own_rank(tmp_path, swap):
    first, model = saved(tmp_path / "first", seed=1)
    second, other = saved(tmp_path / "second", seed=2, r=2, lora_alpha=7)
    expected = other if swap else model
    model = loaded(first)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    if swap:
        hotswap_adapter(model, second, "default")
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    kept = get_peft_model_state_dict(expected)
    assert tiny.same_bits(get_peft_model_state_dict(again), kept)
    assert again.peft_config["default"].r == expected.peft_config["default"].r
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()), truth(expected), rtol=1e-10, atol=1e-12)
    set_peft_model_state_dict(model, get_peft_model_state_dict(again))  # its own file fits
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), truth(expected), rtol=1e-10, atol=1e-12)
    wrong = get_peft_model_state_dict(saved(tmp_path / "wrong", r=4)[1])
    with pytest.raises(AdapterMismatchError, match="of another shape"):
        set_peft_model_state_dict(model, wrong)


def test_merging_scaling_training_and_moving_a_prepared_adapter(tmp_path):
    first, plain = saved(tmp_path / "first", seed=1)
    model = loaded(first)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    with torch.no_grad():
        expected = truth(plain)
        model.merge_adapter()
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-10, atol=1e-12)
        with pytest.raises(HotswapError, match="merged"):
            hotswap_adapter(model, first, "default")
        model.unmerge_adapter()
        layer = model.base_model.model.layers[0].q_proj
        layer.set_scale("default", 0.5)
        assert layer.scaling["default"].item() == 0.5 * 5 / 3
        layer.scale_layer(4)
        layer.unscale_layer(2)
        assert layer.scaling["default"].item() == 5 / 3
        layer.unscale_layer()
        mixed = model(tokens(), adapter_names=["__base__", "default"])
        torch.testing.assert_close(mixed[1], expected[1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mixed[0], net()(tokens())[0])
    model.set_adapter("default")
    model(tokens()).sum().backward()
    model.float()
    assert layer.scaling["default"].dtype == torch.float64  # a number, not a weight
    assert not layer.lora_A["default"].weight.grad[3:].any()  # the padding stays zero
    assert layer.lora_A["default"].weight.grad[:3].all()
    model.delete_adapter("default")


# --- what does not fit ----------------------------------------------------------------------------


def test_everything_is_checked_before_anything_changes(tmp_path):
    first, _ = saved(tmp_path / "first", seed=1)
    second, other = saved(tmp_path / "second", seed=2, r=2)
    model = loaded(first)
    before = tiny.bits(model)
    config, tensors = other.peft_config["default"], get_peft_model_state_dict(other)
    keys = sorted(tensors)
    wrong = {key: t for key, t in tensors.items() if key != keys[0]}
    wrong["base_model.model.layers.0.up.lora_A.weight"] = torch.zeros(2, 7)
    wrong[keys[3]] = torch.zeros(2, 9)
    with pytest.raises(HotswapError) as error:
        hotswap_adapter_from_state_dict(model, wrong, "default", config)
    for text in ("3 problems", "layers.0.up.lora_A", "is missing", "(2, 9)"):
        assert text in str(error.value), text
    with pytest.raises(HotswapError, match="is expected for rank 3"):  # the config of another rank
        hotswap_adapter_from_state_dict(model, tensors, "default", model.peft_config["default"])
    with pytest.raises(AdapterNameError, match="Did you mean 'default'"):
        hotswap_adapter(model, second, "defaul")
    with pytest.raises(HotswapError, match="LoRA only"):
        hotswap_adapter_from_state_dict(model, tensors, "default", config, parameter_prefix="hada_")
    assert tiny.same_bits(before, tiny.bits(model))
    assert issubclass(HotswapError, (RuntimeError, ValueError))


def test_another_base_is_refused(tmp_path):
    first, _ = saved(tmp_path / "first", seed=1)
    second, _ = saved(tmp_path / "second", base=net(seed=9))
    model = loaded(first)
    with pytest.raises(BaseMismatchError):
        hotswap_adapter(model, second, "default")
    hotswap_adapter(model, second, "default", check_base=False)


def test_a_missing_saved_module_is_refused(tmp_path):
    first, _ = saved(tmp_path / "first", seed=1, modules_to_save=["head"])
    second, _ = saved(tmp_path / "second", seed=2)
    with pytest.raises(HotswapError, match="saved whole"):
        hotswap_adapter(loaded(first), second, "default")


def test_more_than_was_prepared_for_is_refused(tmp_path):
    first, _ = saved(tmp_path / "first", seed=1)
    second, _ = saved(tmp_path / "second", seed=2, r=6)
    model = loaded(first)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    with pytest.raises(HotswapError, match=re.escape("target_rank=6")):
        hotswap_adapter(model, second, "default")


@pytest.mark.parametrize(
    ("field", "value"), [("use_dora", True), ("lora_bias", True), ("lora_dropout", 0.1)]
)
def test_configurations_that_cannot_stand_in_for_each_other(field, value):
    a, b = LoraConfig(r=4), LoraConfig(r=8, lora_alpha=3, use_rslora=True)
    check_hotswap_configs_compatible(a, b)
    with pytest.raises(HotswapError, match=f"Configs are incompatible: {field}"):
        check_hotswap_configs_compatible(a, LoraConfig(r=4, **{field: value}))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_is_taken_out_of_the_base_is_refused(tmp_path, init):
    first, _ = saved(tmp_path / "first")
    second, other = saved(tmp_path / "second", seed=2, init_lora_weights=init)
    model = loaded(first)
    before = tiny.bits(model)
    with pytest.raises(HotswapError, match="as_plain_lora=True"):
        hotswap_adapter(model, second, "default")
    other.peft_config["default"].init_lora_weights = True  # the start lies beside it still
    other.save_pretrained(second)
    with pytest.raises(HotswapError, match="as_plain_lora=True"):
        hotswap_adapter(model, second, "default")
    assert tiny.same_bits(before, tiny.bits(model))
    other.save_pretrained(second, as_plain_lora=True)
    hotswap_adapter(model, second, "default")
    torch.testing.assert_close(model(tokens()), other(tokens()))


def test_a_quantised_base_is_refused():
    loftq = LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    with pytest.raises(HotswapError, match="quantises its base"):
        check_hotswap_configs_compatible(LoraConfig(), loftq)


def test_preparing_says_what_is_wrong(tmp_path):
    with pytest.raises(HotswapError, match="no adapters"):
        prepare_model_for_compiled_hotswap(net(), target_rank=4)
    _, model = saved(tmp_path)
    with pytest.raises(HotswapError, match=r"rank 3, more than target_rank=2"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(HotswapError, match="'ignore'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="sometimes")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(HotswapError, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=4)
    with pytest.warns(UserWarning, match="thrown away"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=4, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=4, check_compiled="ignore")


# --- under torch.compile --------------------------------------------------------------------------


def no_recompilation():
    return torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def test_a_compiled_model_is_not_compiled_again(tmp_path):
    first, model = saved(tmp_path / "first", seed=1)
    expected = truth(model)
    model = loaded(first)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        model(tokens())
        with no_recompilation():
            for name, fields in OTHERS.items():
                other, its_model = saved(tmp_path / name, seed=2, **fields)
                hotswap_adapter(model, other, "default")
                torch.testing.assert_close(
                    model(tokens()), truth(its_model), rtol=1e-10, atol=1e-12
                )
            hotswap_adapter(model, first, "default")
            torch.testing.assert_close(model(tokens()), expected, rtol=1e-10, atol=1e-12)


def test_without_preparing_another_scaling_compiles_again(tmp_path):
    first, _ = saved(tmp_path / "first", seed=1)
    second, _ = saved(tmp_path / "second", seed=2, lora_alpha=11)
    model = torch.compile(loaded(first), fullgraph=True, backend="eager")
    with torch.no_grad():
        model(tokens())
        with no_recompilation():
            hotswap_adapter(model, first, "default")
            model(tokens())  # the same rank and alpha need no preparing
            hotswap_adapter(model, second, "default")
            with pytest.raises(torch._dynamo.exc.RecompileError):
                model(tokens())


def test_a_model_compiled_in_place_or_in_part(tmp_path):
    first, _ = saved(tmp_path / "first", seed=1)
    second, other = saved(tmp_path / "second", seed=2, r=2)
    for part in ("in place", "a layer"):
        torch._dynamo.reset()
        model = loaded(first)
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        layers = model.base_model.model.layers
        if part == "in place":
            model.compile(fullgraph=True, backend="eager")
        else:
            layers[0] = torch.compile(layers[0], fullgraph=True, backend="eager")
        with torch.no_grad():
            model(tokens())
            with no_recompilation():
                hotswap_adapter(model, second, "default")
                torch.testing.assert_close(model(tokens()), truth(other), rtol=1e-10, atol=1e-12)


# --- PEFT's own way of calling it -----------------------------------------------------------------


def test_keys_with_the_adapters_name_as_diffusers_passes_them(tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down"], use_dora=True)
    model = tiny.randomise(inject_adapter_in_model(config, net(), "style"))
    other = tiny.randomise(get_peft_model(net(), config), seed=4)
    expected = truth(other)
    tensors = {
        re.sub(r"(lora_[AB]|lora_magnitude_vector)", r"\1.style", key).removeprefix(
            "base_model.model."
        ): tensor
        for key, tensor in get_peft_model_state_dict(other).items()
    }
    check_hotswap_configs_compatible(model.peft_config["style"], config)
    hotswap_adapter_from_state_dict(
        model=model, state_dict=tensors, adapter_name="style", config=config
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.interop
def test_pefts_files_are_swapped_in(tmp_path):
    import peft

    first, _ = saved(tmp_path / "first", seed=1)
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=TARGETS)
    theirs = tiny.randomise(peft.get_peft_model(net(), config), seed=5).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = loaded(first)
    hotswap_adapter(model, str(tmp_path / "theirs"), "default", torch_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), theirs(tokens()))
