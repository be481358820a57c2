"""The same model in lowrank and in PEFT: state dicts, training, several adapters, generation, names."""

import warnings

import pytest
import torch
from features import FEATURES
from tiny import IDS, llama, randomise

import lowrank

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # PEFT's own, and transformers' about PEFT's calls
]

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def pair(case, train=False):
    """The two, with the same numbers in every tensor, taken from lowrank's by its name."""
    feature = FEATURES[case]
    fields = {"r": 3, "lora_alpha": 5, **feature.fields}
    ours = randomise(lowrank.get_peft_model(feature.build(), lowrank.LoraConfig(**fields)))
    theirs = peft.get_peft_model(feature.build(), peft.LoraConfig(**fields))
    theirs.load_state_dict(ours.state_dict())
    return ours.train(train), theirs.train(train)


def loss(model):
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize(
    "case", ["linear", "lora_bias on Conv1D, ranks by layer", "modules_to_save"]
)
def test_state_dicts_load_into_each_other(case):
    ours, theirs = pair(case)
    expected = loss(ours).item()
    randomise(theirs, seed=8)
    result = theirs.load_state_dict(ours.state_dict(), strict=True)
    assert not result.missing_keys
    assert loss(theirs).item() == pytest.approx(expected, rel=1e-6)
    randomise(theirs, seed=9)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert loss(ours).item() == pytest.approx(loss(theirs).item(), rel=1e-6)


def test_print_trainable_parameters_prints_the_same(capsys):
    ours, theirs = pair("all-linear, tied")
    ours.print_trainable_parameters()
    printed = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert printed == capsys.readouterr().out


def test_ten_steps_of_adamw_end_at_the_same_numbers():
    losses = []
    for model in pair("linear", train=True):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        found = []
        for _ in range(10):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            optimizer.step()
            found.append(value.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_several_adapters_and_what_is_active():
    models = []
    for library in (lowrank, peft):
        model = library.get_peft_model(
            llama(), library.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
        )
        model.add_adapter("other", library.LoraConfig(r=4, target_modules=["v_proj", "up_proj"]))
        models.append(model)
    ours, theirs = models
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.set_adapter("other")
    randomise(ours)
    ours.set_adapter("default")
    randomise(ours, seed=2)
    theirs.load_state_dict(ours.state_dict())
    for names in ("default", "other", ["default", "other"]):
        ours.set_adapter(names)
        theirs.base_model.set_adapter(names)
        torch.testing.assert_close(loss(ours), loss(theirs), **CLOSE)
        flags = [{n for n, p in m.named_parameters() if p.requires_grad} for m in models]
        assert flags[0] == flags[1]
        with ours.disable_adapter(), theirs.disable_adapter():
            torch.testing.assert_close(loss(ours), loss(theirs), **CLOSE)
        for model in models:
            model.merge_adapter()
        torch.testing.assert_close(loss(ours), loss(theirs), **CLOSE)
        for model in models:
            model.unmerge_adapter()
    for model in models:
        model.delete_adapter("other")
    ours.set_adapter("default")
    theirs.set_adapter("default")
    torch.testing.assert_close(loss(ours), loss(theirs), **CLOSE)


def test_rows_of_a_batch_through_different_adapters():
    fields = {"lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
    models = []
    for library in (lowrank, peft):
        model = library.get_peft_model(llama(), library.LoraConfig(r=3, **fields))
        model.add_adapter("other", library.LoraConfig(r=4, use_rslora=True, **fields))
        models.append(model.eval())
    ours, theirs = models
    for name in ("default", "other"):
        ours.set_adapter(name)
        randomise(ours, seed=len(name))
    theirs.load_state_dict(ours.state_dict())
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        a, b = (model(input_ids=IDS, adapter_names=names).logits for model in models)
    torch.testing.assert_close(a, b, **CLOSE)


def test_generate_gives_the_same_tokens():
    ours, theirs = pair("linear")
    arguments = {"input_ids": IDS, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**arguments), theirs.generate(**arguments))


def test_the_names_of_pefts_model_are_there():
    """Public attributes and methods that trainers and users call on a PeftModel."""
    ours, theirs = pair("linear")
    absent = {
        # of other methods than LoRA
        "get_prompt", "get_prompt_embedding_to_save", "base_model_torch_dtype", "uses_shared_state",
        "subtract_mutated_init", "supports_lora_conversion",
        # how PEFT's tuners are built
        "inject_adapter", "target_module_mapping", "tuner_layer_cls", "get_model_config",
        "prepare_model_for_gradient_checkpointing", "has_active_enabled_adapter",
        # not there yet
        "get_layer_status", "get_model_status",
    }  # fmt: skip
    names = {
        name
        for model in (theirs, theirs.base_model)
        for kind in type(model).__mro__
        if kind.__module__.startswith("peft.")
        for name in vars(kind)
        if not name.startswith("_")
    }
    assert {name for name in names if not hasattr(ours, name)} == absent


def test_prepare_model_for_kbit_training_leaves_the_same_flags():
    flags = []
    for library in (lowrank, peft):
        base = library.prepare_model_for_kbit_training(llama(dtype=torch.bfloat16))
        model = library.get_peft_model(base, library.LoraConfig(r=3, target_modules=["q_proj"]))
        flags.append({(n, p.requires_grad, p.dtype) for n, p in model.named_parameters()})
    # PEFT casts 16-bit weights of a plain model too
    assert flags[0] == flags[1]


def test_ours_gives_no_warning_where_pefts_do():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lowrank.get_peft_model(llama(), lowrank.LoraConfig(r=3))
        model.merge_adapter()
        model.merge_adapter()
        model.unmerge_adapter()
        model.unmerge_adapter()
        model.merge_and_unload()
