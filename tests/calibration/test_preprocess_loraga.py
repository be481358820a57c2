"""The gradients that LoRA-GA's preprocessing collects, against plain autograd."""

import pytest
import tiny
import torch
from models import Net
from safetensors.torch import load_file

from lowrank import LoraConfig
from lowrank.calibration.lora_ga import GRADIENT, preprocess_loraga
from lowrank.errors import InitDataError

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(targets=TARGETS, **fields):
    return LoraConfig(r=3, target_modules=targets, init_lora_weights="lora_ga", **fields)


def batches():
    return [tiny.IDS, tiny.IDS[:2, :5]]


def train(model):
    def step():
        for ids in batches():
            model(input_ids=ids, labels=ids).loss.backward()

    return step


def gradients(model, paths):
    model.zero_grad()
    model.requires_grad_(True)
    train(model)()
    found = {path: model.get_submodule(path).weight.grad / len(batches()) for path in paths}
    model.zero_grad()
    return found


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_gradients_are_the_mean_of_all_backward_passes(build):
    targets = TARGETS if build is tiny.llama else ["c_attn", "c_proj"]
    model = build()
    preprocess_loraga(model, config(targets), train(model))
    paths = [path for path, m in model.named_modules() if hasattr(m, GRADIENT)]
    assert len(paths) == 6
    for path, want in gradients(build(), paths).items():
        found = getattr(model.get_submodule(path), GRADIENT)
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, want)


def test_16_bit_gradients_are_added_up_in_float32():
    model = tiny.llama(dtype=torch.bfloat16)
    preprocess_loraga(model, config(), train(model))
    for module in model.modules():
        if hasattr(module, GRADIENT):
            assert getattr(module, GRADIENT).dtype == torch.float32


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails):
    model = tiny.llama().eval()
    model.model.norm.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    before, state = tiny.bits(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    during = []

    def step():
        train(model)()
        during.append([m.training for m in model.modules()])
        during.append([n for n, p in model.named_parameters() if p.requires_grad])
        during.append([n for n, p in model.named_parameters() if p.grad is not None])
        torch.rand(2)
        if fails:
            raise KeyError("x")

    if fails:
        with pytest.raises(KeyError):
            preprocess_loraga(model, config(), step)
    else:
        preprocess_loraga(model, config(), step)
    assert all(during[0])
    assert len(during[1]) == 6
    assert all(name.endswith(tuple(f"{t}.weight" for t in TARGETS)) for name in during[1])
    assert during[2] == []  # each gradient leaves the device when it is complete
    assert tiny.same_bits(tiny.bits(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.lm_head.weight.grad is kept
    assert model.model.layers[0].mlp.down_proj.weight.grad is None


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_cache_is_written_once_and_read_after_that(tmp_path, suffix):
    path = tmp_path / f"new/gradients.{suffix}"
    model, again = tiny.llama(), tiny.llama()
    preprocess_loraga(model, config(), train(model), path)
    preprocess_loraga(again, config(), lambda: pytest.fail("is not run"), str(path))
    tensors = load_file(path) if suffix == "safetensors" else torch.load(path)
    for name, tensor in tensors.items():
        module = again.get_submodule(name.removesuffix(f".{GRADIENT}"))
        torch.testing.assert_close(getattr(module, GRADIENT), tensor)
    assert len(tensors) == 6
    with pytest.raises(InitDataError, match="another model or configuration"):
        preprocess_loraga(tiny.llama(layers=3), config(), lambda: None, path)


def test_layers_without_a_gradient_are_named():
    model = tiny.llama()
    with pytest.raises(
        InitDataError, match=r"layers.0.self_attn.q_proj: train_step passed no grad"
    ):
        preprocess_loraga(model, config(), lambda: None)
    zero = Net()
    for layer in zero.layers:
        torch.nn.init.zeros_(layer.down.weight)
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(InitDataError, match=r"layers.0.up: its gradient is zero"):
        preprocess_loraga(zero, config(["up"]), lambda: zero(tokens).sum().backward())
    with pytest.raises(InitDataError, match="needs a LoraConfig with init_lora_weights='lora_ga'"):
        preprocess_loraga(model, LoraConfig(), train(model))
