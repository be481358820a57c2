"""The same model in lowrank and in PEFT: names, what is trainable, losses, gradients, merged weights."""

import warnings

import pytest
import torch
import transformers
from tiny import IDS, bert, gpt2, llama, llama_classifier, randomise, t5
from torch import nn

import lowrank

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # PEFT's own, and transformers' about PEFT's calls
]

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


class Picture(nn.Module):
    """(batch, 3, 8, 8) -> (batch, 4)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(6, 5, (3, 1))
        self.head = nn.Linear(5, 4)

    def forward(self, x, labels=None):
        x = torch.tanh(self.deep(torch.tanh(self.conv(x))))
        return self.head(x.mean((-1, -2)))


def picture():
    torch.manual_seed(0)
    return Picture().double().eval()


def classifier():
    return bert(transformers.BertForTokenClassification)


MODELS = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama, tied": (lambda: llama(tied=True), {"target_modules": "all-linear"}),
    "llama, dora": (llama, {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "llama, saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama, embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama, classifier": (
        llama_classifier,
        {"target_modules": ["v_proj"], "task_type": "SEQ_CLS"},
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, lora_bias": (
        gpt2,
        {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True},
    ),
    "gpt2, bias": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "gpt2, biases of targets": (
        gpt2,
        {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True},
    ),
    "bert, rslora": (bert, {"target_modules": ["query", "value"], "use_rslora": True}),
    "bert, classifier": (classifier, {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
    "t5": (t5, {"target_modules": ["q", "v", "wi"], "task_type": "SEQ_2_SEQ_LM"}),
    "convolution": (picture, {"target_modules": ["conv", "deep", "head"]}),
    "convolution, dora": (picture, {"target_modules": ["conv", "head"], "use_dora": True}),
}


def pair(case, train=False):
    """The two, with the same numbers in every tensor, taken from lowrank's by its name."""
    build, fields = MODELS[case]
    fields = {"r": 3, "lora_alpha": 5, **fields}
    ours = randomise(lowrank.get_peft_model(build(), lowrank.LoraConfig(**fields)))
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**fields))
    theirs.load_state_dict(ours.state_dict())
    return ours.train(train), theirs.train(train)


def loss(model):
    """The model's own loss for labels of the shape that it wants."""
    base = model.get_base_model()
    if isinstance(base, Picture):
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=generator)
        return model(x).square().sum()
    labels = {
        "LlamaForSequenceClassification": IDS[:, 0] % 3,
        "BertForTokenClassification": IDS % 2,
    }.get(type(base).__name__, IDS)
    return model(input_ids=IDS, labels=labels).loss


@pytest.mark.parametrize("case", MODELS)
def test_parameters_and_state_have_the_same_names_shapes_and_flags(case):
    ours, theirs = pair(case)
    for what in ("named_parameters", "named_buffers"):
        found, expected = (
            {
                name: (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
                for name, tensor in getattr(model, what)()
            }
            for model in (ours, theirs)
        )
        assert found == expected
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("case", ["llama", "gpt2, lora_bias", "llama, saved", "convolution, dora"])
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
    ours, theirs = pair("llama, tied")
    ours.print_trainable_parameters()
    printed = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert printed == capsys.readouterr().out


@pytest.mark.parametrize("case", MODELS)
def test_losses_and_gradients_are_equal(case):
    ours, theirs = pair(case, train=True)
    a, b = loss(ours), loss(theirs)
    torch.testing.assert_close(a, b, **CLOSE)
    a.backward()
    b.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        elif expected[name].grad is None:  # a bias that no forward uses
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, **CLOSE, msg=name)


@pytest.mark.parametrize("case", MODELS)
def test_merged_weights_are_equal(case):
    ours, theirs = pair(case)
    ours, theirs = ours.merge_and_unload(), theirs.merge_and_unload()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE, msg=name)


def test_ten_steps_of_adamw_end_at_the_same_numbers():
    losses = []
    for model in pair("llama", train=True):
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


def test_generate_gives_the_same_tokens():
    ours, theirs = pair("llama")
    arguments = {"input_ids": IDS, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**arguments), theirs.generate(**arguments))


def test_the_names_of_pefts_model_are_there():
    """Public attributes and methods that trainers and users call on a PeftModel."""
    ours, theirs = pair("llama")
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
