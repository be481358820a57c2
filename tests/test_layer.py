"""What a LoraLayer does beside the numbers of test_kinds_by_methods.py: memory, dropout, modes, many adapters."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from models import AttentionNet, ConvNet, Net
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank import get_peft_model
from lowrank.config import LoraConfig
from lowrank.errors import AdapterNameError, MergeError
from lowrank.inject import eject, inject
from lowrank.layer import LoraLayer
from lowrank.targets import plan
from lowrank.wrappers import adapter_parameters, lora_layers


def adapt(model: nn.Module, *targets: str, name: str = "default", moved: bool = True, **options):
    """`model` with one more active adapter, away from where it started."""
    config = LoraConfig(target_modules=list(targets), **{"r": 3, "lora_alpha": 5, **options})
    inject(model, plan(model, config), name, init=config.init_lora_weights)
    for key, parameter in adapter_parameters(model):
        if moved and f".{name}" in key:
            with torch.no_grad():
                if "magnitude" in key:
                    parameter *= torch.rand_like(parameter) + 0.6
                else:
                    parameter.copy_(torch.randn_like(parameter) / 2)
    for _, layer in lora_layers(model):
        layer.set_adapter([*layer.active_adapters, name])
    return model


def only(model: nn.Module) -> LoraLayer:
    [(_, layer)] = lora_layers(model)
    return layer


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


# --- the big tensors stay in the base's dtype -----------------------------------------------------


class Float32Made(TorchDispatchMode):
    """The sizes of the float32 tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_a_bfloat16_linear_makes_no_float32_copy_of_x_y_or_W(options):
    model = adapt(nn.Sequential(nn.Linear(64, 48)).bfloat16(), "0", r=2, **options)
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    with Float32Made() as made:
        model(x).float().sum().backward()
    # y.float() is the loss's own; A, B and their gradients are the largest of ours
    assert sorted(set(made.sizes))[-2:] == [2 * 64, 40 * 48]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_backward_saves_nothing_of_xs_size_in_float32(options):
    model = adapt(nn.Sequential(nn.Linear(64, 48)).bfloat16(), "0", r=2, **options)
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    assert max([t.numel() for t in saved if t.dtype == torch.float32], default=0) <= 2 * 64


def test_adapters_can_be_kept_in_the_bases_dtype():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).bfloat16()
    config = LoraConfig(target_modules=["0"])
    inject(model, plan(model, config), "low", cast_to_float32=False)
    assert {p.dtype for _, p in adapter_parameters(model)} == {torch.bfloat16}
    inject(model, plan(model, config), "high")
    assert {p.dtype for k, p in adapter_parameters(model) if "high" in k} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_default_dtype_of_an_adapter_is_float32_but_float64_on_a_float64_base(dtype):
    model = adapt(nn.Sequential(nn.Linear(6, 5)).to(dtype), "0", use_dora=True)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for _, p in adapter_parameters(model)} == {expected}


def test_a_small_change_of_doras_magnitude_is_not_rounded_away_in_bfloat16():
    """m/‖V‖ = 1.003 is 1 in bfloat16, and the whole effect of the magnitude would be gone."""
    torch.manual_seed(1)
    model = adapt(
        nn.Sequential(nn.Linear(64, 48, bias=False)).bfloat16(), "0", moved=False, use_dora=True
    )
    with torch.no_grad():
        x = torch.randn(500, 64, dtype=torch.bfloat16)
        before = model(x)
        only(model).lora_magnitude_vector["default"].weight.mul_(1.003)
        growth = (model(x).double() * before.double()).sum() / before.double().square().sum()
    assert growth == pytest.approx(1.003, abs=3e-4)


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_drops_entries_of_x_and_doubles_the_others():
    model = adapt(nn.Sequential(nn.Linear(200, 7)), "0", lora_dropout=0.5)
    layer = only(model)
    lora, x = layer.lora("default"), torch.randn(30, 200)
    with torch.no_grad():
        model.train()
        torch.manual_seed(5)
        y = model(x)
        torch.manual_seed(5)
        dropped = F.dropout(x, 0.5)  # checked below: the library's own draw
        kept = dropped != 0
        assert torch.equal(dropped[kept], 2 * x[kept])
        assert 0.45 < kept.float().mean() < 0.55
        W, A, B = layer.base_layer.weight.double(), lora.A.double(), lora.B.double()
        expected = x.double() @ W.T + layer.base_layer.bias + dropped.double() @ A.T @ B.T * 5 / 3
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)

        model.eval()
        expected = x.double() @ (W + 5 / 3 * B @ A).T + layer.base_layer.bias
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_dropout_with_dora_acts_on_the_low_rank_path_alone():
    """y = c·(W·x + s·B·A·dropout(x)) + b, c = m / ‖W + s·B·A‖: the base's own W·x is not dropped from."""
    model = adapt(nn.Sequential(nn.Linear(20, 7)), "0", lora_dropout=0.5, use_dora=True).train()
    layer, x = only(model), torch.randn(6, 20)
    lora, W = layer.lora("default"), layer.base_layer.weight
    with torch.no_grad():
        torch.manual_seed(5)
        y = model(x)
        torch.manual_seed(5)
        dropped = F.dropout(x, 0.5)
        c = lora.magnitude / (W + 5 / 3 * lora.B @ lora.A).norm(dim=1)
        expected = c * (x @ W.T + 5 / 3 * dropped @ lora.A.T @ lora.B.T) + layer.base_layer.bias
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv", "attention"])
def test_activation_checkpointing_gives_the_same_gradients(kind):
    layer, x = {
        "linear": (nn.Linear(7, 5), torch.randn(4, 7)),
        "embedding": (nn.Embedding(7, 5), torch.tensor([3, 1, 6])),
        "conv": (nn.Conv1d(7, 5, 2), torch.randn(2, 7, 4)),
        "attention": (nn.MultiheadAttention(6, 2), torch.randn(3, 2, 6)),
    }[kind]
    names = ["layer", "out_proj"] if kind == "attention" else ["layer"]
    dropout = 0.0 if kind == "attention" else 0.5
    model = adapt(nn.ModuleDict({"layer": layer}), *names, lora_dropout=dropout)
    for _, wrapped in lora_layers(model):
        wrapped.set_requires_grad("default")

    def run(x: Tensor) -> Tensor:
        return model["layer"](x, x, x)[0] if kind == "attention" else model["layer"](x)

    grads = []
    for call in (run, lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)):
        torch.manual_seed(3)
        call(x).square().sum().backward()
        grads.append([p.grad.clone() for _, p in adapter_parameters(model)])
        model.zero_grad()
    assert all(g.any() for g in grads[0])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_dropout_of_an_embedding_drops_whole_tokens():
    model = adapt(nn.Sequential(nn.Embedding(13, 6)), "0", lora_dropout=0.5)
    layer = only(model)
    lora, tokens = layer.lora("default"), torch.randint(13, (20, 30))
    model.train()
    with torch.no_grad():
        change = model(tokens).double() - layer.base_layer(tokens).double()
    full = (lora.B.double() @ lora.A.double() * 5 / 3).T[tokens]
    dropped = change.abs().amax(-1) < 1e-6
    assert 0.4 < dropped.double().mean() < 0.6
    torch.testing.assert_close(change[~dropped], 2 * full[~dropped], rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad():
        change = model(tokens).double() - layer.base_layer(tokens).double()
    torch.testing.assert_close(change, full.detach(), rtol=1e-4, atol=1e-5)


def test_dropout_of_a_convolution_acts_on_its_input():
    model = adapt(nn.Sequential(nn.Conv1d(4, 6, 1)), "0", lora_dropout=0.5)
    layer, x = only(model), torch.randn(3, 4, 50)
    lora = layer.lora("default")
    with torch.no_grad():
        model.train()
        torch.manual_seed(5)
        y = model(x)
        torch.manual_seed(5)
        dropped = F.dropout(x, 0.5)
        change = torch.einsum("or,ri,bit->bot", lora.B, lora.A, dropped) * 5 / 3
        torch.testing.assert_close(y, layer.base_layer(x) + change, rtol=1e-4, atol=1e-5)


def test_an_adapter_added_in_eval_mode_does_not_drop():
    model = nn.Sequential(nn.Linear(50, 6), nn.Linear(6, 3)).eval()
    adapt(model, "0", lora_dropout=0.5)
    x = torch.randn(9, 50)
    assert torch.equal(model(x), model(x))
    assert not any(module.training for module in model.modules())
    adapt(model.train(), "1", name="other", lora_dropout=0.5)
    assert all(module.training for module in model.modules())


# --- being called, read and copied as the base layer was ------------------------------------------


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(7, 5), torch.ones(2, 7)),
        (nn.Embedding(7, 5), torch.tensor([3, 1])),
        (nn.Conv1d(7, 5, 2), torch.ones(2, 7, 4)),
    ],
    ids=["linear", "embedding", "conv"],
)
def test_the_input_may_be_given_by_keyword(layer, x, keyword):
    model = adapt(nn.ModuleDict({"layer": layer}), "layer")
    y = model["layer"](x)
    assert torch.equal(y, model["layer"](input=x))
    assert not torch.allclose(y, layer(x))


def test_attention_may_be_called_by_keyword():
    model = adapt(nn.ModuleDict({"layer": nn.MultiheadAttention(6, 2)}), "layer")
    x = torch.randn(4, 2, 6)
    y, weights = model["layer"](x, x, x)
    y2, weights2 = model["layer"](query=x, key=x, value=x)
    assert torch.equal(y, y2)
    assert torch.equal(weights, weights2)


def test_attributes_of_the_base_layer_answer_as_before():
    layer = only(adapt(nn.Sequential(nn.Linear(7, 5)), "0"))
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    with pytest.raises(AttributeError, match="no_such"):
        _ = layer.no_such
    assert not hasattr(layer, "reset_parameters")


@pytest.mark.parametrize("build", [Net, ConvNet, AttentionNet])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_and_a_pickle_do_the_same(build, how):
    model = build()
    names = {
        Net: ["embed", "q_proj", "head"],
        ConvNet: ["conv1", "conv2", "head"],
        AttentionNet: ["self_attn", "out_proj", "linear1"],
    }[build]
    adapt(model, *names, use_dora=True)
    x = {
        Net: torch.tensor([[1, 4, 9]]),
        ConvNet: torch.randn(2, 3, 8, 9),
        AttentionNet: torch.randn(2, 5, 12),
    }[build]
    same = how(model)
    assert torch.equal(same(x), model(x))
    adapt(same, *names, name="second")  # and it is no half of a model
    for _, layer in lora_layers(same):
        layer.merge()
        layer.unmerge()
    before = model(x)
    with torch.no_grad():
        for _, parameter in adapter_parameters(same):
            parameter.zero_()
    assert torch.equal(model(x), before)


def test_it_prints_what_it_is():
    text = repr(adapt(nn.Sequential(nn.Linear(7, 5)), "0"))
    assert "kind='linear'" in text
    assert "'default': 3" in text


# --- torch's own transformer layers ---------------------------------------------------------------


PARTS = ["self_attn", "out_proj", "linear1", "linear2"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("method", ["lora", "dora", "lora_bias"])
@pytest.mark.parametrize(
    "parts", [*([part] for part in PARTS), ["linear1", "linear2"], PARTS], ids="+".join
)
def test_the_fused_path_of_an_encoder_layer_has_the_adapters_in_it(parts, method, monkeypatch):
    """In eval mode torch's TransformerEncoderLayer takes the weights of its parts and calls none of them."""
    fused = []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: fused.append(1) or kernel(*a)
    )
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(12, 4, 18, dropout=0.0, batch_first=True), 2
    )
    for name, parameter in encoder.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    plain = copy.deepcopy(encoder).double()
    options = {"lora": {}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}[method]
    model = adapt(nn.ModuleDict({"encoder": encoder}), *parts, **options)
    state = plain.state_dict()
    for path, layer in lora_layers(model):
        name = path.removeprefix("encoder.").replace(".base_layer", "") + "."
        name += "in_proj_" if path.endswith("self_attn") else ""
        lora = layer.lora("default")
        V = state[name + "weight"] + 5 / 3 * lora.B.detach().double() @ lora.A.detach().double()
        if lora.magnitude is not None:
            V = lora.magnitude.detach().double()[:, None] * V / V.norm(dim=1, keepdim=True)
        state[name + "weight"] = V
        if lora.bias is not None:
            state[name + "bias"] = state[name + "bias"] + 5 / 3 * lora.bias.detach().double()
    plain.load_state_dict(state)

    x = torch.randn(3, 5, 12)
    padded = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    for masks in ({}, {"src_key_padding_mask": padded}):
        expected = plain.train()(x.double(), **masks).detach()
        real = ~padded if masks else torch.ones_like(padded)
        y = encoder.train()(x, **masks)
        torch.testing.assert_close(y[real].double(), expected[real], rtol=1e-4, atol=1e-5)
        encoder.eval()
        fused.clear()
        with torch.no_grad():
            y = encoder(x, **masks)
        torch.testing.assert_close(y[real].double(), expected[real], rtol=1e-4, atol=1e-5)
        assert len(fused) == 2
        y = encoder(x, **masks)
        torch.testing.assert_close(y[real].double(), expected[real], rtol=1e-4, atol=1e-5)


# --- several adapters -----------------------------------------------------------------------------


def three_adapters(layer: nn.Module, dora: tuple[bool, bool, bool]) -> nn.Module:
    model = nn.Sequential(layer)
    for name, use_dora in zip("abc", dora, strict=True):
        adapt(model, "0", name=name, use_dora=use_dora, r=2 + ord(name) - ord("a"))
    return model


@pytest.mark.parametrize("dora", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv", "own forward"])
def test_several_adapters_add_up_in_any_order(kind, dora):
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    layer, x = {
        "linear": (nn.Linear(7, 5), torch.randn(4, 7)),
        "embedding": (nn.Embedding(7, 5), torch.tensor([3, 1, 6])),
        "conv": (nn.Conv1d(7, 5, 2), torch.randn(2, 7, 4)),
        "own forward": (Own(7, 5), torch.randn(4, 7)),
    }[kind]
    model = three_adapters(layer.double(), dora)
    x = x.double() if x.is_floating_point() else x
    wrapped = only(model)
    with torch.no_grad():
        base = layer(x)
        change = 0
        for name in "abc":
            wrapped.set_adapter(name)
            change = change + model(x) - base
        for order in itertools.permutations("abc"):
            wrapped.set_adapter(order)
            torch.testing.assert_close(model(x), base + change, rtol=1e-12, atol=1e-12)
            wrapped.merge()
            torch.testing.assert_close(model(x), base + change, rtol=1e-12, atol=1e-12)
            wrapped.unmerge()


def test_only_the_active_adapters_act_and_train():
    model = three_adapters(nn.Linear(7, 5), (False, True, False))
    layer, x = only(model), torch.randn(4, 7)
    layer.set_adapter(["a", "b"])
    trained = {key.split(".")[2] for key, p in adapter_parameters(model) if p.requires_grad}
    assert trained == {"a", "b"}
    layer.set_adapter("c", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    layer.set_adapter([])
    assert torch.equal(model(x), layer.base_layer(x))
    layer.set_adapter("unknown here")  # another layer may have it
    assert torch.equal(model(x), layer.base_layer(x))


def test_merging_one_by_one_rounds_once():
    """The merged weight is made from the unmerged one, whatever was merged before."""
    layer = nn.Linear(40, 30).bfloat16()
    model = three_adapters(layer, (False, False, False))
    wrapped = only(model)
    W = layer.weight.double()
    exact = W + sum(
        5 / r * wrapped.lora(n).B.double() @ wrapped.lora(n).A.double()
        for n, r in (("a", 2), ("b", 3), ("c", 4))
    )
    for name in "abc":
        wrapped.merge(adapter_names=[name])
    assert wrapped.merged_adapters == ["a", "b", "c"]
    off = (layer.weight.double() - exact).abs()
    assert (off <= 2.0**-8 * exact.abs() + 1e-5).all()
    wrapped.unmerge()
    assert bits(layer.weight) == bits(W.bfloat16())


def test_a_thousand_merges_leave_every_bit():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer = nn.Linear(9, 6).to(dtype)
        model = adapt(nn.Sequential(layer), "0", lora_bias=True)
        before, bias = bits(layer.weight), bits(layer.bias)
        for _ in range(1000):
            only(model).merge()
            only(model).unmerge()
        assert bits(layer.weight) == before
        assert bits(layer.bias) == bias


def test_a_merge_that_is_not_finite_leaves_the_base_alone():
    layer = nn.Linear(9, 6).half()
    model = adapt(nn.Sequential(layer), "0")
    before = bits(layer.weight)
    with torch.no_grad():
        only(model).lora_B["default"].weight.fill_(3e4)
    with pytest.raises(MergeError, match="NaN or infinity"):
        only(model).merge()
    assert bits(layer.weight) == before
    assert not only(model).merged


def test_dora_left_active_beside_a_merge_is_refused():
    """Its c multiplies W's own output, which a merge changes."""
    model = three_adapters(nn.Linear(7, 5), (False, True, False))
    with pytest.raises(MergeError, match="DoRA"):
        only(model).merge(adapter_names=["a"])


def test_lora_left_active_beside_a_merge_adds_up():
    model = three_adapters(nn.Linear(7, 5).double(), (False, False, True))
    layer, x = only(model), torch.randn(4, 7, dtype=torch.double)
    y = model(x)
    layer.merge(adapter_names=["a", "c"])
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_a_float64_bias_is_merged_in_float64():
    model = adapt(nn.Sequential(nn.Linear(7, 5).double()), "0", lora_bias=True)
    layer = only(model)
    expected = layer.base_layer.bias + 5 / 3 * layer.lora_B["default"].bias.detach()
    layer.merge()
    torch.testing.assert_close(
        layer.base_layer.bias, expected, rtol=1e-15, atol=1e-15, check_dtype=False
    )


def test_deleting_a_merged_adapter_is_refused():
    model = adapt(nn.Sequential(nn.Linear(7, 5)), "0")
    only(model).merge()
    with pytest.raises(MergeError, match="unmerge"):
        only(model).delete_adapter("default")
    only(model).unmerge()
    only(model).delete_adapter("default")
    assert not list(adapter_parameters(model))


def test_an_adapter_of_the_same_name_is_refused():
    model = adapt(nn.Sequential(nn.Linear(7, 5)), "0")
    with pytest.raises(AdapterNameError, match="already"):
        adapt(model, "0")


@pytest.mark.parametrize(
    "name",
    ["", "a.b", "a/b", "__class__", "keys", "forward", "training", "get", "copy", "_modules"],
)
def test_a_name_that_cannot_be_part_of_a_parameters_name_is_refused(name):
    model = nn.Sequential(nn.Linear(7, 5), nn.Embedding(7, 5))
    with pytest.raises(AdapterNameError):
        adapt(model, "0", "1", name=name)
    assert not list(adapter_parameters(model))


@pytest.mark.parametrize(
    "name", ["lora_A", "weight", "default.".strip("."), "0", "base_layer", "größe 2"]
)
def test_an_unusual_name_works(name):
    model = adapt(nn.Sequential(nn.Linear(7, 5), nn.Embedding(7, 5)), "0", "1", name=name)
    for _, layer in lora_layers(model):
        assert list(layer.r) == [name]
        layer.delete_adapter(name)
        assert not list(layer.r)


def test_scales():
    model = adapt(nn.Sequential(nn.Linear(7, 5).double()), "0")
    layer, x = only(model), torch.randn(4, 7, dtype=torch.double)
    base, change = layer.base_layer(x), model(x) - layer.base_layer(x)
    layer.scale_layer(3.0)
    torch.testing.assert_close(model(x), base + 3 * change)
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(model(x), base + change / 2)
    layer.scale_layer(4.0)
    layer.unscale_layer(2.0)
    torch.testing.assert_close(model(x), base + change)
    layer.scale_layer(7.0)
    layer.unscale_layer()
    torch.testing.assert_close(model(x), base + change)


def test_get_delta_weight_has_the_weights_own_shape():
    model = adapt(ConvNet(), "conv2")
    layer = only(model)
    lora = layer.lora("default")
    expected = (5 / 3 * lora.B.double() @ lora.A.double()).view(layer.base_layer.weight.shape)
    torch.testing.assert_close(
        layer.get_delta_weight("default").double(), expected, rtol=1e-5, atol=1e-6
    )


# --- modules under two names, and leaving -----------------------------------------------------------


def test_a_module_under_two_names_is_wrapped_under_both():
    model = nn.Module()
    model.one = model.two = nn.Linear(7, 5)
    model.list = nn.ModuleList([model.one])
    adapt(model, "one")
    assert isinstance(model.one, LoraLayer)
    assert model.one is model.two is model.list[0]
    assert len(list(adapter_parameters(model))) == 2
    eject(model)
    assert isinstance(model.one, nn.Linear)
    assert model.one is model.two is model.list[0]


def test_eject_leaves_the_base_model_alone():
    model = AttentionNet()
    before = {name: (id(p), bits(p)) for name, p in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    adapt(model, "self_attn", "out_proj", "linear1", "head")
    eject(model)
    assert {name: (id(p), bits(p)) for name, p in model.named_parameters()} == before
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_parameters_have_pefts_names():
    model = adapt(Net(layers=1), "embed", "q_proj", use_dora=True)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {
        "embed.lora_embedding_A.default",
        "embed.lora_embedding_B.default",
        "embed.lora_magnitude_vector.default.weight",
        "layers.0.q_proj.lora_A.default.weight",
        "layers.0.q_proj.lora_B.default.weight",
        "layers.0.q_proj.lora_magnitude_vector.default.weight",
    }
    assert "layers.0.q_proj.base_layer.weight" in model.state_dict()


def test_max_norm_of_an_embedding_acts_on_the_merged_rows():
    model = adapt(nn.Sequential(nn.Embedding(7, 5, max_norm=1.0)), "0")
    layer, tokens = only(model), torch.tensor([[3, 1], [3, 6]])
    lora = layer.lora("default")
    W = layer.base_layer.weight.detach().double().clone()  # max_norm rewrites W itself in forward
    rows = (W + 5 / 3 * (lora.B.double() @ lora.A.double()).T)[tokens]
    norm = rows.norm(dim=-1, keepdim=True)
    expected = torch.where(norm > 1, rows / norm, rows).detach()
    torch.testing.assert_close(
        model(tokens).double(), expected, rtol=1e-5, atol=1e-6, check_dtype=False
    )
    assert torch.equal(layer.base_layer.weight.double(), W)
    model(tokens).sum().backward()
    assert torch.isfinite(layer.lora_embedding_A["default"].grad).all()


def test_autocast():
    """Under autocast x is float32 and y bfloat16."""
    model = adapt(Net(), "embed", "q_proj", "down", "head", use_dora=True)
    tokens = torch.randint(11, (3, 5))
    exact = copy.deepcopy(model).double()(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(tokens)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.03
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for _, p in adapter_parameters(model))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_weight_that_is_in_8_bits_between_forwards(use_dora):
    """diffusers' layerwise casting: the base layer is cast before its forward, and back after it."""
    torch.manual_seed(0)
    base = nn.Linear(7, 5, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    base.register_forward_pre_hook(lambda module, args: module.to(torch.bfloat16) and None)
    base.register_forward_hook(lambda module, args, y: module.to(torch.float8_e4m3fn) and None)
    W, b = base.weight.double(), base.bias.double()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=use_dora)
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    assert {p.dtype for p in layer.adapter_parameters("default").values()} == {torch.float32}
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    lora = layer.lora("default")
    V = W + 1.5 * lora.B.double() @ lora.A.double()
    V = V / V.norm(dim=1, keepdim=True) * W.norm(dim=1, keepdim=True) if use_dora else V
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    found = model(x)
    torch.testing.assert_close(found.double(), x.double() @ V.T + b, atol=3e-2, rtol=2e-2)
    assert base.weight.dtype == torch.float8_e4m3fn
    model.merge_adapter()
    torch.testing.assert_close(base.weight.double(), V, atol=1e-2, rtol=2**-3)
