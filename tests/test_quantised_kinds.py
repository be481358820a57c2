"""Every kind of quantised layer through the same checks as the dense ones, each against its formula in float64."""

import copy
import pickle
from functools import partial

import pytest
import torch
from quantised import QUANTISED, linear, read_only
from starts import FROM_DATA, INITS, Data, R, base_of, sample
from test_kinds_by_methods import (
    METHODS,
    TOLERANCE,
    Holder,
    adapted,
    adapter_parameters,
    bits,
    check_forward,
    check_merge,
    check_mixed_batch,
    check_start,
    config,
    exact,
    off,
    options,
    scaling,
    the_layer,
    trained,
)
from torch import nn

import lowrank
from lowrank import LoraConfig, Quantisation
from lowrank.bases.kinds import kind_of, quantisation_of
from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.errors import AdapterMismatchError, MergeError, TargetError
from lowrank.lora import initial_magnitude

BITSANDBYTES = [kind for kind in QUANTISED if kind.startswith("Linear")]
WRITABLE = [kind for kind in QUANTISED if kind not in ("GPTQ", "AWQ", "HQQ")]
# every initialisation where the weight is read in another way
INITIALISED = ["nf4", "Linear4bit nf4 double", "Linear8bitLt", "torchao int4", "GPTQ"]
CASES = [
    *((kind, method, "kaiming") for kind in QUANTISED for method in [*METHODS, "rslora+dora"]),
    *((kind, "lora", init) for kind in INITIALISED for init in INITS if init != "kaiming"),
    *((kind, "dora", "pissa") for kind in INITIALISED),
]
REFUSED = {"loftq": "is quantised already", "lora_ga": "needs the gradient of W"}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "method", "init"), CASES)
def test_exact_or_refused(kind, method, init, device):
    fields = {**options(method), **INITS[init]}
    for dtype in TOLERANCE:
        torch.manual_seed(0)
        case = QUANTISED[kind](dtype)
        case.layer.to(device).requires_grad_(False)
        case.x = case.x.to(device)
        data = sample(case, dtype) if init in FROM_DATA else Data([], [])
        if init in REFUSED:
            with pytest.raises(TargetError, match=REFUSED[init]):
                lowrank.get_peft_model(Holder(case), config(case, **fields))
            return
        x = case.x.to(dtype)
        with torch.no_grad():
            y_base = case.call(case.layer, x)
        model = adapted(case, fields, data)
        layer, s = the_layer(model), scaling(method)
        found = [adapter_parameters(layer, "default")[part] for part in "AB"]
        assert found[0].dtype == torch.float32
        base = base_of(case, case.layer, init, s, data, found)
        check_start(case, model, init, base, s, data, x, y_base)
        trained(model, "default")
        want = exact(case, layer, "default", base, s, R)
        check_forward(case, model, want, x)
        check_merge(case, model, want, x)
        check_mixed_batch(case, model, method, base, want, x)


EXPECTED = {
    "nf4": Quantisation("nf4", "lowrank", 64),
    "nf4 double": Quantisation("nf4", "lowrank", 64, double=True),
    "fp4": Quantisation("fp4", "lowrank", 32),
    "int8": Quantisation("int8", "lowrank"),
    "Linear4bit nf4": Quantisation("nf4", "bitsandbytes", 64),
    "Linear4bit nf4 double": Quantisation("nf4", "bitsandbytes", 64, double=True),
    "Linear4bit fp4": Quantisation("fp4", "bitsandbytes", 64),
    "Linear8bitLt": Quantisation("int8", "bitsandbytes"),
    "torchao int8": Quantisation("int8", "torchao"),
    "torchao int4": Quantisation("int4", "torchao", 16),
    "torchao nf4": Quantisation("nf4", "torchao", 64, double=True),
    "GPTQ": Quantisation("int4", "gptq", 16),
    "AWQ": Quantisation("int4", "awq", 16),
    "HQQ": Quantisation("int4", "hqq", 16),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_it_says_how_it_is_rounded_and_reads_what_it_stands_for(kind):
    case = QUANTISED[kind](torch.float32)
    store = kind_of(case.layer).store(case.layer)
    assert quantisation_of(case.layer) == store.quantisation == EXPECTED[kind]
    assert not store.exact
    assert store.shape == store.read().shape == case.W(case.layer).shape
    assert store.read().dtype == store.dtype == torch.float32
    assert off(store.read(), case.W(case.layer)) < 1e-6
    assert bool(store.read_only) == (kind not in WRITABLE)


@pytest.mark.parametrize("kind", WRITABLE)
def test_what_is_merged_stays_so_through_copies_and_moves(kind):
    torch.manual_seed(0)
    case = QUANTISED[kind](torch.float32)
    model = lowrank.get_peft_model(Holder(case), config(case, init_lora_weights=False))
    before = model(case.x)
    model.merge_adapter()
    merged = model(case.x)
    assert off(merged, before.double()) > 0
    copies = [copy.deepcopy] if "torchao" in kind else [copy.deepcopy, pickled]
    copies = [] if kind == "torchao nf4" else copies  # a copy of which is rounded once more
    for copied in copies:
        other = copied(model)
        other.to("cpu")
        assert torch.equal(other(case.x), merged)
        other.unmerge_adapter()
        assert torch.equal(other(case.x), before)
    assert torch.equal(model(case.x), merged)
    plain = model.merge_and_unload()
    assert type(plain.layer) is type(case.layer)
    assert torch.equal(plain(case.x), merged)


def pickled(model):
    model.base_model.model.call = None  # a lambda
    other = pickle.loads(pickle.dumps(model))
    for m in (model, other):
        m.base_model.model.call = lambda layer, x: layer(x)
    return other


@pytest.mark.parametrize("kind", ["nf4 double", "Linear4bit nf4 double", "Linear8bitLt"])
def test_the_bases_state_is_the_unmerged_one(kind):
    torch.manual_seed(0)
    case = QUANTISED[kind](torch.float32)
    before = {f"layer.{k}": t.clone() for k, t in case.layer.state_dict().items()}
    model = lowrank.get_peft_model(Holder(case), config(case, init_lora_weights=False))
    model.merge_adapter()
    state = lowrank.get_base_model_state_dict(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
    assert not torch.equal(case.layer.weight, state["layer.weight"])
    model.unmerge_adapter()
    if "Linear4bit" in kind:
        with pytest.raises(AdapterMismatchError, match="does not load its scales"):
            lowrank.set_base_model_state_dict(model, before)
    if kind == "nf4 double":
        case.layer.quantise(torch.randn(case.layer.shape))
        lowrank.set_base_model_state_dict(model, before)
        assert torch.equal(case.layer.absmax, before["layer.weight.absmax"])


@pytest.mark.parametrize("kind", ["nf4", "Linear8bitLt"])
@pytest.mark.parametrize("for_good", [False, True])
def test_a_merge_says_what_rounding_took(kind, for_good, caplog):
    torch.manual_seed(0)
    case = QUANTISED[kind](torch.float32)
    model = lowrank.get_peft_model(Holder(case), config(case, init_lora_weights=False))
    layer = the_layer(model)
    W, change = case.W(case.layer), layer.get_delta_weight("default").detach().double()
    model.merge_and_unload() if for_good else model.merge_adapter()
    loss = (case.W(case.layer) - W - change).norm() / change.norm()
    [line] = [r.getMessage() for r in caplog.records if r.name == "lowrank"]
    assert f"took {loss:.2g} times what the adapters add (median of 1 layers)" in line
    assert str(EXPECTED[kind]) in line


def test_a_base_that_cannot_be_written_is_refused_before_anything_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), QUANTISED["GPTQ"](torch.float32).layer)
    model = lowrank.get_peft_model(
        model, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    )
    before = bits(model.base_model.model[0].base_layer.weight)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            MergeError, match=r"1: TorchQuantLinear .*int4 in blocks of 16 \(gptq\)"
        ):
            merge()
    assert bits(model.base_model.model[0].base_layer.weight) == before


@pytest.mark.parametrize("kind", QUANTISED)
def test_saved_and_loaded(kind, tmp_path):
    torch.manual_seed(0)
    case = QUANTISED[kind](torch.float32)
    model = lowrank.get_peft_model(Holder(case), config(case, use_dora=True))
    trained(model, "default")
    model.save_pretrained(tmp_path)
    expected = model(case.x)
    loaded = lowrank.PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    assert torch.equal(loaded.train()(case.x), expected)


@pytest.mark.parametrize("kind", ["nf4", "Linear4bit nf4", "Linear8bitLt"])
def test_dora_remembers_the_norm_and_sees_a_merge(kind):
    torch.manual_seed(0)
    case = QUANTISED[kind](torch.float32)
    model = lowrank.get_peft_model(Holder(case), config(case, use_dora=True))
    layer = the_layer(model)
    magnitude = adapter_parameters(layer, "default")["magnitude"]
    W = case.W(layer.get_base_layer())
    torch.testing.assert_close(magnitude.double(), W.norm(dim=1), rtol=1e-5, atol=0)
    trained(model, "default")
    model.eval() if kind != "Linear8bitLt" else model.requires_grad_(False)
    with torch.no_grad():
        first = model(case.x)
        assert torch.equal(model(case.x), first)
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(model(case.x), first)
    assert initial_magnitude(layer.unmerged_weight(), layer.lora("default")).shape == (len(W),)


@pytest.mark.parametrize("kind", ["nf4", "Linear4bit nf4 double", "torchao int8"])
def test_parameters_are_counted_as_what_they_stand_for(kind):
    case = QUANTISED[kind](torch.float32)
    width, out = case.layer.in_features, case.layer.out_features
    model = lowrank.get_peft_model(Holder(case), config(case))
    trainable = R * (width + out)
    assert model.get_nb_trainable_parameters() == (trainable, trainable + width * out + out)


@pytest.mark.parametrize("kind", ["nf4", "Linear4bit nf4", "Linear8bitLt", "torchao int8"])
def test_a_cast_for_mixed_precision_leaves_what_is_packed(kind):
    torch.manual_seed(0)
    case = QUANTISED[kind](torch.float32)
    model = lowrank.get_peft_model(Holder(case), config(case))
    W = case.W(case.layer)
    lowrank.cast_mixed_precision_params(model, torch.bfloat16)
    assert torch.equal(case.W(case.layer), W)
    assert case.layer.bias.dtype == torch.bfloat16


# --- what cannot be done is refused ---------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


def refusal(layer: nn.Module, **fields) -> str:
    with pytest.raises(TargetError) as error:
        lowrank.plan(Net(layer), LoraConfig(r=2, target_modules=["layer"], **fields))
    return str(error.value)


def test_a_layer_that_is_not_quantised_yet():
    bnb = pytest.importorskip("bitsandbytes")
    for make in (bnb.nn.Linear4bit, partial(bnb.nn.Linear8bitLt, has_fp16_weights=False)):
        assert 'model.to("cpu") too' in refusal(make(64, 5))
        empty = Net(make(64, 5, device="meta"))
        [target] = lowrank.plan(empty, LoraConfig(target_modules=["layer"]))
        assert (target.out, target.in_) == (5, 64)
    assert "has_fp16_weights=False" in refusal(bnb.nn.Linear8bitLt(64, 5))


def test_a_layer_that_its_cpu_kernel_reads_wrongly():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(96, 8, bias=False, quant_type="nf4", compress_statistics=False)
    layer = layer.to("cpu")
    x = torch.randn(3, 96, requires_grad=True)  # or it would repack
    store = kind_of(layer).store(layer)
    wrong = off(layer(x), x.double() @ store.read().double().T) > 0.01
    if not wrong:
        pytest.skip("this processor takes another kernel")
    assert "reads its weight wrongly: 96 inputs" in refusal(layer)


def test_a_torchao_tensor_that_rounds_its_input():
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(32, 8).requires_grad_(False)
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig())
    assert "lets no gradient through" in refusal(layer)
    there = LoraConfig(target_modules=["layer"], inference_mode=True)
    assert [target.kind.name for target in lowrank.plan(Net(layer), there)] == ["torchao"]


def test_a_kernel_without_a_gradient_and_one_that_does_not_run():
    layer = read_only(QUANTISED["GPTQ"](torch.float32).layer).layer
    plain = layer.forward
    layer.forward = lambda x: plain(x).detach()
    assert "lets no gradient through" in refusal(layer)
    inference = LoraConfig(target_modules=["layer"], inference_mode=True)
    [target] = lowrank.plan(Net(layer), inference)
    assert target.kind.name == "GPTQ (read-only)"

    def for_cuda(x):
        raise RuntimeError("Expected a CUDA tensor")

    layer.forward = for_cuda
    assert "does not run here: Expected a CUDA tensor" in refusal(layer)


def test_a_layer_whose_weight_is_taken():
    attention = nn.MultiheadAttention(32, 2)
    attention.out_proj = QuantisedLinear.from_linear(
        linear(torch.float32, 32, 32), Quantisation("nf4")
    )
    with pytest.raises(TargetError, match="works with no weight in few bits"):
        lowrank.plan(attention, LoraConfig(target_modules=["out_proj"]))


# --- bitsandbytes' traps --------------------------------------------------------------------------


def test_an_evaluation_between_steps_changes_nothing():
    """In eval mode on a CPU with bfloat16 products, a Linear4bit repacks its weight: rounded, and without a gradient."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    held = bits(layer.weight)
    model = lowrank.get_peft_model(Net(layer), LoraConfig(r=2, target_modules=["layer"]))
    adapted_layer = model.base_model.model.layer
    x = torch.randn(3, 64)
    before = adapted_layer(x.requires_grad_())
    model.eval()
    with torch.no_grad():
        evaluated = adapted_layer(x.detach())
    model.train()
    assert bits(layer.weight) == held
    torch.testing.assert_close(evaluated, before)
    (gradient,) = torch.autograd.grad(adapted_layer(x).sum(), x)
    W = kind_of(layer).store(layer).read()
    torch.testing.assert_close(gradient, W.sum(0).expand(3, -1))


@pytest.mark.parametrize("double", [False, True])
def test_a_weight_that_was_repacked_before_is_put_back_in_order(double):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compress_statistics=double).to("cpu").eval()
    W, codes = kind_of(layer).store(layer).read(), layer.weight.data.clone()
    layer.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    with torch.no_grad():
        layer(torch.randn(3, 64))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this processor does not repack")
    found = kind_of(layer).store(layer).read()
    assert torch.equal(layer.weight.data.flatten(), codes.flatten())
    assert off(found, W.double()) < 2.0**-6  # its scales were rounded to bfloat16, for good
