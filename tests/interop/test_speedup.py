"""`lowrank.speedup`: PEFT's model with lowrank's forward, against a float64 recomputation and PEFT's own."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.errors import NotPeftError

pytestmark = pytest.mark.interop
peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.up = nn.Linear(13, 29, dtype=dtype)
        self.down = nn.Linear(29, 7, bias=False, dtype=dtype)
        self.table = nn.Embedding(11, 13, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.table(ids))))


def adapted(dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    torch.manual_seed(3)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"], **settings}
    model = peft.get_peft_model(Net(dtype), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


IDS = torch.tensor([[1, 4, 9, 2, 2], [0, 10, 3, 7, 5]])


def truth(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradients of A and B of Σ y², in float64 from the tensors alone."""
    values = {
        name.removeprefix("base_model.model."): tensor.detach().double().requires_grad_()
        for name, tensor in model.state_dict().items()
    }

    def linear(x: Tensor, at: str) -> Tensor:
        W = values[f"{at}.base_layer.weight"]
        B, A = (values[f"{at}.lora_{f}.default.weight"] for f in "BA")
        bias = values.get(f"{at}.base_layer.bias", torch.zeros(W.shape[0], dtype=torch.float64))
        return x @ (W + 5 / 3 * B @ A).T + bias

    y = linear(torch.tanh(linear(values["table.weight"][IDS], "up")), "down")
    y.square().sum().backward()
    return y.detach(), {name: v.grad for name, v in values.items() if "lora_" in name}


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_output_and_gradients_are_right(dtype: torch.dtype, limit: float) -> None:
    model = adapted(dtype)
    assert lowrank.speedup(model).switched == ["base_model.model.up", "base_model.model.down"]
    expected, gradients = truth(model)
    y = model(IDS)
    assert y.dtype == dtype
    assert largest_difference(y, expected) < limit
    y.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32
            short = name.removeprefix("base_model.model.")
            assert largest_difference(parameter.grad, gradients[short]) < limit


def test_it_stays_pefts_model() -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lowrank.speedup(model)
    layer = model.base_model.model.up
    assert isinstance(layer, peft.tuners.lora.layer.Linear)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected = model(IDS)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.base_model.model.up) is type(layer)
        assert torch.equal(copied(IDS), expected)


def test_dropout_draws_the_masks_that_peft_draws() -> None:
    model = adapted(lora_dropout=0.4)
    results = []
    for switch in (False, True):
        if switch:
            lowrank.speedup(model)
        torch.manual_seed(1)
        results.append(model(IDS))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[1], model.eval()(IDS))


UNUSUAL = {
    "DoRA": {"use_dora": True, "target_modules": ["up", "down"]},
    "a bias in B": {"lora_bias": True, "target_modules": ["up"]},
    "an embedding": {"target_modules": ["up", "table"]},
}


@pytest.mark.parametrize("settings", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_layers_go_through_peft(settings: dict) -> None:
    model = adapted(**settings)
    expected = model(IDS)
    found = lowrank.speedup(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-6, atol=1e-6)
    assert found.left == (
        {"base_model.model.table": "Embedding"} if "table" in settings["target_modules"] else {}
    )
    assert ("1 keep PEFT's (Embedding)" in str(found)) == bool(found.left)


def test_states_that_peft_handles() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    plain = copy.deepcopy(model)
    lowrank.speedup(model)
    model.eval(), plain.eval()
    for change in (
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.base_model.disable_adapter_layers(),
    ):
        change(model), change(plain)
        torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-5, atol=1e-6)
    for m in (model, plain):
        m.base_model.enable_adapter_layers()
    mixed = [m(IDS, adapter_names=["other", "__base__"]) for m in (model, plain)]
    torch.testing.assert_close(*mixed, rtol=1e-6, atol=1e-6)


def test_a_hook_on_A_still_runs() -> None:
    model = adapted()
    lowrank.speedup(model)
    seen = []
    model.base_model.model.up.lora_A["default"].register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    model(IDS)
    assert seen == [(2, 5, 3)]


def test_undo() -> None:
    model = adapted()
    before = type(model.base_model.model.up)
    lowrank.speedup(model)
    assert type(model.base_model.model.up) is not before
    lowrank.undo_speedup(model)
    assert type(model.base_model.model.up) is before


def test_what_is_not_pefts_is_refused() -> None:
    with pytest.raises(NotPeftError, match=r"Net has no LoRA layers made by PEFT"):
        lowrank.speedup(Net())
    ours = lowrank.get_peft_model(Net(), lowrank.LoraConfig(target_modules=["up"]))
    with pytest.raises(NotPeftError, match="lowrank's already"):
        lowrank.speedup(ours)
