"""Every kind of layer × method × initialisation, in float32 and bfloat16, each against its formula in float64.

Checked for each: where the adapter starts; forward, with the gradients of A, B, the magnitude, the bias and x;
the merged weight, bias and forward, and that unmerging brings every bit back; a mixed batch. What the
initialisation takes out of W is computed again from W by its paper's formula. What is not supported is refused.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kinds import CASES, TOKENS, Case, embedding
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import lowrank
from lowrank import LoftQConfig, LoraConfig, PeftModel
from lowrank.errors import ConfigError, MergeError, RowsError, TargetError
from lowrank.layer import LoraLayer
from lowrank.wrappers import lora_layers

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rslora+dora": {"use_rslora": True, "use_dora": True},
    "lora_bias": {"lora_bias": True},
}
INITS: dict[str, dict[str, Any]] = {
    "kaiming": {"init_lora_weights": True},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)},
    "eva": {"init_lora_weights": "eva"},
    "corda ipm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
    "corda kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "lora_ga": {"init_lora_weights": "lora_ga"},
}
TAKEN_OUT = ("pissa", "pissa_niter_4", "olora", "corda ipm", "corda kpm", "lora_ga")
FROM_DATA = ("eva", "corda ipm", "corda kpm", "lora_ga")
R, ALPHA = 2, 5
OTHER = {"r": 3, "lora_alpha": 7}  # a second adapter, for the mixed batch

# ‖found − exact‖ / ‖exact‖. A pass through the layer rounds a handful of times: x·A, ·B, the sum.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8 * 2.0**-8}
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


def config(case: Case, **fields: Any) -> LoraConfig:
    where = "target_parameters" if case.how in ("parameter", "experts") else "target_modules"
    values = {"r": R, "lora_alpha": ALPHA, "target_modules": [], where: [case.path]}
    return LoraConfig(**{**values, **case.options, **fields})


def cast(case: Case, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


@dataclass
class Data:
    """What an initialisation from data looks at: some inputs, and a direction for the output of each."""

    x: list[Tensor]
    towards: list[Tensor]

    def loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        return sum((model(x) * g).sum() for x, g in zip(self.x, self.towards, strict=True))


def sample(case: Case, dtype: torch.dtype) -> Data:
    """Inputs whose features vary unequally; several, as some layers here take one vector."""
    if case.x.is_floating_point():
        along = [1] * case.x.ndim
        along[case.channel] = -1
        scale = torch.linspace(0.4, 1.8, case.x.shape[case.channel]).view(along)
        x = [cast(case, torch.randn_like(case.x) * scale, dtype) for _ in range(12)]
    else:
        x = [torch.randint_like(case.x, 11) for _ in range(12)]
    with torch.no_grad():
        y = case.call(case.layer, x[0])
    return Data(x, [torch.randn(y.shape).to(dtype) for _ in x])


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


def product(case: Case, A: Tensor, B: Tensor, r: int) -> Tensor:
    """B·A (out, in) from the tensors as they are saved; for experts (expert, out, in), in PEFT's order."""
    if case.how == "experts":
        n = A.shape[0] // r
        return torch.einsum("ore,eri->eoi", B.reshape(-1, r, n), A.reshape(n, r, -1))
    return B.reshape(-1, r) @ A.reshape(r, -1)


@dataclass
class Base:
    """The weight that an adapter starts from and on: W = weight − out + scaling·B·A."""

    W: Tensor  # (out, in), the original
    bias: Tensor | None
    weight: Tensor  # in W's place: LoftQ's quantised one, else W
    out: Tensor | float  # taken out of it
    start: Tensor | float | None  # scaling·B₀·A₀, None if that is random


def base_of(case: Case, layer: nn.Module, init: str, s: float, data: Data, found: tuple) -> Base:
    """layer: the original one. found: A₀ and B₀ as the initialisation left them, for signs alone."""
    held = layer.get_submodule(case.place)
    stored = held._parameters[case.weight].detach()
    W = case.matrix(stored.double())
    bias = held._parameters.get(case.bias)
    bias = None if bias is None else bias.detach().double()
    if init == "random":
        return Base(W, bias, W, 0.0, None)
    if init == "loftq":
        Q = normal_float(W).to(stored.dtype).double()
        return Base(W, bias, Q, 0.0, best(W - Q))
    if init in TAKEN_OUT:
        out = formula(case, layer, init, W, s, data, found)
        return Base(W, bias, W, out, out)
    return Base(W, bias, W, 0.0, 0.0)


def formula(case, layer, init: str, W: Tensor, s: float, data: Data, found: tuple) -> Tensor:
    """s·B₀·A₀, by the paper."""
    if init.startswith("pissa"):  # Meng et al. 2024, eq. 2–4; so small a randomised SVD is exact
        return best(W)
    if init == "olora":  # Büyükakyüz 2024, Algorithm 1
        Q, upper = torch.linalg.qr(W)
        return s * Q[:, :R] @ upper[:R]
    if init.startswith("corda"):  # Yang et al. 2024, eq. 3–6
        X = met_by(case, data)
        C = X.T @ X
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        part = slice(0, R) if init == "corda ipm" else slice(len(S) - R, len(S))
        return U[:, part] @ torch.diag(S[part]) @ Vh[part] @ torch.linalg.inv(C)
    # Wang et al. 2024, theorem 3.2: A from the first r right singular vectors of the gradient, B from the
    # next r left ones, each times ⁴√out / √γ, where γ = 16; the gradient is the one of the layer's dtype
    plain = copy.deepcopy(layer).requires_grad_(True)
    data.loss(lambda x: case.call(plain, x)).backward()
    U, _, Vh = torch.linalg.svd(
        case.matrix(plain.get_submodule(case.place)._parameters[case.weight].grad.double())
    )
    U, Vh = U[:, R : 2 * R], Vh[:R]
    A, B = (t.detach().double() for t in found)
    signs = ((U.T @ B.reshape(-1, R)) * (Vh @ A.reshape(R, -1).T)).diagonal().sign()
    return s * math.sqrt(len(W)) / 16 * (U * signs) @ Vh


def best(M: Tensor) -> Tensor:
    """The best approximation of rank R."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :R] @ torch.diag(S[:R]) @ Vh[:R]


# Dettmers et al. 2023, Appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]  # fmt: skip


def normal_float(W: Tensor) -> Tensor:
    """Blocks of 64 entries, each entry over its block's largest magnitude to the nearest of the sixteen."""
    parts = []
    for block in W.flatten().split(64):
        size = block.abs().max()
        values = torch.tensor(NF4, dtype=W.dtype)
        parts.append(values[(block[:, None] / size - values).abs().argmin(1)] * size)
    return torch.cat(parts).view(W.shape)


def met_by(case: Case, data: Data) -> Tensor:
    """The vectors that W meets, (rows, in): what a weight with a single 1 in it picks out of the input."""
    weight = case.matrix(case.layer._parameters[case.weight])
    groups = getattr(case.layer, "groups", 1)
    columns = []
    for j in range(weight.shape[1]):
        pick = torch.zeros(weight.shape, dtype=torch.float64)
        pick[:: weight.shape[0] // groups, j] = 1  # once for each group
        nothing = torch.zeros(weight.shape[0], dtype=torch.float64)
        seen = [case.truth(pick, nothing, x.double()) for x in data.x]
        channels = [y.movedim(case.channel, -1)[..., :: weight.shape[0] // groups] for y in seen]
        columns.append(torch.cat([y.flatten() for y in channels]))
    return torch.stack(columns, 1)


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
    V = base.weight - base.out + s * product(case, leaves["A"], leaves["B"], r)
    if "magnitude" in leaves:
        V = leaves["magnitude"].view(-1, 1) * V / V.detach().square().sum(1, keepdim=True).sqrt()
    bias = base.bias
    if "bias" in leaves:
        bias = s * leaves["bias"] if bias is None else bias + s * leaves["bias"]
    return Exact(leaves, V, bias)


def off(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    assert found.shape == expected.shape
    return ((found.double() - expected).norm() / expected.norm()).item()


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


# --- the tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CASES)
def test_exact_or_refused(kind, method, init):
    fields = {**METHODS[method], **INITS[init]}
    for dtype in (torch.float32, torch.bfloat16):
        case = CASES[kind]()
        case.layer.to(dtype).requires_grad_(False)  # frozen, some layers of torch run other kernels
        data = sample(case, dtype) if init in FROM_DATA else Data([], [])
        why_not = reasons(case, method, init)
        if why_not:
            with pytest.raises((TargetError, ConfigError)) as error:
                adapted(case, fields, data)
            assert all(words in str(error.value) for words in why_not)
            continue
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
        TOLERANCE[x.dtype if x.is_floating_point() else y_base.dtype],
    )
    parameters = adapter_parameters(layer, "default")
    A, B = parameters["A"].detach().double(), parameters["B"].detach().double()
    change = s * product(case, A, B, R)
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
        assert (A @ A.T - torch.eye(R)).abs().max() < 1e-5
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
    dtype = layer.get_base_layer()._parameters[case.weight].dtype
    assert y.dtype == dtype
    x64 = x.detach().double().requires_grad_() if x.is_floating_point() else x
    y64 = case.truth(want.W, want.bias, x64)
    assert off(y, y64.detach()) < TOLERANCE[dtype]

    g = torch.randn(y.shape).to(dtype)
    (y * g).sum().backward()
    (y64 * g.double()).sum().backward(inputs=[*want.leaves.values(), *[x64] * x.requires_grad])
    for key, parameter in adapter_parameters(layer, "default").items():
        expected = want.leaves[key].grad
        if key == "A" and case.how == "table" and case.layer.padding_idx is not None:
            expected[:, case.layer.padding_idx] = 0  # as for the base: padding is not trained
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert off(parameter.grad, expected) < TOLERANCE[dtype], key
    if x.requires_grad:
        assert x.grad.dtype == dtype
        assert off(x.grad, x64.grad) < TOLERANCE[dtype]
    assert all(p.grad is None for p in layer.get_base_layer().parameters())


def check_merge(case: Case, model: PeftModel, want: Exact, x: Tensor) -> None:
    layer = the_layer(model)
    base = layer.get_base_layer()
    with torch.no_grad():
        before = model(x)
    originals = {name: (p, bits(p)) for name, p in base.named_parameters()}
    if "bias" in want.leaves and base._parameters.get(case.bias) is None:
        with pytest.raises(MergeError, match="bias"):
            model.merge_adapter()
        assert not layer.merged
    else:
        model.merge_adapter()
        assert layer.merged
        merged = base._parameters[case.weight]
        dtype = merged.dtype
        assert dtype == before.dtype
        assert_rounded_once(case.matrix(merged), want.W.detach(), dtype)
        if want.bias is not None:
            assert_rounded_once(base._parameters[case.bias], want.bias.detach(), dtype)
        with torch.no_grad():
            y64 = case.truth(want.W, want.bias, x.double() if x.is_floating_point() else x)
            assert off(model(x), y64) < TOLERANCE[dtype]
        model.unmerge_adapter()
    for name, p in base.named_parameters():
        assert p is originals[name][0]
        assert bits(p) == originals[name][1]
    with torch.no_grad():
        assert bits(model(x)) == bits(before)


def assert_rounded_once(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    half_ulp = torch.finfo(dtype).eps / 2 * expected.abs()
    float32_sum = START_TOLERANCE * expected.abs().max()
    assert ((found.double() - expected).abs() <= half_ulp + float32_sum).all()


def check_mixed_batch(case: Case, model, method: str, base: Base, want: Exact, x: Tensor) -> None:
    """Rows of the adapter, of a second one of another rank, of none, and of the first again."""
    model.add_adapter("other", config(case, **OTHER, **METHODS[method]))
    trained(model, "other")
    by_rows = case.how in ("linear", "table", "convolution")
    rows = torch.cat([x, x.flip(0)]) if by_rows and case.batched else x
    names = [["default", "other", "__base__"][i % 3] for i in range(len(rows))]
    if not by_rows or not case.batched:
        words = "no dimension for the rows" if by_rows else "one for all rows"
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
            assert off(y[mine], case.truth(weight.W, weight.bias, rows[mine])) < TOLERANCE[y.dtype]


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
    W = scaling("lora") * product(case, parameters["A"].double(), parameters["B"].double(), R)
    tokens = torch.arange(50)
    want = case.truth(W.detach(), None, tokens)
    y = model(tokens).double()
    ratio = ((y * want).sum() / want.square().sum()).item()
    expected = float(scale) if isinstance(scale, float) else float(scale.bfloat16())
    assert ratio * float(scale) == pytest.approx(expected, rel=4e-4)
