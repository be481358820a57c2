"""An adapter's tensors out of a model and into one: keys, what does not fit, and resized vocabularies."""

import pytest
import tiny
import torch
import transformers
from tiny import (
    IDS,
    bert,
    bits,
    gpt2,
    llama,
    llama_classifier,
    logits,
    merged_by_hand,
    randomise,
    same_bits,
)
from torch import nn

import lowrank
from lowrank import LoraConfig, LoraLayer, PeftModel, get_peft_model
from lowrank import get_peft_model_state_dict as state_of
from lowrank import set_peft_model_state_dict as load_state
from lowrank.errors import (
    AdapterMismatchError,
    BaseMismatchError,
    LowrankError,
    MergeError,
    ShapeError,
)
from lowrank.saved_module import ModulesToSaveWrapper

PREFIX = "base_model.model."
EXACT = {"atol": 0, "rtol": 0}


def adapted(base, **options):
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **options}
    return randomise(get_peft_model(base, LoraConfig(**options)))


# --- keys -----------------------------------------------------------------------------------------


def test_keys_and_shapes_are_pefts():
    model = adapted(llama(layers=1), target_modules=["q_proj", "v_proj"], use_dora=True)
    attention = f"{PREFIX}model.layers.0.self_attn"
    assert {key: tuple(tensor.shape) for key, tensor in state_of(model).items()} == {
        f"{attention}.q_proj.lora_A.weight": (3, 24),
        f"{attention}.q_proj.lora_B.weight": (24, 3),
        f"{attention}.q_proj.lora_magnitude_vector": (24,),
        f"{attention}.v_proj.lora_A.weight": (3, 24),
        f"{attention}.v_proj.lora_B.weight": (12, 3),
        f"{attention}.v_proj.lora_magnitude_vector": (12,),
    }


def test_keys_of_embeddings_biases_and_saved_modules():
    model = adapted(
        gpt2(),
        target_modules=["wpe", "h.0.attn.c_attn"],
        modules_to_save=["ln_f"],
        bias="lora_only",
    )
    assert {key: tuple(tensor.shape) for key, tensor in state_of(model).items()} == {
        f"{PREFIX}transformer.wpe.lora_embedding_A": (3, 64),
        f"{PREFIX}transformer.wpe.lora_embedding_B": (24, 3),
        f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight": (3, 24),
        f"{PREFIX}transformer.h.0.attn.c_attn.lora_B.weight": (72, 3),
        f"{PREFIX}transformer.h.0.attn.c_attn.base_layer.bias": (72,),
        f"{PREFIX}transformer.ln_f.weight": (24,),
        f"{PREFIX}transformer.ln_f.bias": (24,),
    }


def test_keys_of_lora_bias():
    model = adapted(gpt2(), target_modules=["h.0.attn.c_attn"], lora_bias=True)
    assert f"{PREFIX}transformer.h.0.attn.c_attn.lora_B.bias" in state_of(model)


def test_each_adapter_gives_its_own_tensors():
    model = adapted(llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    assert {tensor.shape[0] for key, tensor in state_of(model).items() if "lora_A" in key} == {3}
    other = state_of(model, adapter_name="other")
    assert {key.split(".")[-3] for key in other} == {"up_proj"}
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    found = other[f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"]
    assert torch.equal(found, layer.lora_A["other"].weight)


@pytest.mark.parametrize("name", ["weight", "lora_A", "0", "q_proj", "a-b c"])
def test_names_that_look_like_parts_of_keys(name, tmp_path):
    model = randomise(
        get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"], use_dora=True), name)
    )
    plain = adapted(llama(), target_modules=["q_proj"], use_dora=True)
    assert state_of(model, adapter_name=name).keys() == state_of(plain).keys()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name)
    torch.testing.assert_close(logits(loaded), logits(model), **EXACT)


def test_a_state_dict_that_a_trainer_gathered_is_used():
    model = adapted(llama())
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    for key, tensor in state_of(model, state_dict=state).items():
        torch.testing.assert_close(tensor, state_of(model)[key] + 1, **EXACT)
    state.popitem()
    lost = next(name for name in state if "lora_A" in name)
    del state[lost]
    with pytest.raises(AdapterMismatchError, match="lacks 1 of the adapter's 8 tensors"):
        state_of(model, state_dict=state)


def test_a_compiled_model_is_unwrapped():
    model = adapted(llama())

    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = model

    assert state_of(Compiled(), unwrap_compiled=True).keys() == state_of(model).keys()


# --- loading what does not fit --------------------------------------------------------------------


def fresh(**options):
    return adapted(llama(), **options)


def test_loading_gives_the_same_model():
    source, target = adapted(llama()), fresh()
    randomise(target, seed=3)
    result = load_state(target, state_of(source))
    assert result == ([], [])
    torch.testing.assert_close(logits(target), logits(source), **EXACT)


def test_everything_that_does_not_fit_is_in_one_error_and_nothing_is_loaded():
    source = state_of(adapted(llama()))
    first, second, third = [key for key in source if "lora_A" in key][:3]
    broken = dict(source)
    del broken[first]
    broken[second] = torch.zeros(5, 24)
    broken[third.replace("lora_A", "lora_C")] = broken.pop(third)
    broken["base_model.model.extra.lora_A.weight"] = torch.zeros(1)
    target = fresh()
    before = bits(target)
    with pytest.raises(AdapterMismatchError) as error:
        load_state(target, broken)
    text = str(error.value)
    for key in (first, second, third, third.replace("lora_A", "lora_C"), "extra.lora_A.weight"):
        assert key.removeprefix(PREFIX) in text
    assert "5 of 10 tensors" in text
    assert "2 missing" in text
    assert "2 in the file but not in the model" in text
    assert "file (5, 24)   model (3, 24)" in text
    assert "strict=False" in text
    assert same_bits(bits(target), before)
    assert isinstance(error.value, ValueError)


def test_half_of_the_keys_missing():
    source = state_of(adapted(llama()))
    half = dict(list(source.items())[: len(source) // 2])
    target = fresh()
    before = state_of(target)
    before = {key: tensor.clone() for key, tensor in before.items()}
    with pytest.raises(AdapterMismatchError, match="4 missing from the file"):
        load_state(target, half)
    result = load_state(target, half, strict=False)
    assert sorted(result.missing_keys) == sorted(set(source) - set(half))
    assert result.unexpected_keys == []
    for key, tensor in state_of(target).items():
        assert torch.equal(tensor, half.get(key, before[key]))


def test_extra_keys():
    source = state_of(adapted(llama()))
    extra = {**source, f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(3, 24)}
    with pytest.raises(
        AdapterMismatchError, match=r"1 in the file but not in the model:\n.*layers\.7"
    ):
        load_state(fresh(), extra)
    target = fresh()
    result = load_state(target, extra, strict=False)
    assert result.unexpected_keys == [f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight"]
    torch.testing.assert_close(logits(target), logits(adapted(llama())), **EXACT)


def test_a_long_list_is_cut_short():
    source = state_of(adapted(llama(layers=6)))
    with pytest.raises(AdapterMismatchError) as error:
        load_state(adapted(llama(layers=6), r=4), source)
    assert "24 of another shape" in str(error.value)
    assert "… and 16 more" in str(error.value)
    assert len(str(error.value).splitlines()) < 14


def test_wrong_shapes_are_errors_even_if_not_strict():
    source = state_of(adapted(llama(), r=4))
    target = fresh()
    before = bits(target)
    with pytest.raises(AdapterMismatchError, match="of another shape"):
        load_state(target, source, strict=False)
    assert same_bits(bits(target), before)
    load_state(target, source, ignore_mismatched_sizes=True)
    assert same_bits(bits(target), before)


def test_a_near_miss_is_named():
    source = state_of(adapted(llama()))
    key = next(iter(source))
    wrong = key.replace("self_attn", "attn")
    with pytest.raises(AdapterMismatchError, match=f"Did you mean.*{key.removeprefix(PREFIX)}"):
        load_state(fresh(), {wrong if k == key else k: v for k, v in source.items()})


def test_tensors_take_the_dtype_of_the_parameters_that_they_fill():
    source = state_of(adapted(llama()))
    target = adapted(llama(dtype=torch.float32))
    load_state(target, {key: tensor.half() for key, tensor in source.items()})
    for key, tensor in state_of(target).items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, source[key].half().float(), **EXACT)


def test_loading_copies():
    source = {key: tensor.clone() for key, tensor in state_of(adapted(llama())).items()}
    for low_memory in (False, True):
        target = get_peft_model(
            llama(),
            LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
            low_cpu_mem_usage=low_memory,
        )
        load_state(target, source)
        randomise(target)
        again = state_of(adapted(llama()))
        assert all(torch.equal(source[key], again[key]) for key in source)


# --- from_pretrained: after a failure the model is as it was --------------------------------------


def structure(model):
    return [(name, type(module), id(module)) for name, module in model.named_modules()]


def flags(model):
    return [(id(p), p.requires_grad) for p in model.parameters()]


def saved(folder, base=None, **options):
    model = adapted(base or llama(), **options)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["norm", "lm_head"]}, {"use_dora": True}]
)
@pytest.mark.parametrize("trained_base", [True, False])
def test_after_a_failed_load_the_model_is_as_it_was(tmp_path, options, trained_base):
    saved(tmp_path, **options)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {k: v.clone() for k, v in lowrank.read_adapter(tmp_path).tensors.items()}
    config = lowrank.read_adapter(tmp_path).config
    tensors.popitem()
    file.unlink()
    lowrank.write_adapter(tmp_path, lowrank.Adapter(config, tensors, {}))
    base = llama()
    base.train()
    base.model.embed_tokens.weight.requires_grad_(trained_base)
    before = structure(base), flags(base), bits(base)
    with pytest.raises(AdapterMismatchError, match="1 missing"):
        PeftModel.from_pretrained(base, tmp_path)
    assert structure(base) == before[0]
    assert flags(base) == before[1]
    assert same_bits(bits(base), before[2])
    assert all(module.training for module in base.modules())
    model = saved(tmp_path, **options)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), **EXACT)


def test_another_base_of_the_same_shape_is_refused(tmp_path):
    model = saved(tmp_path)
    base = llama(seed=1)
    before = structure(base), flags(base), bits(base)
    with pytest.raises(BaseMismatchError, match="another base") as error:
        PeftModel.from_pretrained(base, tmp_path)
    assert "check_base=False" in str(error.value)
    assert "layers.0.self_attn.q_proj" in str(error.value)
    assert structure(base) == before[0]
    assert flags(base) == before[1]
    assert same_bits(bits(base), before[2])
    forced = PeftModel.from_pretrained(base, tmp_path, check_base=False)
    truth = merged_by_hand(llama(seed=1), state_of(model), 5 / 3)
    torch.testing.assert_close(logits(forced), logits(truth), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_the_same_base_in_another_dtype_is_accepted(tmp_path, dtype, first):
    saved(tmp_path, llama(dtype=torch.float32).to(first))
    loaded = PeftModel.from_pretrained(llama(dtype=torch.float32).to(dtype), tmp_path)
    assert logits(loaded).dtype == dtype


def test_load_adapter_that_fails_leaves_the_others(tmp_path):
    saved(tmp_path, r=4)
    model = adapted(llama(seed=1))
    before, expected = structure(model), logits(model)
    with pytest.raises(BaseMismatchError):
        model.load_adapter(tmp_path, "other")
    assert [entry[:2] for entry in structure(model)] == [entry[:2] for entry in before]
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    torch.testing.assert_close(logits(model), expected, **EXACT)


def test_load_adapter_into_new_layers_that_fails_takes_them_out_again(tmp_path):
    saved(tmp_path, target_modules=["up_proj"], modules_to_save=["lm_head"])
    model = adapted(llama(seed=1))
    before = structure(model), flags(model)
    with pytest.raises(BaseMismatchError):
        model.load_adapter(tmp_path, "other")
    assert (structure(model), flags(model)) == before


def test_from_pretrained_on_a_model_with_adapters_is_refused_and_keeps_them(tmp_path):
    saved(tmp_path)
    model = adapted(llama(seed=1))
    before = structure(model), flags(model), logits(model)
    for carrier in (model, model.get_base_model()):
        for name in ("default", "other"):
            with pytest.raises(LowrankError, match="already"):
                PeftModel.from_pretrained(carrier, tmp_path, adapter_name=name)
    assert (structure(model), flags(model)) == before[:2]
    torch.testing.assert_close(logits(model), before[2], **EXACT)


def test_strict_false_loads_what_fits(tmp_path):
    source = saved(tmp_path)
    adapter = lowrank.read_adapter(tmp_path)
    key = next(key for key in adapter.tensors if "v_proj.lora_B" in key)
    tensors = {k: v for k, v in adapter.tensors.items() if k != key}
    lowrank.write_adapter(tmp_path, adapter._replace(tensors=tensors))
    loaded = PeftModel.from_pretrained(llama(), tmp_path, strict=False)
    found = state_of(loaded)
    for k, tensor in state_of(source).items():
        assert torch.equal(found[k], tensor) == (k != key)
    assert found[key].abs().max() == 0  # as it starts
    result = loaded.load_adapter(tmp_path, "again", strict=False)
    assert result.missing_keys == [key]
    assert not any(parameter.is_meta for parameter in loaded.parameters())


# --- load_adapter ---------------------------------------------------------------------------------


def test_load_adapter_beside_another(tmp_path):
    source = saved(tmp_path, target_modules=["up_proj", "q_proj"])
    model = adapted(llama(), r=4)
    before, was_trainable = (
        logits(model),
        {n for n, p in model.named_parameters() if p.requires_grad},
    )
    result = model.load_adapter(tmp_path, "other")
    assert result == ([], [])
    assert model.active_adapters == ["default"]
    torch.testing.assert_close(logits(model), before, **EXACT)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == was_trainable
    assert model.peft_config["other"].inference_mode
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(source), **EXACT)


def test_load_adapter_into_an_existing_name_replaces_its_tensors(tmp_path):
    source = saved(tmp_path)
    model = adapted(llama())
    randomise(model, seed=4)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(model), logits(source), **EXACT)
    # as in PEFT: a Trainer that loads its best checkpoint leaves an adapter that can be trained on
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.set_requires_grad("default", False)
    model.load_adapter(tmp_path, "default")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize(
    "other", [{"lora_alpha": 6}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 9}}]
)
def test_load_adapter_into_a_name_of_another_scaling_is_refused(tmp_path, other):
    """The tensors fit, and would mean something else."""
    saved(tmp_path)
    model = adapted(llama(), **other)
    before = bits(model)
    with pytest.raises(AdapterMismatchError, match=next(iter(other))):
        model.load_adapter(tmp_path, "default")
    assert same_bits(bits(model), before)


# --- resized vocabularies -------------------------------------------------------------------------


@pytest.fixture
def on_disk(tmp_path):
    """A function that loads the tiny base from a folder, as people do, tied or not."""

    def load(tied):
        folder = tmp_path / ("tied" if tied else "untied")
        if not folder.exists():
            llama(tied=tied).save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    return load


NEW = 101
RESIZED = {
    "attention": {},
    "embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "embed_tokens saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def resize(model):
    torch.manual_seed(3)  # the new rows are random
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


def ids():
    return torch.tensor([[1, 95, 7, 99, 33], [100, 4, 6, 94, 10]])


def output(model):
    with torch.no_grad():
        return model(input_ids=ids()).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", RESIZED)
def test_a_vocabulary_resized_before_get_peft_model_is_saved(case, tied, on_disk, tmp_path):
    model = adapted(resize(on_disk(tied)), **RESIZED[case])
    expected = output(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(resized_otherwise(on_disk(tied)), tmp_path / "adapter")
    torch.testing.assert_close(output(loaded), expected, **EXACT)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(output(merged), expected, atol=1e-5, rtol=1e-5)


def resized_otherwise(model):
    """Resized by someone else: the new rows are not those that were trained on."""
    torch.manual_seed(77)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_resized_after_get_peft_model_is_saved(tied, on_disk, tmp_path):
    model = adapted(on_disk(tied))
    resize(model)
    expected = output(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(resized_otherwise(on_disk(tied)), tmp_path / "adapter")
    torch.testing.assert_close(output(loaded), expected, **EXACT)


def test_a_vocabulary_resized_in_a_model_without_a_name_is_saved(tmp_path):
    model = adapted(llama())
    resize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(resized_otherwise(llama()), tmp_path)
    torch.testing.assert_close(output(loaded), output(model), **EXACT)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", RESIZED)
def test_an_unresized_base_is_told_what_to_do(case, tied, on_disk, tmp_path):
    model = adapted(resize(on_disk(tied)), **RESIZED[case])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterMismatchError, match=rf"resize_token_embeddings\({NEW}\)"):
        PeftModel.from_pretrained(on_disk(tied), tmp_path / "adapter")


def test_an_unchanged_vocabulary_is_not_saved(on_disk):
    for tied in (False, True):
        assert all("lora_" in key for key in state_of(adapted(on_disk(tied))))
    assert all("lora_" in key for key in state_of(adapted(llama())))


def test_an_unchanged_vocabulary_of_a_model_of_several_parts_is_not_saved():
    """Its size is in the configuration of the language model within."""
    config = transformers.LlavaConfig(
        text_config=llama().config,
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4,
        ),
        image_token_index=92,
    )  # fmt: skip
    base = transformers.LlavaForConditionalGeneration(config)
    model = adapted(base, target_modules=["language_model.layers.0.self_attn.q_proj"])
    assert all("lora_" in key for key in state_of(model))
    model.resize_token_embeddings(NEW)
    assert [key for key in state_of(model) if "lora_" not in key]


def test_embeddings_are_saved_or_not_on_demand(on_disk):
    model = adapted(resize(on_disk(False)))
    assert f"{PREFIX}lm_head.weight" in state_of(model)
    assert all("lora_" in key for key in state_of(model, save_embedding_layers=False))
    tensors = state_of(adapted(on_disk(False)), save_embedding_layers=True)
    assert {key for key in tensors if "lora_" not in key} == {
        f"{PREFIX}model.embed_tokens.weight",
        f"{PREFIX}lm_head.weight",
    }


def test_a_merged_model_saves_its_unmerged_embeddings(tmp_path):
    model = adapted(llama(), target_modules=["embed_tokens", "lm_head"])
    expected = state_of(model, save_embedding_layers=True)
    model.merge_adapter()
    found = state_of(model, save_embedding_layers=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_merged_model_saves_its_unmerged_biases():
    model = adapted(gpt2(), target_modules=["c_attn"], bias="lora_only", lora_bias=True)
    expected = {key: tensor.clone() for key, tensor in state_of(model).items()}
    model.merge_adapter()
    found = state_of(model)
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_tying_again_leaves_an_adapter_on_the_output_in_place():
    """What transformers does after a resize, accelerate after loading: lm_head.weight = embed_tokens.weight."""
    model = adapted(llama(tied=True), target_modules=["lm_head", "q_proj"])
    names, expected = list(model.state_dict()), logits(model)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        model.tie_weights()
        assert list(model.state_dict()) == names
        torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)
    model.unmerge_adapter()
    base = model.get_base_model()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight


def test_tying_again_leaves_a_saved_output_in_place():
    model = adapted(llama(tied=True), modules_to_save=["lm_head"])
    names, expected = list(model.state_dict()), logits(model)
    model.tie_weights()
    assert list(model.state_dict()) == names
    torch.testing.assert_close(logits(model), expected, **EXACT)


def test_resizing_under_an_adapter_on_the_tied_output_is_refused():
    model = adapted(llama(tied=True), target_modules=["lm_head"])
    with pytest.raises(ShapeError, match="before"):
        model.resize_token_embeddings(NEW)


# --- everything that a saved module holds ---------------------------------------------------------


class Normed(nn.Module):
    """A network whose saved module has buffers, one of them a whole number without dimensions."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))

    def forward(self, x):
        return self.head(self.body(x))


def test_buffers_of_saved_modules_are_saved(tmp_path):
    def build():
        torch.manual_seed(0)
        return Normed().double()

    model = adapted(build(), target_modules=["body"], modules_to_save=["head"])
    model.train()
    x = torch.randn(7, 6, dtype=torch.float64)
    for _ in range(3):
        model(x)
    model.eval()
    assert f"{PREFIX}head.0.num_batches_tracked" in state_of(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(loaded(x), model(x), **EXACT)
    assert loaded.base_model.model.head.modules_to_save["default"][0].num_batches_tracked == 3
    assert isinstance(loaded.base_model.model.head, ModulesToSaveWrapper)


def test_classifiers_and_encoders_round_trip(tmp_path):
    for build, options in [
        (llama_classifier, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
        (bert, {"target_modules": ["query"], "bias": "all"}),
    ]:
        folder = tmp_path / build.__name__
        model = saved(folder, build(), **options)
        loaded = PeftModel.from_pretrained(build(), folder)
        torch.testing.assert_close(logits(loaded), logits(model), **EXACT)
        assert any(isinstance(module, LoraLayer) for module in loaded.modules())
        assert loaded(input_ids=IDS).logits.dtype == torch.float64


# --- the base's own tensors -----------------------------------------------------------------------


def test_the_bases_tensors_by_the_names_that_they_had():
    base = tiny.llama()
    before = tiny.bits(base)
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model = tiny.randomise(get_peft_model(base, config))
    assert tiny.same_bits(lowrank.get_base_model_state_dict(model), before)
    model.merge_adapter()
    assert tiny.same_bits(lowrank.get_base_model_state_dict(model), before)
    with pytest.raises(MergeError, match="unmerge_adapter"):
        lowrank.set_base_model_state_dict(model, before)
    model.unmerge_adapter()
    other = {name: tensor + 1 for name, tensor in before.items()}
    assert lowrank.set_base_model_state_dict(model, other) == ([], [])
    assert tiny.same_bits(tiny.bits(model.unload()), other)


def test_tensors_that_do_not_fit_the_base_change_nothing():
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    tensors = lowrank.get_base_model_state_dict(model)
    before = tiny.bits(model)
    wrong = {**tensors, "lm_head.weight": torch.ones(2, 3)}
    with pytest.raises(AdapterMismatchError, match=r"lm_head\.weight"):
        lowrank.set_base_model_state_dict(model, wrong, strict=False)
    fewer = {name: t + 1 for name, t in tensors.items() if name != "lm_head.weight"}
    with pytest.raises(AdapterMismatchError, match="These tensors do not fit"):
        lowrank.set_base_model_state_dict(model, {**fewer, "more": torch.ones(1)})
    assert tiny.same_bits(tiny.bits(model), before)
    result = lowrank.set_base_model_state_dict(model, {**fewer, "more": torch.ones(1)}, False)
    assert result == (["lm_head.weight"], ["more"])
