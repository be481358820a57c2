"""Every kind of layer × method × initialisation, in float32 and bfloat16, each against its formula in float64.

Checked for each: where the adapter starts; forward, with the gradients of A, B, the magnitude, the bias and x;
the merged weight, bias and forward, and that unmerging brings every bit back; a mixed batch. What the
initialisation takes out of W is computed again from W by its paper's formula. What is not supported is refused.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from kinds import CASES, TOKENS, Case, embedding
from starts import FROM_DATA, INITS, TAKEN_OUT, Base, Data, R, base_of, cast, met_by, sample
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import lowrank
from lowrank import LoraConfig, PeftModel
from lowrank.errors import ConfigError, MergeError, RowsError, TargetError
from lowrank.layer import LoraLayer
from lowrank.wrappers import lora_layers

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
}
ALPHA = 5
OTHER = {"r": 3, "lora_alpha": 7}  # a second adapter, for the mixed batch

# ‖found − exact‖ / ‖exact‖. A pass through the layer rounds a handful of times: x·A, ·B, the sum.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8 * 2.0**-8}
# of a start: float32, which the inverse of a covariance magnifies
START_TOLERANCE = 2e-5

# a word of the reason, and where it applies: plan() refuses what a layer cannot honour
REFUSED: list[tuple[str, Callable[[Case, str], bool]]] = [
    (
        "cannot have a start taken out of it",
        lambda case, init: case.how in ("parameter", "experts") and init in TAKEN_OUT,
    ),
    ("quantises linear layers", lambda case, init: init == "loftq" and case.how != "linear"),
    (
        "start from the vectors that the layer is called with",
        lambda case, init: (
            init.startswith(("eva", "corda")) and case.how not in ("linear", "convolution")
        ),
    ),
    (
        "the groups of this convolution",
        lambda case, init: init.startswith("corda") and getattr(case.layer, "groups", 1) > 1,
    ),
]


# --- putting adapters on --------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.layer = case.layer
        self.call = case.call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def reasons(case: Case, method: str, init: str) -> list[str]:
    """Words of every reason for which the case is to be refused; empty if it must work."""
    if method == "lora_bias" and init not in ("kaiming", "random"):
        return ["PEFT would not load the adapter"]
    own = [words for name, words in case.refused.items() if name in method]
    return own + [words for words, applies in REFUSED if applies(case, init)]


def options(method: str) -> dict[str, Any]:
    """The fields of one method, or of several that are joined by a plus."""
    return {key: value for name in method.split("+") for key, value in METHODS[name].items()}


def config(case: Case, **fields: Any) -> LoraConfig:
    where = "target_parameters" if case.how in ("parameter", "experts") else "target_modules"
    values = {"r": R, "lora_alpha": ALPHA, "target_modules": [], where: [case.path]}
    return LoraConfig(**{**values, **case.options, **fields})


def adapted(case: Case, fields: dict[str, Any], data: Data) -> PeftModel:
    """The case's layer with the adapter "default" where its initialisation puts it."""
    holder = Holder(case)
    settings = config(case, **fields)
    init = settings.init_lora_weights
    if init == "corda":
        lowrank.preprocess_corda(holder, settings, lambda: [holder(x) for x in data.x])
    if init == "lora_ga":
        lowrank.preprocess_loraga(holder, settings, lambda: data.loss(holder).backward())
    model = lowrank.get_peft_model(holder, settings)
    if init == "eva":
        functions = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
        run = {"forward_fn": lambda m, batch: [m(x) for x in batch], "show_progress_bar": False}
        lowrank.initialize_lora_eva_weights(model, [data.x], **run, **functions)
    return model


def trained(model: PeftModel, name: str) -> None:
    """Moves every parameter of the adapter away from where it started."""
    for key, p in adapter_parameters(the_layer(model), name).items():
        with torch.no_grad():
            if key == "magnitude":
                p.mul_(torch.rand_like(p) + 0.6)
            else:
                p.add_(torch.randn_like(p) * (1.0 if key == "bias" else 0.4))


def the_layer(model: PeftModel) -> LoraLayer:
    [(_, layer)] = lora_layers(model)
    return layer


def adapter_parameters(layer: LoraLayer, name: str) -> dict[str, nn.Parameter]:
    """The adapter's A, B, magnitude and bias, read from the modules that hold them."""
    found = {}
    for part in "AB":
        modules, tables = getattr(layer, f"lora_{part}"), getattr(layer, f"lora_embedding_{part}")
        found[part] = modules[name].weight if name in modules else tables[name]
    if name in layer.lora_magnitude_vector:
        found["magnitude"] = layer.lora_magnitude_vector[name].weight
    if name in layer.lora_B and layer.lora_B[name].bias is not None:
        found["bias"] = layer.lora_B[name].bias
    return found


# --- what they must do, in float64 ----------------------------------------------------------------


def delta(case: Case, A: Tensor, B: Tensor, r: int) -> Tensor:
    """B·A (out, in) from the tensors as they are saved; for experts (expert, out, in), in PEFT's order."""
    if case.how == "experts":
        n = A.shape[0] // r
        return torch.einsum("ore,eri->eoi", B.reshape(-1, r, n), A.reshape(n, r, -1))
    return B.reshape(-1, r) @ A.reshape(r, -1)


@dataclass
class Exact:
    """An adapter's parameters in float64, as leaves, and the weight and bias that they make."""

    leaves: dict[str, Tensor]
    W: Tensor
    bias: Tensor | None


def scaling(method: str, r: int = R, alpha: float = ALPHA) -> float:
    return alpha / math.sqrt(r) if "rslora" in method else alpha / r


def exact(case: Case, layer: LoraLayer, name: str, base: Base, s: float, r: int) -> Exact:
    leaves = {
        key: p.detach().double().requires_grad_()
        for key, p in adapter_parameters(layer, name).items()
    }
    V = base.weight - base.out + s * delta(case, leaves["A"], leaves["B"], r)
    if "magnitude" in leaves:
        norm = V.detach().square().sum(-1, keepdim=True).sqrt()
        V = leaves["magnitude"].view(*V.shape[:-1], 1) * V / norm
    bias = base.bias
    if "bias" in leaves:
        bias = s * leaves["bias"] if bias is None else bias + s * leaves["bias"]
    return Exact(leaves, V, bias)


def off(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert found.shape == expected.shape
    return ((found.double() - expected).norm() / expected.norm()).item()


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


# --- the tests ------------------------------------------------------------------------------------


# two methods at once: with a start that is zero, and with two that are taken out of W
TOGETHER = [("rslora+dora", init) for init in ("kaiming", "pissa", "olora")]


@pytest.mark.parametrize(("method", "init"), [*product(METHODS, INITS), *TOGETHER])
@pytest.mark.parametrize("kind", CASES)
def test_exact_or_refused(kind, method, init):
    fields = {**options(method), **INITS[init]}
    for dtype in (torch.float32, torch.bfloat16):
        case = CASES[kind]()
        case.layer.to(dtype).requires_grad_(False)  # frozen, some layers of torch run other kernels
        data = sample(case, dtype) if init in FROM_DATA else Data([], [])
        why_not = reasons(case, method, init)
        if why_not:
            with pytest.raises((TargetError, ConfigError)) as error:
                adapted(case, fields, data)
            assert all(words in str(error.value) for words in why_not)
            return
        original = copy.deepcopy(case.layer)
        x = cast(case, case.x, dtype)
        with torch.no_grad():
            y_base = case.call(case.layer, x)
        model = adapted(case, fields, data)
        layer, s = the_layer(model), scaling(method)
        found = [adapter_parameters(layer, "default")[part] for part in "AB"]
        base = base_of(case, original, init, s, data, found)
        check_start(case, model, init, base, s, data, x, y_base)
        trained(model, "default")
        want = exact(case, layer, "default", base, s, R)
        check_forward(case, model, want, x)
        check_merge(case, model, want, x)
        check_mixed_batch(case, model, method, base, want, x)


def check_start(case, model, init, base: Base, s: float, data: Data, x, y_base) -> None:
    layer, tolerance = (
        the_layer(model),
        case.rounding * TOLERANCE[y_base.dtype],
    )
    parameters = adapter_parameters(layer, "default")
    A, B = parameters["A"].detach().double(), parameters["B"].detach().double()
    change = s * delta(case, A, B, R)
    if base.start is None:
        assert A.any()
        assert B.any()
        assert off(base.W + change, base.W) > 1e-3
    else:
        assert (change - base.start).norm() < START_TOLERANCE * base.W.norm()
    if init in ("kaiming", "gaussian", "eva"):
        zero, other = (A, B) if "default" in layer.lora_embedding_A else (B, A)
        assert not zero.any()
        assert other.any()
    if init == "eva":  # Paischer et al. 2024, §3: A's rows explain as much of the variance as r can
        X = met_by(case, data)
        X = X - X.mean(0)
        S = torch.linalg.svdvals(X)
        A = A.reshape(R, -1)
        assert (A @ A.T - torch.eye(R, device=A.device)).abs().max() < 1e-5
        assert (X @ A.T).square().sum() > 0.98 * S[:R].square().sum()
    if init == "loftq":
        assert off(base.weight + change, base.W) < 0.9 * off(base.weight, base.W)
    elif init != "random":
        with torch.no_grad():
            assert off(model(x), y_base.double()) < tolerance
    with model.disable_adapter(), torch.no_grad():
        assert bits(model(x)) == bits(y_base)


def check_forward(case: Case, model: PeftModel, want: Exact, x: Tensor) -> None:
    layer = the_layer(model)
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    y = model(x)
    dtype = y.dtype
    assert dtype == held_dtype(case, layer, x)
    x64 = x.detach().double().requires_grad_() if x.is_floating_point() else x
    y64 = case.truth(want.W, want.bias, x64)
    assert off(y, y64.detach()) < case.rounding * TOLERANCE[dtype]

    g = torch.randn(y.shape).to(y.device, dtype)
    (y * g).sum().backward()
    (y64 * g.double()).sum().backward(inputs=[*want.leaves.values(), *[x64] * x.requires_grad])
    for key, parameter in adapter_parameters(layer, "default").items():
        expected = want.leaves[key].grad
        if key == "A" and case.how == "table" and case.layer.padding_idx is not None:
            expected[:, case.layer.padding_idx] = 0  # as for the base: padding is not trained
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert off(parameter.grad, expected) < case.rounding * TOLERANCE[dtype], key
    if x.requires_grad:
        assert x.grad.dtype == dtype
        assert off(x.grad, x64.grad) < case.rounding * TOLERANCE[dtype]
    assert all(p.grad is None for p in layer.get_base_layer().parameters())


def held_dtype(case: Case, layer: LoraLayer, x: Tensor) -> torch.dtype:
    """The weight's; what is in few bits computes in x's."""
    if case.dequantised is not None:
        return x.dtype
    return layer.get_base_layer()._parameters[case.weight].dtype


def check_merge(case: Case, model: PeftModel, want: Exact, x: Tensor) -> None:
    layer = the_layer(model)
    base = layer.get_base_layer()
    with torch.no_grad():
        before = model(x)
    originals = dict(base.named_parameters())
    held, bias = bits(case.W(base)), bits_of_bias(case, base)
    if case.merged_off is None or ("bias" in want.leaves and bias is None):
        why = "bias" if case.merged_off is not None else "can be read and not written"
        with pytest.raises(MergeError, match=why):
            model.merge_adapter()
        assert not layer.merged
    else:
        model.merge_adapter()
        assert layer.merged
        dtype, merged = before.dtype, case.W(base)
        if case.merged_off:
            assert off(merged, want.W.detach()) < case.merged_off
        else:
            assert base._parameters[case.weight].dtype == dtype
            assert_rounded_once(merged, want.W.detach(), dtype)
            merged = want.W.detach()
        if want.bias is not None:
            assert_rounded_once(base._parameters[case.bias], want.bias.detach(), dtype)
        with torch.no_grad():
            y64 = case.truth(merged, want.bias, x.double() if x.is_floating_point() else x)
            assert off(model(x), y64) < case.rounding * TOLERANCE[dtype]
        model.unmerge_adapter()
    for name, p in base.named_parameters():
        assert p is originals[name]
    assert (bits(case.W(base)), bits_of_bias(case, base)) == (held, bias)
    with torch.no_grad():
        assert bits(model(x)) == bits(before)


def bits_of_bias(case: Case, base: nn.Module) -> bytes | None:
    bias = base._parameters.get(case.bias)
    return None if bias is None else bits(bias)


def assert_rounded_once(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    half_ulp = torch.finfo(dtype).eps / 2 * expected.abs()
    float32_sum = START_TOLERANCE * expected.abs().max()
    assert ((found.double() - expected).abs() <= half_ulp + float32_sum).all()


def check_mixed_batch(case: Case, model, method: str, base: Base, want: Exact, x: Tensor) -> None:
    """Rows of the adapter, of a second one of another rank, of none, and of the first again."""
    if case.by_rows is None:
        return
    model.add_adapter("other", config(case, **OTHER, **options(method)))
    trained(model, "other")
    by_rows = case.by_rows and case.batched
    rows = torch.cat([x, x.flip(0)]) if by_rows else x
    names = [["default", "other", "__base__"][i % 3] for i in range(len(rows))]
    if not by_rows:
        words = (
            "dimension for the rows|not divide"
            if case.by_rows
            else "adapted through its weight, and"
        )
        with pytest.raises(RowsError, match=words):
            model(rows, adapter_names=names)
        return
    r, alpha = OTHER["r"], OTHER["lora_alpha"]
    plain = Base(base.W, base.bias, base.weight, 0.0, 0.0)
    other = exact(case, the_layer(model), "other", plain, scaling(method, r, alpha), r)
    weights = {"default": want, "other": other, "__base__": Exact({}, base.W, base.bias)}
    with torch.no_grad():
        y = model(rows, adapter_names=names)
        rows = rows.double() if rows.is_floating_point() else rows
        for name, weight in weights.items():
            mine = [i for i, other in enumerate(names) if other == name]
            assert (
                off(y[mine], case.truth(weight.W, weight.bias, rows[mine]))
                < case.rounding * TOLERANCE[y.dtype]
            )


@pytest.mark.parametrize("kind", CASES)
def test_an_activated_adapter_acts_from_its_offset_on(kind):
    for dtype in TOLERANCE:
        case = CASES[kind]()
        case.layer.to(dtype)
        holder, settings = Holder(case), config(case, alora_invocation_tokens=[1])
        if case.how != "linear":
            with pytest.raises(TargetError, match="adapts linear layers only"):
                lowrank.get_peft_model(holder, settings)
            continue
        base = base_of(case, case.layer, "kaiming", ALPHA / R, Data([], []), ())
        model = lowrank.get_peft_model(holder, settings)
        trained(model, "default")
        x = case.x.to(dtype)
        if not case.batched:
            with pytest.raises(RowsError, match="positions of 1 rows"):
                model(x, alora_offsets=[2])
            continue
        want = exact(case, the_layer(model), "default", base, ALPHA / R, R)
        before, after = (case.truth(W, want.bias, x.double()) for W in (base.W, want.W))
        expected = torch.stack([torch.cat([before[0, :2], after[0, 2:]]), before[1]])
        assert off(model(x, alora_offsets=[2, None]), expected.detach()) < TOLERANCE[dtype]
        with pytest.raises(MergeError, match="part of the positions"):
            model.merge_adapter()


class Tokens(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.embed, self.head = case.layer, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


@pytest.mark.parametrize("kind", [kind for kind, build in CASES.items() if build().how == "table"])
def test_trained_rows_of_an_embedding(kind):
    """W's rows give way to the adapter's, each row of a mixed batch to its own adapter's."""
    rows, x = {"default": [3, 10], "other": [0, 3, 9]}, torch.cat([TOKENS, TOKENS.flip(0)])
    names = ["default", "other", "__base__", "default"]
    for dtype, tolerance in TOLERANCE.items():
        case = CASES[kind]()
        model = Tokens(case).to(dtype)
        W, head = case.layer.weight.detach().double(), copy.deepcopy(model.head).double()
        for name, indices in rows.items():
            settings = LoraConfig(
                target_modules=["head"], trainable_token_indices={"embed": indices}
            )
            if name == "default":
                model = lowrank.get_peft_model(model, settings)
            else:
                model.add_adapter(name, settings)
        deltas = model.base_model.model.embed.token_adapter.trainable_tokens_delta
        expected = {}
        for name in ["default", "other", "__base__"]:
            table = W.clone()
            if name in rows:
                deltas[name].data.normal_()
                table[rows[name]] = deltas[name].detach().double()
            expected[name] = head(case.truth(table.T, None, x)).detach()
        with torch.no_grad():
            mixed = model(x, adapter_names=names)
            for i, name in enumerate(names):
                assert off(mixed[i], expected[name][i]) < tolerance
            for name in rows:
                model.set_adapter(name)
                assert off(model(x), expected[name]) < tolerance
                model.merge_adapter()
                assert off(model(x), expected[name]) < tolerance
                model.unmerge_adapter()
            with model.disable_adapter():
                assert off(model(x), expected["__base__"]) < tolerance


@pytest.mark.parametrize(
    "scale", [math.sqrt(768), torch.tensor(math.sqrt(768))], ids=["float", "tensor"]
)
def test_the_scale_of_a_bfloat16_embedding_is_the_layers_own(scale):
    """BART's is a float, which bfloat16 must not round (27.7 to 27.75); Gemma's a tensor that the layer rounds."""
    cls = BartScaledWordEmbedding if isinstance(scale, float) else Gemma3TextScaledWordEmbedding
    case = embedding(cls(50, 40, 0, embed_scale=float(scale)).bfloat16(), float(scale))
    nn.init.zeros_(case.layer.weight)
    model = lowrank.get_peft_model(Holder(case), config(case))
    trained(model, "default")
    parameters = adapter_parameters(the_layer(model), "default")
    for parameter in parameters.values():
        parameter.data = parameter.data.bfloat16().float()
    W = scaling("lora") * delta(case, parameters["A"].double(), parameters["B"].double(), R)
    tokens = torch.arange(50)
    want = case.truth(W.detach(), None, tokens)
    y = model(tokens).double()
    ratio = ((y * want).sum() / want.square().sum()).item()
    expected = float(scale) if isinstance(scale, float) else float(scale.bfloat16())
    assert ratio * float(scale) == pytest.approx(expected, rel=4e-4)
