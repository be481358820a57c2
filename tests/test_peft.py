"""PEFT's public names: what each does to a whole model."""

import copy
import io
import pickle
import tempfile

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
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
    t5,
)
from torch import nn

import lowrank
from lowrank import LoraConfig, PeftModel, get_peft_model
from lowrank.errors import (
    AdapterNameError,
    ConfigError,
    MergeError,
    NotTrainableError,
    TargetError,
)

SCALING = 5 / 3  # of r=3, lora_alpha=5


def adapted(base, **options):
    """`base` with a random adapter, none of its tensors zero."""
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **options}
    )
    return randomise(get_peft_model(base, config))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- the function that the model computes ---------------------------------------------------------

MODELS = {
    "linear": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "linear, every one": (llama, {"target_modules": "all-linear"}),
    "rslora": (gpt2, {"target_modules": ["c_attn"], "use_rslora": True}),
    "dora": (llama, {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "Conv1D, dora": (gpt2, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "embedding": (gpt2, {"target_modules": ["wte", "wpe"]}),
    "embedding, dora": (gpt2, {"target_modules": ["wpe", "c_attn"], "use_dora": True}),
    "lora_bias": (gpt2, {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}),
    "bias lora_only": (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "bias all": (bert, {"target_modules": ["query"], "bias": "all"}),
    "modules_to_save": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe"]}),
    "classifier": (
        llama_classifier,
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ),
    "encoder and decoder": (t5, {"target_modules": ["q", "v", "wo", "encoder.embed_tokens"]}),
    "encoder": (bert, {"target_modules": ["query", "dense"]}),
}


@pytest.mark.parametrize("case", MODELS)
def test_logits_are_those_of_the_merged_weights_in_float64(case):
    build, options = MODELS[case]
    model = adapted(build(), **options)
    truth = logits(model_by_formula(model, build()))
    base = logits(build())
    assert (truth - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), truth, atol=1e-5, rtol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), truth, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), truth, atol=1e-5, rtol=1e-5)


def model_by_formula(model, base):
    config = model.active_peft_config
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return merged_by_hand(base, lowrank.get_peft_model_state_dict(model), scaling)


@pytest.mark.parametrize("case", MODELS)
def test_merged_weights_are_the_formula(case):
    build, options = MODELS[case]
    model = adapted(build(), **options)
    truth = model_by_formula(model, build()).state_dict()
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == truth.keys()
    for name, W in merged.items():
        torch.testing.assert_close(W, truth[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("case", MODELS)
def test_a_new_adapter_changes_nothing(case):
    build, options = MODELS[case]
    model = get_peft_model(build(), LoraConfig(r=3, lora_alpha=5, **options))
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if options.get("use_dora") else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(logits(model), logits(build()), **tolerance)


@settings(max_examples=25)
@given(
    targets=st.sets(
        st.sampled_from(["q_proj", "v_proj", "o_proj", "up_proj", "embed_tokens", "lm_head"]),
        min_size=1,
    ),
    r=st.integers(1, 6),
    lora_alpha=st.floats(0.5, 20),
    use_dora=st.booleans(),
    use_rslora=st.booleans(),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_whatever_the_adapter_it_merges_unmerges_saves_and_loads(
    targets, r, lora_alpha, use_dora, use_rslora, tied, dtype
):
    def build():
        return llama(tied=tied, layers=1, dtype=dtype)

    options = {"r": r, "lora_alpha": lora_alpha, "use_dora": use_dora, "use_rslora": use_rslora}
    model = adapted(build(), target_modules=sorted(targets), **options)
    before, found = bits(model), logits(model)
    if dtype == torch.float64:
        truth = logits(model_by_formula(model, build()))
        torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(build(), folder)
    assert same_bits(bits(loaded), before)
    torch.testing.assert_close(logits(loaded), found, atol=0, rtol=0)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same_bits(bits(model), before)
    merged = logits(model.merge_and_unload())
    tolerance = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.2}[dtype]
    scale = found.abs().max().item() + 1
    torch.testing.assert_close(merged, found, atol=tolerance * scale, rtol=0)


def test_gradients_are_those_of_the_formula_and_reach_nothing_else():
    base = bert()
    model = adapted(bert(), target_modules=["query"])
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    # the same loss, with W + s·B·A put in by functional_call
    leaves, weights = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            leaves[name] = parameter.detach().double().clone().requires_grad_()
        else:
            assert parameter.grad is None
    for name, A in leaves.items():
        if "lora_A" in name:
            path = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            B = leaves[name.replace("lora_A", "lora_B")]
            weights[f"{path}.weight"] = base.get_submodule(path).weight + SCALING * B @ A
    output = torch.func.functional_call(
        base.train(), weights, kwargs={"input_ids": IDS, "labels": IDS}
    )
    output.loss.backward()
    assert len(leaves) == 4
    for name, leaf in leaves.items():
        parameter = model.get_parameter(name)
        assert leaf.grad.abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, leaf.grad, atol=1e-8, rtol=1e-6)


# --- get_peft_model -------------------------------------------------------------------------------


def test_only_the_adapter_is_trainable():
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"]))
    expected = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.default.weight"
        for i in range(2)
        for x in "AB"
    }
    assert trainable(model) == expected


def test_a_model_that_carries_adapters_is_refused():
    model = get_peft_model(llama(), LoraConfig(r=3))
    for carrier in (model, model.get_base_model()):
        with pytest.raises(AdapterNameError, match="already carries adapters"):
            get_peft_model(carrier, LoraConfig(r=3))


def test_a_configuration_that_does_not_fit_leaves_the_model_alone():
    model = llama()
    before, modules = bits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(TargetError, match=r"v_projj.*nearest: v_proj"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_projj"]))
    assert [name for name, _ in model.named_modules()] == modules
    assert same_bits(bits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mixed_is_refused():
    with pytest.raises(ConfigError, match="LoRA only"):
        get_peft_model(llama(), LoraConfig(), mixed=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_are_float32_on_a_16_bit_base_unless_asked_not_to(dtype, autocast):
    model = get_peft_model(llama(dtype=dtype), LoraConfig(r=3), autocast_adapter_dtype=autocast)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32 if autocast else dtype}
    assert logits(model).dtype == dtype


def test_a_base_with_activation_checkpointing_gives_no_deprecation_warning():
    model = llama()
    model.activation_checkpointing_enable()
    peft_model = get_peft_model(model, LoraConfig(r=3))
    lowrank.prepare_model_for_kbit_training(peft_model)


@pytest.mark.parametrize(
    ("task", "build", "head"),
    [
        ("CAUSAL_LM", llama, None),
        ("SEQ_2_SEQ_LM", t5, None),
        ("SEQ_CLS", llama_classifier, "score"),
        ("SEQ_CLS", lambda: bert(transformers.BertForSequenceClassification), "classifier"),
        ("TOKEN_CLS", lambda: bert(transformers.BertForTokenClassification), "classifier"),
        ("QUESTION_ANS", lambda: bert(transformers.BertForQuestionAnswering), "qa_outputs"),
        ("FEATURE_EXTRACTION", lambda: bert(transformers.BertModel), None),
        (None, llama, None),
    ],
)
def test_the_task_chooses_the_class_and_the_head(task, build, head, tmp_path):
    names = {
        "CAUSAL_LM": "PeftModelForCausalLM",
        "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
        "SEQ_CLS": "PeftModelForSequenceClassification",
        "TOKEN_CLS": "PeftModelForTokenClassification",
        "QUESTION_ANS": "PeftModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
        None: "PeftModel",
    }
    model = get_peft_model(build(), LoraConfig(r=3, task_type=task))
    assert type(model).__name__ == names[task]
    assert type(model) is getattr(lowrank, names[task])
    assert model.modules_to_save == ({head} if head else None)
    heads = {name for name in trainable(model) if "lora_" not in name}
    weights = {f"base_model.model.{head}.modules_to_save.default.weight"} if head else set()
    assert {name for name in heads if name.endswith("weight")} == weights
    randomise(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert type(loaded) is type(model)
    for a, b in zip(outputs(loaded), outputs(model), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def outputs(model):
    with torch.no_grad():
        found = model(
            input_ids=IDS, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
        )
    return [value for value in found.values() if isinstance(value, torch.Tensor)]


# --- several adapters -----------------------------------------------------------------------------


def two_adapters(build=llama, **second):
    model = adapted(build())
    second = {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "up_proj"], **second}
    model.add_adapter("other", LoraConfig(**second))
    model.set_adapter("other")
    randomise(model, seed=2)
    model.set_adapter("default")
    return model


def by_formula(model, names, build=llama):
    scalings = {"default": 5 / 3, "other": 6 / 4}
    truth = build()
    for name in names:
        tensors = lowrank.get_peft_model_state_dict(model, adapter_name=name)
        truth = merged_by_hand(truth, tensors, scalings[name])
    return truth


def test_add_adapter_neither_activates_nor_disturbs():
    model = adapted(llama())
    before = logits(model)
    was_trainable = trainable(model)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False))
    assert model.active_adapters == ["default"] == [model.active_adapter]
    assert list(model.peft_config) == ["default", "other"]
    assert trainable(model) == was_trainable
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)


@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"]])
def test_the_active_adapters_act_and_add_up(names):
    model = two_adapters()
    model.set_adapter(names[0] if len(names) == 1 else names)
    assert model.active_adapters == names
    assert model.active_adapter == (names[0] if len(names) == 1 else names)
    truth = logits(by_formula(model, names))
    torch.testing.assert_close(logits(model), truth, atol=1e-5, rtol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), truth, atol=1e-5, rtol=1e-5)


def test_the_active_adapters_are_the_trainable_ones():
    model = two_adapters()
    for names in (["default"], ["other"], ["default", "other"]):
        model.set_adapter(names)
        found = {name.rpartition(".lora_")[2].split(".")[1] for name in trainable(model)}
        assert found == set(names)
    model.set_adapter("other", inference_mode=True)
    assert trainable(model) == set()
    model.set_requires_grad("other")
    assert {name.split(".")[-2] for name in trainable(model)} == {"other"}
    model.set_requires_grad(["other", "default"], requires_grad=False)
    assert trainable(model) == set()


def test_several_active_adapters_train_together():
    model = two_adapters()
    model.set_adapter(["default", "other"])
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: model.get_parameter(name).grad for name in trainable(model)}
    assert len(gradients) == 2 * (2 * 2 + 2 * 2)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_an_adapter_named_twice_acts_once():
    model = two_adapters()
    truth = logits(by_formula(model, ["default", "other"]))
    model.set_adapter(["default", "other", "default"])
    assert model.active_adapters == ["default", "other"]
    torch.testing.assert_close(logits(model), truth, atol=1e-5, rtol=1e-5)
    model.merge_adapter(["default", "default", "other"])
    torch.testing.assert_close(logits(model), truth, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names=["other", "default", "other"])
    torch.testing.assert_close(logits(merged), truth, atol=1e-5, rtol=1e-5)


def test_unknown_and_unusable_names_are_errors():
    model = adapted(llama())
    for act in (model.set_adapter, model.delete_adapter):
        with pytest.raises(AdapterNameError, match="Did you mean 'default'"):
            act("defualt")
    with pytest.raises(AdapterNameError, match="no adapter named 'nope'"):
        model.merge_adapter(["default", "nope"])
    with pytest.raises(AdapterNameError, match="no adapter named 'nope'"):
        model.merge_and_unload(adapter_names=["nope"])
    for name in ("", "a.b", "a/b", "__x", "keys"):
        with pytest.raises(AdapterNameError, match="cannot name an adapter"):
            model.add_adapter(name, LoraConfig(r=2))
    with pytest.raises(AdapterNameError, match="already is an adapter"):
        model.add_adapter("default", LoraConfig(r=2))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(("first", "second"), [("none", "all"), ("lora_only", "none")])
def test_biases_of_the_base_cannot_be_shared_by_two_adapters(first, second):
    model = adapted(gpt2(), target_modules=["c_attn"], bias=first)
    with pytest.raises(ConfigError, match="several adapters cannot share"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["c_attn"], bias=second))


def test_delete_adapter_leaves_no_trace():
    model = two_adapters()
    alone = logits(model)
    model.delete_adapter("other")
    assert not any("other" in name for name, _ in model.named_parameters())
    assert list(model.peft_config) == ["default"]
    torch.testing.assert_close(logits(model), alone, atol=0, rtol=0)
    model.delete_adapter("default")
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert model.active_adapters == []
    torch.testing.assert_close(logits(model), logits(llama()), atol=0, rtol=0)


def test_deleting_the_active_adapter_activates_the_first_that_is_left():
    model = two_adapters()
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert all(".other." in name for name in trainable(model))
    assert trainable(model)


def test_after_the_last_adapter_is_deleted_another_can_be_added():
    model = adapted(llama())
    model.delete_adapter("default")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    truth = merged_by_hand(
        llama(), lowrank.get_peft_model_state_dict(model, adapter_name="other"), 8 / 2
    )
    torch.testing.assert_close(logits(model), logits(truth), atol=1e-5, rtol=1e-5)


def test_deleting_a_merged_adapter_is_refused_and_changes_nothing():
    model = adapted(llama(), modules_to_save=["embed_tokens"])
    model.merge_adapter()
    merged = logits(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default"]
    torch.testing.assert_close(logits(model), merged, atol=0, rtol=0)
    model.unmerge_adapter()
    model.delete_adapter("default")
    torch.testing.assert_close(logits(model), logits(llama()), atol=0, rtol=0)


def test_deleting_or_adding_another_adapter_leaves_a_merge_in_place():
    model = two_adapters()
    model.merge_adapter()
    merged = bits(model)
    model.add_adapter("third", LoraConfig(r=2, target_modules=["q_proj"]))
    model.delete_adapter("third")
    assert same_bits(bits(model), merged)


def test_each_adapter_has_its_own_saved_modules():
    model = two_adapters(modules_to_save=["lm_head"])
    base = logits(adapted(llama()))
    torch.testing.assert_close(logits(model), base, atol=0, rtol=0)
    model.set_adapter("other")
    truth = logits(by_formula(model, ["other"]))
    torch.testing.assert_close(logits(model), truth, atol=1e-5, rtol=1e-5)


def test_two_adapters_with_copies_of_one_module_cannot_both_be_active():
    model = adapted(llama(), modules_to_save=["lm_head"])
    model.add_adapter(
        "other", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    before = logits(model)
    with pytest.raises(AdapterNameError, match="only one"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)


# --- off and on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_disable_adapter_is_the_base_and_comes_back(merged):
    model = adapted(llama(), modules_to_save=["lm_head"])
    if merged:
        model.merge_adapter()
    before, state = logits(model), bits(model)
    base = logits(llama())
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, atol=0, rtol=0)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), base, atol=0, rtol=0)
        torch.testing.assert_close(logits(model), base, atol=0, rtol=0)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    assert same_bits(bits(model), state)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    assert same_bits(bits(model), state)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, atol=0, rtol=0)


def test_disable_and_enable_adapter_layers():
    model = adapted(llama())
    before, was_trainable = logits(model), trainable(model)
    model.disable_adapter_layers()
    torch.testing.assert_close(logits(model), logits(llama()), atol=0, rtol=0)
    with model.disable_adapter():
        pass
    torch.testing.assert_close(logits(model), logits(llama()), atol=0, rtol=0)
    model.enable_adapter_layers()
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    assert trainable(model) == was_trainable


def test_a_merge_of_what_is_no_longer_active_does_not_come_back():
    model = two_adapters()
    model.merge_adapter()
    with model.disable_adapter():
        model.set_adapter("other")
    torch.testing.assert_close(
        logits(model), logits(by_formula(model, ["other"])), atol=1e-5, rtol=1e-5
    )


def test_an_unmerge_while_disabled_stays_unmerged():
    model = adapted(llama())
    unmerged = bits(model)
    model.merge_adapter()
    with model.disable_adapter():
        model.unmerge_adapter()
    assert same_bits(bits(model), unmerged)


def test_a_merge_while_disabled_is_refused():
    model = adapted(llama())
    before = bits(model)
    with model.disable_adapter():
        with pytest.raises(MergeError, match="enable"):
            model.merge_adapter()
        for safe_merge in (True, False):
            with pytest.raises(MergeError, match="enable"):
                model.merge_and_unload(safe_merge=safe_merge)
    assert same_bits(bits(model), before)


def test_disabling_says_that_trained_biases_stay(caplog):
    model = adapted(gpt2(), target_modules=["c_attn"], bias="all")
    with model.disable_adapter():
        pass
    assert "trained biases of the base" in caplog.text


def test_set_adapter_undoes_a_merge_and_says_so(caplog):
    model = two_adapters()
    unmerged = bits(model)
    model.merge_adapter()
    model.set_adapter("other")
    assert same_bits(bits(model), unmerged)
    assert "undoes the merge" in caplog.text
    torch.testing.assert_close(
        logits(model), logits(by_formula(model, ["other"])), atol=1e-5, rtol=1e-5
    )


# --- counting, and what falls through to the base -------------------------------------------------


def test_print_trainable_parameters(capsys):
    model = get_peft_model(llama(tied=True), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    base = sum(parameter.numel() for parameter in llama(tied=True).parameters())
    adapter = 2 * (3 * (24 + 24) + 3 * (24 + 12))
    assert model.get_nb_trainable_parameters() == (adapter, base + adapter)
    model.print_trainable_parameters()
    share = 100 * adapter / (base + adapter)
    assert capsys.readouterr().out == (
        f"trainable params: {adapter:,d} || all params: {base + adapter:,d} || trainable%: {share:.4f}\n"
    )


@pytest.mark.parametrize("build", [llama, t5])
def test_generate_uses_the_adapter(build):
    targets = ["q", "v"] if build is t5 else ["q_proj", "v_proj"]
    model = adapted(build(), target_modules=targets)
    truth = model_by_formula(model, build())
    arguments = {"input_ids": IDS, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**arguments)
    torch.testing.assert_close(tokens, truth.generate(**arguments))
    assert not torch.equal(tokens, build().generate(**arguments))


def test_the_names_that_trainers_ask_for_answer_as_the_base_does():
    base = llama()
    model = get_peft_model(base, LoraConfig(r=3, task_type="CAUSAL_LM"))
    assert model.get_base_model() is base is model.base_model.model
    assert model.config is base.config
    assert model.generation_config is base.generation_config
    assert model.get_input_embeddings() is base.model.embed_tokens
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float64
    assert model.main_input_name == "input_ids"
    assert model.prefix == "lora_"
    assert model.peft_type == "LORA"
    assert model.active_peft_config is model.peft_config["default"]
    assert model.active_peft_config.is_prompt_learning is False
    assert not hasattr(model, "is_quantized")
    assert not hasattr(model, "no_such_name")
    base.is_quantized = True
    assert model.is_quantized
    model.add_model_tags(["lowrank-test"])
    assert base.model_tags == ["lowrank-test"]
    model.activation_checkpointing_enable()
    assert base.is_activation_checkpointing
    model.activation_checkpointing_disable()
    assert not base.is_activation_checkpointing


def test_without_adapter_names_the_active_adapters_act_on_all_rows():
    model = adapted(llama())
    torch.testing.assert_close(
        model(input_ids=IDS, adapter_names=None).logits, logits(model), atol=0, rtol=0
    )


class NoKeywords(nn.Module):
    """A model whose forward takes one tensor and nothing else."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x):
        return self.linear(x)


def test_any_module_can_be_the_base():
    torch.manual_seed(0)
    base = NoKeywords().double()
    W, b = base.linear.weight.clone(), base.linear.bias.clone()
    model = adapted(base, target_modules=["linear"])
    lora = model.base_model.model.linear.lora("default")
    x = torch.randn(2, 5, dtype=torch.float64)
    truth = x @ (W + SCALING * lora.B @ lora.A).T + b
    torch.testing.assert_close(model(x), truth)
    torch.testing.assert_close(model(x, adapter_names=None), truth)


# --- copies ---------------------------------------------------------------------------------------

COPIES = {
    "linear": (llama, {"target_modules": ["q_proj"]}),
    "dora": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "Conv1D, saved": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
}


@pytest.mark.parametrize("case", COPIES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_computes_the_same_and_is_independent(case, how):
    build, options = COPIES[case]
    model = adapted(build(), **options)
    before = logits(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(logits(twin), before, atol=0, rtol=0)
    assert trainable(twin) == trainable(model)
    randomise(twin, seed=5)
    assert not torch.equal(logits(twin), before)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    truth = logits(model_by_formula(twin, build()))
    twin.merge_adapter()
    torch.testing.assert_close(logits(twin), truth, atol=1e-5, rtol=1e-5)


def test_a_copy_of_a_merged_model_can_be_unmerged():
    model = adapted(llama())
    unmerged = bits(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert same_bits(bits(twin), unmerged)
    assert not same_bits(bits(model), unmerged)


def test_state_dict_round_trip():
    model = adapted(llama(), modules_to_save=["lm_head"])
    fresh = get_peft_model(
        llama(seed=9),
        LoraConfig(
            r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]
        ),
    )
    result = fresh.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(logits(fresh), logits(model), atol=0, rtol=0)


@pytest.mark.parametrize("how", ["to", "bfloat16"])
def test_a_merged_model_that_changes_dtype_can_still_be_unmerged(how):
    model = adapted(llama(dtype=torch.float32))
    expected = copy.deepcopy(model).to(torch.bfloat16)
    model.merge_adapter()
    if how == "to":
        model.to(torch.bfloat16)
    else:
        model.bfloat16()
    model.unmerge_adapter()
    assert same_bits(bits(model), bits(expected))
    torch.testing.assert_close(logits(model), logits(expected), atol=0, rtol=0)


# --- training what cannot be trained --------------------------------------------------------------


def saved(tmp_path, **options):
    model = adapted(llama(), **options)
    model.save_pretrained(tmp_path)
    return model


def test_from_pretrained_is_for_inference(tmp_path):
    model = saved(tmp_path)
    loaded = PeftModel.from_pretrained(llama().train(), tmp_path)
    assert trainable(loaded) == set()
    assert not any(module.training for module in loaded.modules())
    assert loaded.peft_config["default"].inference_mode
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)


def test_from_pretrained_can_be_trained_on(tmp_path):
    model = saved(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert trainable(loaded) == trainable(model)
    assert not loaded.peft_config["default"].inference_mode
    loaded.train()
    loss = loaded(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert loaded(input_ids=IDS, labels=IDS).loss < loss


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_an_adapter_loaded_for_inference_is_refused(tmp_path, checkpointing, options):
    saved(tmp_path, **options)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    if (
        checkpointing
    ):  # its hook makes the embeddings require a gradient: backward runs, and trains nothing
        loaded.activation_checkpointing_enable()
        loaded.enable_input_require_grads()
    loaded.train()
    for _ in range(2):
        with pytest.raises(NotTrainableError, match="is_trainable=True"):
            loaded(input_ids=IDS, labels=IDS)
    with torch.no_grad():
        loaded(input_ids=IDS)
    loaded.set_adapter("default")
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    assert all(loaded.get_parameter(name).grad is not None for name in trainable(loaded))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_training_an_adapter_with_biases_loaded_for_inference_is_refused(tmp_path, bias):
    options = {"target_modules": ["c_attn"], "bias": bias, "r": 3}
    model = randomise(get_peft_model(gpt2(), LoraConfig(**options)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path)
    assert trainable(loaded) == set()
    loaded.train()
    with pytest.raises(NotTrainableError):
        loaded(input_ids=IDS, labels=IDS)
    again = PeftModel.from_pretrained(gpt2(), tmp_path, is_trainable=True)
    assert trainable(again) == trainable(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_while_everything_is_merged_is_refused(checkpointing):
    """No gradient reaches an adapter that is in the base weight: the loss would stay where it is."""
    model = adapted(llama())
    if checkpointing:
        model.activation_checkpointing_enable()
    model.merge_adapter()
    model.train()
    with pytest.raises(NotTrainableError, match="unmerge_adapter"):
        model(input_ids=IDS, labels=IDS)
    with torch.no_grad():
        model(input_ids=IDS)
    model.unmerge_adapter()
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_the_refusal_is_asked_again_after_set_adapter(tmp_path):
    model = adapted(llama())
    model.train()
    model(input_ids=IDS)
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(NotTrainableError):
        model(input_ids=IDS)
