"""Combining adapters against ΔW recomputed in float64; the trimming methods against small cases by hand."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import AttentionNet, ConvNet, Net
from tiny import IDS, gpt2, llama, randomise

import lowrank
from lowrank import Adapter, LoraConfig, PeftModel, get_peft_model, read_adapter, write_adapter
from lowrank.combine import combine, errors, resize, total_error
from lowrank.errors import AdapterNameError, BaseMismatchError, CombineError
from lowrank.task_arithmetic import METHODS

PREFIX = "base_model.model."
SHAPES = {"layers.0.q": (11, 7), "layers.0.up": (13, 7), "layers.10.q": (11, 7), "emb": (6, 23)}
EXACT = {"rtol": 0, "atol": 2e-6}


def made(seed=0, paths=tuple(SHAPES), dtype=torch.float32, shapes=SHAPES, **fields):
    """An adapter with random factors; `emb` is an embedding of 23 rows of width 6."""
    fields = {"r": 3, "lora_alpha": 5, "target_modules": list(paths), **fields}
    config = LoraConfig(**fields)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in paths:
        out, in_ = shapes[path]
        r = value(config.rank_pattern, path, config.r)
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if path == "emb"
            else ("lora_A.weight", "lora_B.weight")
        )
        for name, shape in zip(names, [(r, in_), (out, r)], strict=True):
            tensors[f"{PREFIX}{path}.{name}"] = torch.randn(shape, generator=random).to(dtype)
    return Adapter(config, tensors, {})


def value(pattern, path, default):
    """PEFT's rule: a key is the end of the path, or a regular expression for one."""
    found = [v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", path)]
    return found[0] if found else default


def deltas(adapter):
    """scaling·B·A by path, in float64, from the file's tensors and configuration alone."""
    config, found = adapter.config, {}
    for key, A in adapter.tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?A(\.weight)?", key)
        if match:
            B = adapter.tensors[re.sub(r"lora_(embedding_)?A", r"lora_\1B", key)]
            path = match[1].replace(".base_layer.", ".")
            r, alpha = A.shape[0], value(config.alpha_pattern, path, config.lora_alpha)
            assert r == value(config.rank_pattern, path, config.r)
            scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
            found[path] = scaling * B.double().flatten(1) @ A.double().flatten(1)
    return found


def weighted_sum(adapters, weights):
    total = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, delta in deltas(adapter).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def assert_close(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(found[path], wanted[path], **(tolerance or EXACT))


def mixed():
    """Four adapters that differ in everything that may differ."""
    return [
        made(1, ("layers.0.q", "layers.0.up", "emb"), r=3, lora_alpha=5),
        made(2, ("layers.0.q", "layers.10.q"), r=4, lora_alpha=6, use_rslora=True),
        made(
            3,
            rank_pattern={"up": 2, "^layers.0.q": 5},
            alpha_pattern={"emb": 7, r"layers\.\d+\.q": 1.5},
        ),
        made(4, ("layers.0.up",), dtype=torch.bfloat16, r=1, lora_alpha=3),
    ]


WEIGHTS = [0.7, -1.3, 0.45, 2.0]

# --- the exact sum ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_linear_is_the_weighted_sum_for_any_mix(method):
    result = combine(mixed(), WEIGHTS, method)
    assert_close(deltas(result), weighted_sum(mixed(), WEIGHTS), rtol=1e-5, atol=1e-5)
    assert all(tensor.dtype == torch.float32 for tensor in result.tensors.values())
    assert [row.error for row in errors(result)] == [0.0] * 4
    for row in errors(result):
        wanted = weighted_sum(mixed(), WEIGHTS)[row.path].norm().item()
        assert row.norm == pytest.approx(wanted, rel=1e-5)


def test_the_configuration_describes_the_tensors_and_nothing_of_the_sources_is_left():
    result = combine(mixed(), WEIGHTS, "linear")
    config = result.config
    ranks = {p: value(config.rank_pattern, p, config.r) for p in SHAPES}
    assert ranks == {
        "layers.0.q": 3 + 4 + 5,
        "layers.0.up": 3 + 2 + 1,
        "layers.10.q": 4 + 3,
        "emb": 6,
    }
    assert config.lora_alpha == config.r == 6  # the rank that most layers have
    assert config.alpha_pattern == config.rank_pattern
    assert not config.use_rslora
    assert set(config.target_modules) == set(SHAPES)


def test_a_pattern_key_matches_no_longer_path():
    """`0.q` is the end of `layers.0.q` too."""
    shapes = {"0.q": (5, 4), "layers.0.q": (5, 4), "layers.1.q": (5, 4)}
    one = made(1, tuple(shapes), shapes=shapes, r=2)
    two = made(2, ("0.q",), shapes=shapes, r=3)
    result = combine([one, two], [1.0, 0.5], "linear")
    assert_close(deltas(result), weighted_sum([one, two], [1.0, 0.5]))
    assert result.config.rank_pattern == {r"^0\.q": 5}


def test_targets_are_the_union_and_spelled_out_where_names_do_not_say_it():
    one = made(1, ("layers.0.q", "layers.10.q"))._replace(
        config=LoraConfig(r=3, lora_alpha=5, target_modules=["q"])
    )
    two = made(2, ("layers.0.up",))._replace(
        config=LoraConfig(r=3, lora_alpha=5, target_modules=["up"])
    )
    assert combine([one, two], [1, 1], "linear").config.target_modules == ["q", "up"]
    only = LoraConfig(r=3, lora_alpha=5, target_modules=["q"], layers_to_transform=[0])
    three = made(3, ("layers.0.q",))._replace(config=only)
    config = combine([three, two], [1, 1], "linear").config
    assert config.target_modules == ["layers.0.q", "layers.0.up"]
    assert config.layers_to_transform is None
    again = combine([three, three], [1, 1], "linear").config
    assert (again.target_modules, again.layers_to_transform) == (["q"], [0])


def test_float64_stays_float64():
    one = made(1, dtype=torch.float64)
    result = combine([one, made(2)], [0.1, 0.2], "linear")
    assert {tensor.dtype for tensor in result.tensors.values()} == {torch.float64}
    assert_close(deltas(result), weighted_sum([one, made(2)], [0.1, 0.2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "linear_factors"])
@pytest.mark.parametrize(
    "fields", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"r": 4}]
)
def test_one_adapter_with_weight_1_is_itself(method, fields):
    adapter = made(5, **fields)
    assert combine([adapter], [1.0], method) is adapter
    assert [row.error for row in errors(adapter)] == [0.0] * 4


def test_lora_bias_adds_up_with_its_own_scaling():
    paths = ("layers.0.q", "layers.0.up")
    one, two = made(1, paths, lora_bias=True), made(2, paths[:1], r=4, lora_alpha=6)
    for path in paths:
        one.tensors[f"{PREFIX}{path}.lora_B.bias"] = torch.randn(SHAPES[path][0])
    result = combine([one, two], [0.5, 2.0], "svd")
    assert result.config.lora_bias
    for path in paths:
        key = f"{PREFIX}{path}.lora_B.bias"
        torch.testing.assert_close(result.tensors[key], one.tensors[key] * (0.5 * 5 / 3))
    with pytest.raises(CombineError, match="lora_bias"):
        combine([one, one], [1, 1], "linear_factors")


# --- its best approximation -----------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5, None])
def test_svd_is_the_best_approximation_of_the_sum(rank):
    result = combine(mixed(), WEIGHTS, "svd", svd_rank=rank)
    wanted = weighted_sum(mixed(), WEIGHTS)
    found = deltas(result)
    rows = {row.path: row for row in errors(result)}
    for path, M in wanted.items():
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        k = min(rank or 5, int((S > 1e-5).sum()))
        best = U[:, :k] * S[:k] @ Vh[:k]
        torch.testing.assert_close(found[path], best, rtol=0, atol=3e-5)
        assert rows[path].r >= k
        assert rows[path].norm == pytest.approx(M.norm().item(), rel=1e-5)
        assert rows[path].error == pytest.approx((S[k:].norm() / S.norm()).item(), abs=1e-6)
    lost = sum((wanted[p] - found[p]).norm() ** 2 for p in wanted)
    whole = sum(M.norm() ** 2 for M in wanted.values())
    assert total_error(rows.values()) == pytest.approx((lost / whole).sqrt().item(), abs=1e-6)
    assert [row.error for row in errors(result)] == sorted(
        (r.error for r in rows.values()), reverse=True
    )


def test_the_best_approximation_of_what_cancels_is_zero():
    one = made(1)
    result = combine([one, one], [1.0, -1.0], "svd", svd_rank=2)
    assert all(delta.abs().max() < 1e-5 for delta in deltas(result).values())


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_keeps_as_few_singular_values_as_hold_it(energy):
    result = resize(made(1, r=6, use_rslora=True), energy=energy)
    for path, M in deltas(made(1, r=6, use_rslora=True)).items():
        share = torch.linalg.svdvals(M)[:6].square().cumsum(0) / M.square().sum()
        wanted = min(6, int((share < energy - 1e-12).sum()) + 1) if energy < 1 else 6
        row = next(row for row in errors(result) if row.path == path)
        assert row.r == wanted
        lost = ((M - deltas(result)[path]).norm() / M.norm()).item()
        assert row.error == pytest.approx(lost, abs=1e-6)
        assert lost**2 <= 1 - energy + 1e-9


def test_resize_to_a_rank():
    adapter = made(1, r=6)
    smaller = resize(adapter, rank=2)
    assert {row.r for row in errors(smaller)} == {2}
    assert (smaller.config.r, smaller.config.rank_pattern) == (2, {})
    for path, M in deltas(adapter).items():
        S = torch.linalg.svdvals(M)
        off = (M - deltas(smaller)[path]).norm().item()
        assert off == pytest.approx(S[2:].norm().item(), rel=1e-4)
    assert resize(adapter, rank=6) is adapter
    assert resize(adapter, rank=9) is adapter
    with pytest.raises(CombineError, match="either"):
        resize(adapter)
    with pytest.raises(CombineError, match="DoRA"):
        resize(made(1, use_dora=True), rank=2)


# --- properties -----------------------------------------------------------------------------------

weights_ = st.floats(-3, 3).map(lambda w: round(w, 2))
ranks = st.integers(1, 5)


@st.composite
def any_adapter(draw):
    paths = draw(st.lists(st.sampled_from(list(SHAPES)), min_size=1, unique=True))
    return made(
        draw(st.integers(0, 999)),
        tuple(paths),
        r=draw(ranks),
        lora_alpha=draw(st.sampled_from([1, 3, 8.5])),
        use_rslora=draw(st.booleans()),
        dtype=torch.float64,
    )


@given(st.lists(st.tuples(any_adapter(), weights_), min_size=1, max_size=4), st.data())
def test_linear_is_linear_and_order_does_not_matter(pairs, data):
    adapters, weights = zip(*pairs, strict=True)
    close = {"rtol": 0, "atol": 1e-10}
    found = deltas(combine(adapters, weights, "linear"))
    assert_close(found, weighted_sum(adapters, weights), **close)
    doubled = combine(adapters, [2 * w for w in weights], "linear")
    assert_close({p: d / 2 for p, d in deltas(doubled).items()}, found, **close)
    # in two steps
    first = combine(adapters[:1], weights[:1], "cat")
    rest = combine([first, *adapters[1:]], [1, *weights[1:]], "linear")
    assert_close(deltas(rest), found, **close)
    shuffled = data.draw(st.permutations(pairs))
    for method in ("linear", "svd"):
        there = deltas(combine(adapters, weights, method))
        back = deltas(combine(*zip(*shuffled, strict=True), method))
        assert_close(back, there, **close)


@given(any_adapter(), any_adapter(), weights_, weights_, ranks)
def test_the_error_of_svd_is_the_discarded_singular_values(one, two, v, w, rank):
    result = combine([one, two], [v, w], "svd", svd_rank=rank)
    wanted, found = weighted_sum([one, two], [v, w]), deltas(result)
    for row in errors(result):
        S = torch.linalg.svdvals(wanted[row.path])
        lost = S[row.r :].norm().item()
        assert row.r <= rank
        assert (wanted[row.path] - found[row.path]).norm().item() == pytest.approx(lost, abs=1e-8)
        assert row.error * row.norm == pytest.approx(lost, abs=1e-8)


@given(any_adapter(), weights_)
def test_every_method_with_nothing_to_merge_is_a_multiple(adapter, weight):
    """density 1 and one adapter: nothing is trimmed, nobody disagrees."""
    wanted = weighted_sum([adapter], [weight])
    for method, row in METHODS.items():
        extra = {"density": 1.0} if row.takes_density else {}
        close = {"rtol": 0, "atol": 1e-9}
        assert_close(deltas(combine([adapter], [weight], method, **extra)), wanted, **close)


# --- trimming -------------------------------------------------------------------------------------


def as_adapter(M, seed=0):
    """An adapter of full rank whose ΔW is M (out, in), out <= in, in factors that are not trivial."""
    M = torch.tensor(M, dtype=torch.float64) if isinstance(M, list) else M.double()
    out = M.shape[0]
    Q = torch.linalg.qr(
        torch.randn(out, out, generator=torch.Generator().manual_seed(seed)).double()
    ).Q
    config = LoraConfig(r=out, lora_alpha=2 * out, target_modules=["x"])
    tensors = {f"{PREFIX}x.lora_A.weight": Q.T @ M / 2, f"{PREFIX}x.lora_B.weight": Q}
    return Adapter(config, tensors, {})


ONE = [[3.0, -1.0, 0.5, 4.0], [-2.0, 0.2, 6.0, -0.1]]
TWO = [[-5.0, -2.0, 0.3, 1.0], [-7.0, 0.4, -1.5, 0.6]]


def test_magnitude_prune_svd_by_hand():
    result = combine(
        [as_adapter(ONE), as_adapter(TWO, 1)], [2, -1], "magnitude_prune_svd", density=0.5
    )
    kept_one = torch.tensor([[3.0, 0, 0, 4.0], [-2.0, 0, 6.0, 0]]).double()
    kept_two = torch.tensor([[-5.0, -2.0, 0, 0], [-7.0, 0, -1.5, 0]]).double()
    torch.testing.assert_close(deltas(result)["x"], 2 * kept_one - kept_two)


@pytest.mark.parametrize(
    ("sign", "wanted"),
    [
        # entry by entry: trim to the 4 largest, elect the sign of the sum, average those that have it
        ("total", [[2 * -5.0, 2 * -2.0, 0, 4.0], [(-2 + 2 * -7.0) / 2, 0, 6.0, 0]]),
        # a draw of votes (3 against −5, 6 against −1.5) is plus
        ("frequency", [[3.0, 2 * -2.0, 0, 4.0], [(-2 + 2 * -7.0) / 2, 0, 6.0, 0]]),
    ],
)
def test_ties_svd_by_hand(sign, wanted):
    adapters = [as_adapter(ONE), as_adapter(TWO, 1)]
    result = combine(adapters, [1, 2], "ties_svd", density=0.5, majority_sign_method=sign)
    torch.testing.assert_close(deltas(result)["x"], torch.tensor(wanted).double())
    row = errors(result)[0]
    assert row.norm == pytest.approx(torch.tensor(wanted).norm().item())
    assert row.error < 1e-12


def test_a_negative_weight_is_the_negated_adapter():
    negated = as_adapter([[-x for x in row] for row in TWO], 1)
    one, two = as_adapter(ONE), as_adapter(TWO, 1)
    for method in ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"):
        a = combine([one, two], [1, -2], method, density=0.5)
        b = combine([one, negated], [1, 2], method, density=0.5)
        torch.testing.assert_close(deltas(a)["x"], deltas(b)["x"])


def test_ties_svd_truncates_to_the_rank_and_says_what_that_costs():
    torch.manual_seed(3)
    M = torch.randn(9, 14)
    result = combine([as_adapter(M)], [1.5], "ties_svd", density=0.25, svd_rank=2)
    threshold = M.abs().flatten().sort(descending=True).values[int(0.25 * M.numel()) - 1]
    target = 1.5 * torch.where(M.abs() >= threshold, M, 0).double()
    U, S, Vh = torch.linalg.svd(target)
    torch.testing.assert_close(deltas(result)["x"], U[:, :2] * S[:2] @ Vh[:2], rtol=1e-5, atol=1e-5)
    assert errors(result)[0].error == pytest.approx((S[2:].norm() / S.norm()).item(), rel=1e-5)


def test_dare_drops_at_random_and_keeps_the_mean():
    M = torch.ones(60, 80) * 2
    result = deltas(combine([as_adapter(M)], [1], "dare_linear_svd", density=0.3, svd_rank=60))["x"]
    kept = result.abs() > 1e-6
    torch.testing.assert_close(result[kept], torch.full_like(result[kept], 2 / 0.3))
    assert kept.double().mean().item() == pytest.approx(0.3, abs=0.03)  # 4.5 standard deviations
    again = combine([as_adapter(M)], [1], "dare_linear_svd", density=0.3, svd_rank=60)
    assert torch.equal(deltas(again)["x"], result)
    other = combine([as_adapter(M)], [1], "dare_linear_svd", density=0.3, svd_rank=60, seed=1)
    assert not torch.equal(deltas(other)["x"].abs() > 1e-6, kept)
    both = combine([as_adapter(M), as_adapter(M, 1)], [1, 1], "dare_linear_svd", density=0.3)
    found = set(deltas(both)["x"].abs().round(decimals=3).unique().tolist())
    assert found == {0.0, round(2 / 0.3, 3), round(4 / 0.3, 3)}  # each adapter has its own mask
    elected = combine([as_adapter(M), as_adapter(-M, 1)], [1, 3], "dare_ties_svd", density=0.3)
    found = set(deltas(elected)["x"].round(decimals=3).unique().tolist())
    assert found == {0.0, round(2 / 0.3, 3), round(-6 / 0.3, 3)}


def test_the_randomised_svd_of_a_large_layer_is_near_the_best():
    torch.manual_seed(0)
    left, right = torch.randn(600, 40), torch.randn(40, 700)
    M = left * torch.logspace(0, -3, 40) @ right + 1e-3 * torch.randn(600, 700)
    S = torch.linalg.svdvals(M)
    adapter = as_adapter(M)
    result = combine([adapter], [1.0], "magnitude_prune_svd", density=1.0, svd_rank=12)
    best = (S[12:].norm() / S.norm()).item()
    assert best * 0.999999 < errors(result)[0].error < 1.001 * best
    off = (M.double() - deltas(result)["x"]).norm() / M.norm()
    assert errors(result)[0].error == pytest.approx(off.item(), rel=1e-4)


# --- on the factors -------------------------------------------------------------------------------


def test_linear_factors_says_how_far_it_is_from_the_sum():
    one, two = made(1), made(2, use_rslora=True)
    result = combine([one, two], [0.7, -0.4], "linear_factors")
    wanted = weighted_sum([one, two], [0.7, -0.4])
    for row in errors(result):
        off = (deltas(result)[row.path] - wanted[row.path]).norm() / wanted[row.path].norm()
        assert row.error == pytest.approx(off.item(), rel=1e-5)
        assert row.error > 0.1
    with pytest.raises(CombineError, match=r"ranks differ: 3, 4.*one rank"):
        combine([made(1), made(2, r=4)], [1, 1], "linear_factors")


# --- kinds ----------------------------------------------------------------------------------------


class Run:
    """A network, inputs for it, and adapters for it that differ."""

    def __init__(self, make, inputs, first, second):
        self.make, self.inputs, self.configs = make, inputs, (first, second)

    def model(self):
        torch.manual_seed(0)
        return self.make().double().eval()

    def adapters(self):
        found = []
        for seed, fields in enumerate(self.configs):
            model = randomise(get_peft_model(self.model(), LoraConfig(**fields)), seed + 1)
            config = model.peft_config["default"]
            found.append(Adapter(config, dict(lowrank.get_peft_model_state_dict(model)), {}))
        return found


RUNS = {
    "net": Run(
        Net,
        torch.tensor([[1, 5, 7], [2, 4, 6]]),
        {"r": 3, "lora_alpha": 5, "target_modules": ["embed", "q_proj", "down"]},
        {"r": 2, "lora_alpha": 7, "target_modules": "all-linear", "use_rslora": True},
    ),
    "convolutions": Run(
        ConvNet,
        torch.linspace(-1, 1, 2 * 3 * 9 * 8).double().reshape(2, 3, 9, 8),
        {"r": 3, "lora_alpha": 5, "target_modules": ["conv1", "conv2"]},
        {"r": 4, "lora_alpha": 2, "target_modules": ["conv2", "head"]},
    ),
    "attention": Run(
        AttentionNet,
        torch.linspace(-1, 1, 2 * 5 * 12).double().reshape(2, 5, 12),
        {"r": 3, "lora_alpha": 5, "target_modules": ["self_attn", "linear1"]},
        {"r": 4, "lora_alpha": 2, "target_modules": ["out_proj"]},
    ),
}


def outputs(model, inputs):
    with torch.no_grad():
        return model(inputs)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("method", ["linear", "svd"])
def test_every_kind_loads_and_acts_as_the_sum(run, method, tmp_path):
    one, two = run.adapters()
    result = combine(
        [one, two], [0.7, -0.4], method, **({"svd_rank": 9} if method == "svd" else {})
    )
    wanted = weighted_sum([one, two], [0.7, -0.4])
    assert_close(deltas(result), wanted, rtol=0, atol=1e-9)
    write_adapter(tmp_path, result)
    loaded = PeftModel.from_pretrained(run.model(), tmp_path)
    both = PeftModel(run.model(), one.config, "one", low_cpu_mem_usage=True)
    lowrank.set_peft_model_state_dict(both, one.tensors, "one")
    both.add_adapter("two", two.config, low_cpu_mem_usage=True)
    keys = {k.replace(".base_layer.", "."): k for k in lowrank.state.adapter_keys(both, "two")}
    found = {keys[k.replace(".base_layer.", ".")]: t for k, t in two.tensors.items()}
    lowrank.set_peft_model_state_dict(both, found, "two")
    both.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type="linear")
    both.set_adapter("sum")
    there, here = outputs(loaded, run.inputs), outputs(both, run.inputs)
    torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-9)
    both.set_adapter("one")
    assert (outputs(both, run.inputs) - here).abs().max() > 1e-3


# --- in a model -----------------------------------------------------------------------------------


@pytest.fixture
def model():
    one = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    two = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
    )
    found = get_peft_model(llama(), one, "one")
    found.add_adapter("two", two)
    for i, name in enumerate(("one", "two")):
        found.set_adapter(name)
        randomise(found, i + 1)
    found.set_adapter("one")
    return found.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_add_weighted_adapter_is_the_sum_of_both(model):
    model.set_adapter(["one", "two"])
    both = logits(model)
    model.set_adapter("one")
    alone = logits(model)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "linear")
    torch.testing.assert_close(logits(model), alone)  # it is not active yet
    assert model.active_adapters == ["one"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "svd")  # PEFT's default
    assert model.peft_config["svd"].r == 4
    model.add_weighted_adapter(["two"], [1.0], "again")
    model.set_adapter("again")
    again = logits(model)
    model.set_adapter("two")
    assert torch.equal(logits(model), again)


def test_add_weighted_adapter_of_the_lora_model_itself():
    """As PEFT has it on both; a whole path in rank_pattern is one of the base, not of what is around it."""
    path = "model.layers.1.self_attn.q_proj"
    config = LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={f"^{path}": 5})
    model = randomise(get_peft_model(llama(), config, "one")).eval()
    wanted = logits(model)
    model.base_model.add_weighted_adapter(["one"], [1.0], "two", "linear")
    model.base_model.add_weighted_adapter(["one"], [-0.5], "three", "linear")
    assert model.get_submodule(f"base_model.model.{path}").r == {"one": 5, "two": 5, "three": 5}
    model.base_model.set_adapter("two")
    assert torch.equal(logits(model), wanted)
    model.base_model.set_adapter(["one", "three"])
    half = logits(model)
    model.delete_adapter("two")
    model.base_model.add_weighted_adapter(["one"], [0.5], "less", "linear")
    model.base_model.set_adapter("less")
    torch.testing.assert_close(logits(model), half)


def test_one_dora_adapter_with_weight_1_is_itself_in_a_model():
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "up_proj"])
    model = randomise(get_peft_model(llama(), config, "one")).eval()
    model.add_weighted_adapter(["one"], [1.0], "two")
    wanted = logits(model)
    model.set_adapter("two")
    assert torch.equal(logits(model), wanted)


def test_add_weighted_adapter_is_exact_on_a_bfloat16_base():
    model = get_peft_model(llama().bfloat16(), LoraConfig(r=3, target_modules=["q_proj"]), "one")
    randomise(model)
    model.add_weighted_adapter(["one"], [0.3], "two", "linear")
    found = [
        Adapter(
            model.peft_config[n], dict(lowrank.get_peft_model_state_dict(model, adapter_name=n)), {}
        )
        for n in ("one", "two")
    ]
    assert_close(deltas(found[1]), weighted_sum(found[:1], [0.3]))


def test_add_weighted_adapter_saves_and_loads(model, tmp_path):
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "mix", "svd", svd_rank=5)
    model.set_adapter("mix")
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "mix")
    assert torch.equal(logits(again), logits(model))


def test_add_weighted_adapter_refuses_and_leaves_the_model(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(AdapterNameError, match="already is an adapter named 'two'"):
        model.add_weighted_adapter(["one"], [1.0], "two")
    with pytest.raises(AdapterNameError, match="no adapter named 'tow'"):
        model.add_weighted_adapter(["one", "tow"], [1.0, 1.0], "new")
    with pytest.raises(CombineError, match="ranks differ: 3, 4"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new", "ties", density=0.5)
    with pytest.raises(CombineError, match="svd_clamp"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new", svd_clamp=0.9)
    assert list(model.peft_config) == ["one", "two"]
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in now)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1.0]}, "2 adapters need as many weights; 1"),
        ({"weights": [1.0, math.nan]}, "finite"),
        ({"method": "tie"}, "Did you mean 'ties'"),
        ({"method": "ties"}, "needs density"),
        ({"method": "ties", "density": 1.5}, "density=1.5"),
        ({"method": "linear", "svd_rank": 4}, "svd_rank=4 means nothing to the method 'linear'"),
        ({"method": "ties_svd", "density": 0.5, "energy": 0.9}, "energy=0.9 means nothing"),
        ({"svd_rank": 0}, "at least 1"),
        ({"svd_rank": 2, "energy": 0.5}, "give one of them"),
        ({"majority_sign_method": "count"}, "'total' or 'frequency'"),
        ({"majority_sign_method": "frequency"}, "means nothing to the method 'svd'"),
    ],
)
def test_impossible_arguments(arguments, message):
    weights = arguments.pop("weights", [1.0, 1.0])
    with pytest.raises(CombineError, match=message):
        combine([made(1), made(2)], weights, **arguments)


def test_adapters_that_do_not_go_together():
    one = made(1)
    with pytest.raises(CombineError, match="art is DoRA"):
        combine([one, made(2, use_dora=True)], [1, 1], names=["math", "art"])
    with pytest.raises(CombineError, match="task_type differs: CAUSAL_LM, SEQ_CLS"):
        combine([made(1, task_type="CAUSAL_LM"), made(2, task_type="SEQ_CLS")], [1, 1])
    changed = made(2)
    changed.config.init_lora_weights = "pissa"
    with pytest.raises(CombineError, match=r"adapter 2 was started with .*'pissa'"):
        combine([one, changed], [1, 1])
    shapes = {**SHAPES, "layers.0.q": (12, 7)}
    with pytest.raises(CombineError, match=r"layers.0.q: A \(3, 7\) and B \(11, 3\) in adapter 1"):
        combine([one, made(2, shapes=shapes)], [1, 1])
    broken = made(2)
    broken.tensors[f"{PREFIX}emb.lora_embedding_B"][0, 0] = math.inf
    with pytest.raises(CombineError, match="adapter 2: emb is not finite"):
        combine([one, broken], [1, 1])
    half = made(2)
    del half.tensors[f"{PREFIX}layers.0.q.lora_A.weight"]
    with pytest.raises(CombineError, match=r"layers.0.q has only one of A and B"):
        combine([one, half], [1, 1])
    lying = made(2)._replace(config=LoraConfig(r=4, target_modules=["q"]))
    with pytest.raises(CombineError, match="its configuration rank 4"):
        combine([one, lying], [1, 1])


def test_modules_saved_whole():
    key = f"{PREFIX}head.weight"
    one, two = made(1, modules_to_save=["head"]), made(2)
    one.tensors[key] = torch.randn(3, 4)
    result = combine([one, two], [0.5, 0.5], "linear")
    assert torch.equal(result.tensors[key], one.tensors[key])
    assert result.config.modules_to_save == ["head"]
    two.tensors[key] = one.tensors[key].clone()
    assert torch.equal(combine([one, two], [0.5, 0.5]).tensors[key], one.tensors[key])
    two.tensors[key] += 1
    with pytest.raises(CombineError, match=r"head.weight: saved whole in math and in art"):
        combine([one, two], [0.5, 0.5], names=["math", "art"])
    del two.tensors[key]
    two.tensors[f"{PREFIX}emb.weight"] = torch.randn(23, 6)
    with pytest.raises(CombineError, match=r"emb.weight: saved whole in adapter 2, adapted"):
        combine([one, two], [0.5, 0.5])


def saved(folder, seed, base_seed, **fields):
    fields = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **fields}
    model = randomise(get_peft_model(llama(seed=base_seed).float(), LoraConfig(**fields)), seed)
    model.save_pretrained(folder)
    return read_adapter(folder)


def test_bases_must_be_the_same(tmp_path):
    one = saved(tmp_path / "1", 1, 0, target_modules=["q_proj"])
    two = saved(tmp_path / "2", 2, 0, target_modules=["q_proj", "up_proj"])
    other = saved(tmp_path / "3", 3, 7, target_modules=["q_proj"])
    result = combine([one, two], [1, 1])
    assert result.metadata["base"]["weights"] == two.metadata["base"]["weights"]
    with pytest.raises(BaseMismatchError, match="art was trained on another base than math"):
        combine([one, other], [1, 1], names=["math", "art"])
    combine([one, other], [1, 1], check_base=False)
    write_adapter(tmp_path / "both", result)
    header = read_adapter(tmp_path / "both").metadata["combined"]
    assert header == result.metadata["combined"]
    assert header["weights"] == [1.0, 1.0]
    PeftModel.from_pretrained(llama().float(), tmp_path / "both")
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(llama(seed=7).float(), tmp_path / "both")


# --- PEFT -----------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("method", ["linear", "svd"])
def test_peft_loads_the_result_with_the_same_delta(base, method, tmp_path):
    peft = pytest.importorskip("peft")
    names = {llama: ["q_proj", "down_proj", "embed_tokens"], gpt2: ["c_attn", "c_fc", "wte"]}[base]
    found = []
    for i, fields in enumerate(
        [
            {"target_modules": names[:2], "rank_pattern": {names[0]: 5}},
            {"target_modules": names[1:]},
        ]
    ):
        fields |= {"r": 3 + i, "lora_alpha": 5, "use_rslora": bool(i)}
        found.append(randomise(get_peft_model(base(), LoraConfig(**fields)), i + 1))
    adapters = [
        Adapter(m.peft_config["default"], dict(lowrank.get_peft_model_state_dict(m)), {})
        for m in found
    ]
    result = combine(adapters, [0.7, -0.4], method)
    write_adapter(tmp_path, result)
    model = peft.PeftModel.from_pretrained(base(), tmp_path)
    wanted = deltas(result)
    if method == "linear":
        assert_close(wanted, weighted_sum(adapters, [0.7, -0.4]), rtol=0, atol=1e-9)
    seen = {}
    for path, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            turned = type(layer).__name__ == "Embedding" or base is gpt2
            delta = layer.get_delta_weight("default").double()
            seen[path] = delta.T if turned else delta
    assert_close({p: d.detach() for p, d in seen.items()}, wanted, rtol=0, atol=1e-6)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("linear", "linear_factors"),
        ("ties", "ties"),
        ("magnitude_prune", "magnitude_prune"),
        ("cat", "cat"),
        ("svd", "svd"),
        ("ties_svd", "ties_svd"),
        ("magnitude_prune_svd", "magnitude_prune_svd"),
    ],
)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_the_same_as_pefts_arithmetic(theirs, ours, sign):
    peft = pytest.importorskip("peft")
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    models = []
    for library in (peft, lowrank):
        model = library.get_peft_model(llama(), library.LoraConfig(**fields), "one")
        model.add_adapter("two", library.LoraConfig(**{**fields, "lora_alpha": 3}))
        models.append(model)
    random = torch.Generator().manual_seed(5)
    ours_by_name = dict(models[1].named_parameters())
    with torch.no_grad():
        for name, parameter in sorted(models[0].named_parameters()):
            if ".one." in name or ".two." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random))
                ours_by_name[name].copy_(parameter)
    density = 0.4 if METHODS[ours].takes_density else None
    signed = {"majority_sign_method": sign} if METHODS[ours].takes_sign else {}
    pair = ["one", "two"]
    weights = [0.7, 0.3] if ours in ("ties_svd", "magnitude_prune_svd") else [0.7, -0.3]
    models[0].add_weighted_adapter(pair, weights, "new", theirs, density=density, **signed)
    models[1].add_weighted_adapter(pair, weights, "new", ours, density=density, **signed)
    found = []
    for model in models:
        model.set_adapter("new")
        model.eval()
        found.append(logits(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
