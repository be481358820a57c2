"""torch.compile of an adapted model: one graph, the same numbers, and compiled again only when something else runs."""

import contextlib
import copy

import pytest
import tiny
import torch
from models import Net
from torch import nn

from lowrank import LoraConfig, get_peft_model

TOKENS = torch.tensor([[1, 4, 9], [2, 10, 3]])
METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "up"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "up"]},
    "dropout": {"lora_dropout": 0.3},
    "embedding": {"target_modules": ["embed", "up"]},
    "modules_to_save": {"modules_to_save": ["head"]},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def adapted(dtype=torch.float64, **fields) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "up"], **fields}
    )
    return tiny.randomise(get_peft_model(Net(layers=1).to(dtype), config))


def no_recompilation():
    return torch._dynamo.config.patch(error_on_recompile=True)


def step(model, run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One training step's loss and gradients; `run` is the model, or its compiled self."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = run(TOKENS).square().sum()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_a_training_step_in_one_graph(fields):
    model = adapted(**fields).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for first in (True, False):
        with contextlib.nullcontext() if first else no_recompilation():
            found, found_gradients = step(model, compiled)
        eager = copy.deepcopy(model)
        loss, gradients = step(eager, eager)
        torch.testing.assert_close(found, loss, rtol=1e-10, atol=1e-12)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-9, atol=1e-11)
        with torch.no_grad():  # other values in the same tensors
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("fields", [METHODS["lora"], METHODS["dora"]], ids=["lora", "dora"])
def test_a_bfloat16_base_in_one_graph(fields):
    model = adapted(torch.bfloat16, **fields).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        off = (compiled(TOKENS).double() - exact(TOKENS)).norm() / exact(TOKENS).norm()
    assert off < 5 * 2.0**-8


def test_several_adapters_switching_disabling_and_merging():
    model = adapted().eval()
    for name, r in (("second", 2), ("third", 4)):
        model.add_adapter(name, LoraConfig(r=r, lora_alpha=7, target_modules=["q_proj", "up"]))
        model.set_adapter(name)
        tiny.randomise(model, seed=r)
    states = {
        "one": lambda: model.set_adapter("default", inference_mode=True),
        "another": lambda: model.set_adapter("second", inference_mode=True),
        "several": lambda: model.base_model.set_adapter(["default", "third"], inference_mode=True),
        "disabled": model.base_model.disable_adapter_layers,
        "enabled": model.base_model.enable_adapter_layers,
        "merged": model.merge_adapter,
        "unmerged": model.unmerge_adapter,
    }
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for name, change in states.items():
            change()
            torch.testing.assert_close(compiled(TOKENS), model(TOKENS), msg=name)
        with no_recompilation():  # what ran once is not compiled again
            for change in (states["one"], states["another"], states["several"]):
                change()
                torch.testing.assert_close(compiled(TOKENS), model(TOKENS))


def test_a_training_step_of_a_language_model():
    model = tiny.llama(layers=1, attention_bias=True)
    config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = tiny.randomise(get_peft_model(model, config)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = model(input_ids=tiny.IDS, labels=tiny.IDS).loss
    found = compiled(input_ids=tiny.IDS, labels=tiny.IDS).loss
    torch.testing.assert_close(found, loss)
    (expected,) = torch.autograd.grad(loss, [model.get_parameter(_a_factor(model))])
    (gradient,) = torch.autograd.grad(found, [model.get_parameter(_a_factor(model))])
    torch.testing.assert_close(gradient, expected)


def _a_factor(model) -> str:
    return next(name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.slow
# torch's own mkldnn module still has it
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_inductor(fields):
    model = adapted(torch.float32, **{**fields, "lora_dropout": 0.0}).train()
    compiled = torch.compile(model, fullgraph=True)
    loss, gradients = step(model, model)
    found, found_gradients = step(model, compiled)
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-3, atol=1e-4)
