"""Adapters whose start is taken out of W: ΔW = s·(B·A − B₀·A₀), with W itself untouched."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lowrank import LoraConfig, PeftModel, get_peft_model, read_adapter
from lowrank.combine import combine
from lowrank.errors import AdapterFileError, AdapterMismatchError, CombineError, TargetError
from lowrank.wrappers import lora_layers
from tests import tiny

INITS = ["pissa", "pissa_niter_4", "olora"]
METHODS = [{}, {"use_rslora": True}, {"use_dora": True}]
R, ALPHA = 3, 5


def config(init="pissa", **options):
    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=init, **options
    )


def trained(base, settings, seed=1):
    """A model whose adapter was moved a little from where it started, as training does."""
    model = get_peft_model(base, settings).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def by_hand(base, model, name="default"):
    """A float64 copy of `base` with W + s·(B·A − B₀·A₀) in place of W; DoRA: m·V/‖V‖."""
    exact = copy.deepcopy(base).double()
    for path, layer in lora_layers(model):
        path = path.removeprefix("base_model.model.")
        module = exact.get_submodule(path)
        A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        A_0 = layer.lora_start_A.get_buffer(name).double()
        B_0 = layer.lora_start_B.get_buffer(name).double()
        V = module.weight + layer.scaling[name] * (B @ A - B_0 @ A_0)
        if layer.use_dora[name]:
            V = (
                layer.lora_magnitude_vector[name].weight.double()[:, None]
                * V
                / V.norm(dim=1)[:, None]
            )
        module.weight = nn.Parameter(V.detach())
    return exact


def close(a, b, tolerance=2e-6):
    assert ((a.double() - b.double()).norm() / b.double().norm()) < tolerance


# --- in a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", INITS)
def test_the_model_starts_as_its_base_to_the_bit(init, dtype):
    base = tiny.llama(dtype=dtype)
    before, bits = tiny.logits(base), tiny.bits(base)
    model = get_peft_model(base, config(init))
    assert torch.equal(tiny.logits(model), before)
    for _, layer in lora_layers(model):
        assert layer.lora_A["default"].weight.norm() > 0
        assert layer.lora_B["default"].weight.norm() > 0
        assert layer.lora_A["default"].weight.dtype == torch.float32
    assert tiny.same_bits(tiny.bits(model.unload()), bits)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("init", INITS)
def test_a_trained_model_computes_w_plus_the_change_from_the_start(init, method):
    base = tiny.llama(dtype=torch.float32)
    plain, before = copy.deepcopy(base), tiny.logits(base)
    model = trained(base, config(init, **method))
    exact = tiny.logits(by_hand(plain, model))
    assert (exact - before).norm() > 1e-3 * before.norm()
    close(tiny.logits(model), exact)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), before)
    model.merge_adapter()
    close(tiny.logits(model), exact)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), before)
    model.unmerge_adapter()
    close(tiny.logits(model), exact)
    close(tiny.logits(model.merge_and_unload()), exact)


def test_gradients_are_those_of_a_and_b():
    base = tiny.llama(dtype=torch.float64, layers=1)
    model = trained(base, config())
    layer = dict(lora_layers(model))["base_model.model.model.layers.0.mlp.down_proj"]
    x = torch.randn(4, 40, dtype=torch.float64)
    layer(x).square().sum().backward()
    A, B = (
        getattr(layer, name)["default"].weight.detach().clone().requires_grad_()
        for name in ("lora_A", "lora_B")
    )
    A_0, B_0 = (
        getattr(layer, name).get_buffer("default") for name in ("lora_start_A", "lora_start_B")
    )
    W = layer.base_layer.weight.detach() + ALPHA / R * (B @ A - B_0 @ A_0)
    (x @ W.T).square().sum().backward()
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, A.grad)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, B.grad)
    assert layer.base_layer.weight.grad is None


def test_a_cast_to_bfloat16_rounds_the_change_and_not_the_start():
    """[A; A₀], [B, −B₀] in bfloat16 would be off by 2⁻⁹ of B·A, which is far more than the change."""
    torch.manual_seed(0)
    linear = nn.Linear(65, 33, bias=False).bfloat16()
    model = get_peft_model(
        nn.Sequential(linear),
        LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="pissa"),
    )
    [(_, layer)] = lora_layers(model)
    with torch.no_grad():
        for holder in (layer.lora_A, layer.lora_B):
            weight = holder["default"].weight
            weight += 1e-4 * torch.randn_like(weight)
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    A_0 = layer.lora_start_A.get_buffer("default").double()
    B_0 = layer.lora_start_B.get_buffer("default").double()
    change = B @ A - B_0 @ A_0
    lora = layer.lora("default")
    rounded = lora.B.bfloat16().double() @ lora.A.bfloat16().double()
    naive = B.bfloat16().double() @ A.bfloat16().double()
    naive -= B_0.bfloat16().double() @ A_0.bfloat16().double()
    assert (rounded - change).norm() < 2.0**-8 * change.norm()
    assert (naive - change).norm() > change.norm()


def test_rows_of_a_batch_mix_with_other_ranks():
    base = tiny.llama(dtype=torch.float32)
    plain = copy.deepcopy(base)
    model = trained(base, config())
    model.add_adapter("same_r", config(True))
    model.add_adapter("double_r", config("gaussian", rank_pattern={"q_proj": 2 * R}))
    model.add_adapter("olora", config("olora"))
    model.set_adapter(["same_r", "double_r", "olora"])
    tiny.randomise(model)
    names = ["default", "same_r", "double_r", "olora", "__base__"]
    ids = tiny.IDS[[0, 1, 2, 0, 1]]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for i, name in enumerate(names[:4]):
            model.set_adapter(name)
            close(mixed[i], model(input_ids=ids[i : i + 1]).logits[0])
        close(mixed[4], plain(input_ids=ids[4:]).logits[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_start(copied):
    model = trained(tiny.llama(dtype=torch.float32), config())
    assert torch.equal(tiny.logits(copied(model)), tiny.logits(model))


def test_the_start_is_a_buffer_and_moves_with_the_model():
    model = trained(tiny.llama(dtype=torch.float32), config())
    buffers = [name for name, _ in model.named_buffers() if "lora_start" in name]
    assert len(buffers) == 2 * 6
    assert all(name.rpartition(".")[2] == "default" for name in buffers)
    assert not any(name in dict(model.named_parameters()) for name in buffers)
    model.double()
    assert {b.dtype for n, b in model.named_buffers() if "lora_start" in n} == {torch.float64}
    state = model.state_dict()
    other = get_peft_model(tiny.llama(dtype=torch.float64), config("olora")).eval()
    other.load_state_dict(state)
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    model.add_adapter("other", config())
    model.delete_adapter("default")
    assert not any(name.endswith("default") for name, _ in model.named_buffers())


def test_a_rank_above_the_weights_is_refused_with_the_path():
    settings = config(rank_pattern={"q_proj": 30})
    with pytest.raises(TargetError, match=r"(?s)layers\.0\.self_attn\.q_proj.*fewer"):
        get_peft_model(tiny.llama(), settings)


def test_a_base_on_the_meta_device_gets_a_start_there():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(7, 5))
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["0"], init_lora_weights="pissa"))
    [(_, layer)] = lora_layers(model)
    assert layer.lora_start_A.get_buffer("default").device.type == "meta"


# --- in files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("init", INITS)
def test_saved_and_loaded_it_is_the_same(init, method, tmp_path):
    model = trained(tiny.llama(dtype=torch.float32), config(init, **method))
    model.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path)
    assert saved.config.init_lora_weights == init
    assert saved.config.r == R
    assert saved.start.keys() == {k for k in saved.tensors if "magnitude" not in k}
    base = tiny.llama(dtype=torch.float32)
    state = torch.get_rng_state()
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_without_the_file_beside_it_the_start_is_computed_again(init, tmp_path):
    model = trained(tiny.llama(dtype=torch.float32), config(init))
    model.save_pretrained(tmp_path)
    (tmp_path / "lora_start.safetensors").unlink()
    again = PeftModel.from_pretrained(tiny.llama(dtype=torch.float32), tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_without_the_file_a_start_that_cannot_be_computed_is_an_error(tmp_path, caplog):
    model = trained(tiny.llama(dtype=torch.float32), config("pissa_niter_4"))
    model.save_pretrained(tmp_path)
    assert "as_plain_lora=True" in caplog.text
    (tmp_path / "lora_start.safetensors").unlink()
    base = tiny.llama(dtype=torch.float32)
    with pytest.raises(AdapterFileError, match=r"(?s)'pissa_niter_4'.*lora_start\.safetensors"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not list(lora_layers(base))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("init", INITS)
def test_as_plain_lora_it_belongs_to_the_untouched_base(init, method, tmp_path):
    settings = config(init, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 7}, **method)
    base = tiny.llama(dtype=torch.float32)
    plain = copy.deepcopy(base)
    model = trained(base, settings)
    model.save_pretrained(tmp_path, as_plain_lora=True)
    saved = read_adapter(tmp_path)
    assert saved.config.init_lora_weights is True
    assert (saved.config.r, saved.config.rank_pattern) == (2 * R, {"q_proj": 10})
    assert not saved.start
    assert not (tmp_path / "lora_start.safetensors").exists()
    again = PeftModel.from_pretrained(tiny.llama(dtype=torch.float32), tmp_path)
    for (_, one), (_, other) in zip(lora_layers(model), lora_layers(again), strict=True):
        assert other.scaling["default"] == pytest.approx(one.scaling["default"], rel=1e-12)
    close(tiny.logits(again), tiny.logits(by_hand(plain, model)))


def test_pefts_way_to_a_plain_lora(tmp_path):
    model = get_peft_model(tiny.llama(dtype=torch.float32), config())
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
    model.save_pretrained(tmp_path / "start")
    tiny.randomise(model)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    again = PeftModel.from_pretrained(tiny.llama(dtype=torch.float32), tmp_path / "plain")
    assert again.peft_config["default"].r == 2 * R
    close(tiny.logits(again), tiny.logits(model))
    with pytest.raises(AdapterMismatchError, match="does not hold what adapter"):
        model.save_pretrained(
            tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path / "plain")
        )
    with pytest.raises(AdapterFileError):
        model.save_pretrained(
            tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path / "none")
        )


def test_resuming_takes_the_start_of_the_file(tmp_path):
    """Trainer resumes by loading a checkpoint into the adapter that a fresh start has made."""
    model = trained(tiny.llama(dtype=torch.float32), config("pissa_niter_0"))
    model.save_pretrained(tmp_path / "checkpoint")
    fresh = get_peft_model(tiny.llama(dtype=torch.float32), config(True)).eval()
    fresh.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    assert torch.equal(tiny.logits(fresh), tiny.logits(model))
    assert fresh.peft_config["default"].init_lora_weights == "pissa_niter_0"

    trained(tiny.llama(dtype=torch.float32), config(True)).save_pretrained(tmp_path / "plain")
    expected = tiny.logits(
        PeftModel.from_pretrained(tiny.llama(dtype=torch.float32), tmp_path / "plain")
    )
    fresh.load_adapter(tmp_path / "plain", "default", is_trainable=True)
    assert torch.equal(tiny.logits(fresh), expected)


def test_combining_adds_the_changes(tmp_path):
    base = tiny.llama(dtype=torch.float32)
    plain = copy.deepcopy(base)
    model = trained(base, config())
    model.add_adapter("olora", config("olora"))
    model.set_adapter(["default", "olora"])
    tiny.randomise(model)
    model.add_weighted_adapter(["default", "olora"], [0.7, -0.4], "sum", "linear")
    model.save_pretrained(tmp_path)
    files = [read_adapter(tmp_path), read_adapter(tmp_path / "olora")]
    on_files = combine(files, [0.7, -0.4], "linear")
    layers = dict(lora_layers(model))
    for path, layer in layers.items():
        one, other = (layer.get_delta_weight(name).double() for name in ("default", "olora"))
        close(layer.get_delta_weight("sum"), 0.7 * one - 0.4 * other, 1e-5)
        A = on_files.tensors[f"{path}.lora_A.weight"].double()
        B = on_files.tensors[f"{path}.lora_B.weight"].double()
        close(B @ A, 0.7 * one - 0.4 * other, 1e-5)
    model.set_adapter("sum")
    assert not torch.equal(tiny.logits(model), tiny.logits(plain))

    (tmp_path / "lora_start.safetensors").unlink()
    with pytest.raises(CombineError, match=r"adapter 1 was started with .*'pissa'"):
        combine([read_adapter(tmp_path), files[1]], [1, 1], "linear")
