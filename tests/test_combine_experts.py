"""Combining and resizing adapters of target_parameters, against Σ wᵢ·ΔWᵢ of each expert in float64."""

import copy
import re

import pytest
import tiny
import torch
from tiny import logits, randomise

import lowrank
from lowrank import Adapter, LoraConfig, PeftModel, get_peft_model, read_adapter, write_adapter
from lowrank.combine import combine, errors, resize, total_error
from lowrank.errors import CombineError
from lowrank.task_arithmetic import METHODS

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
PREFIX = "base_model.model."
WEIGHTS = [0.7, -1.3]


def config(**fields) -> LoraConfig:
    names = {"target_modules": ["q_proj"], "target_parameters": BOTH, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{"r": 3, "lora_alpha": 5, **names, **fields})


def two(fields=({}, {"r": 2, "lora_alpha": 7, "use_rslora": True}), base=tiny.mixtral):
    model = get_peft_model(base(), config(**fields[0]), adapter_name="one")
    model.add_adapter("two", config(**fields[1]))
    model.base_model.set_adapter(["one", "two"])
    return randomise(model)


def saved(model, folder, name, fingerprint=True) -> Adapter:
    model.save_pretrained(folder, selected_adapters=[name])
    adapter = read_adapter(folder / name)
    return adapter if fingerprint else adapter._replace(metadata={})


def parameters(base, names):
    """For the path of every parameter that `names` end, where the file has its factors, outermost last."""
    found = {}
    for path, _ in base.named_parameters():
        if any(path.endswith(f".{name}") for name in names):
            found.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: module + ".base_layer" * depth
        for module, paths in found.items()
        for depth, path in enumerate(reversed(paths))
    }


def value(pattern, path, default):
    found = [v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", path)]
    return found[0] if found else default


def deltas(adapter, base) -> dict[str, list[torch.Tensor]]:
    """ΔW of each expert by parameter, and of each layer by module, in float64, from the file alone."""
    config, found = adapter.config, {}
    places = parameters(base, config.target_parameters or [])
    places |= {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): None
        for key in adapter.tensors
        if key.endswith("q_proj.lora_A.weight")
    }
    for path, place in places.items():
        A, B = (adapter.tensors[f"{PREFIX}{place or path}.lora_{X}.weight"].double() for X in "AB")
        E = len(base.get_parameter(path)) if place else 1
        r = len(A) // E
        assert r == value(config.rank_pattern, path, config.r)
        scaling = value(config.alpha_pattern, path, config.lora_alpha) / (
            r**0.5 if config.use_rslora else r
        )
        found[path] = [scaling * B[:, e::E] @ A[e * r : e * r + r] for e in range(E)]
    return found


def weighted(adapters, base):
    total = {}
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        for path, each in deltas(adapter, base).items():
            before = total.get(path, [0] * len(each))
            total[path] = [b + weight * d for b, d in zip(before, each, strict=True)]
    return total


def close(found, wanted, atol=1e-10):
    assert found.keys() == wanted.keys()
    for path in wanted:
        torch.testing.assert_close(
            torch.stack(found[path]), torch.stack(wanted[path]), rtol=0, atol=atol
        )


@pytest.mark.parametrize("fingerprint", [True, False])
def test_the_sum_of_files_is_that_of_each_expert(tmp_path, fingerprint):
    fields = ({"rank_pattern": {"down_proj": 4}}, {"r": 2, "use_rslora": True})
    model, base = two(fields), tiny.mixtral()
    adapters = [saved(model, tmp_path, name, fingerprint) for name in ("one", "two")]
    result = combine(adapters, WEIGHTS, "linear", check_base=fingerprint)
    wanted = weighted(adapters, base)
    close(deltas(result, base), wanted)
    rows = {row.path: row for row in errors(result)}
    assert rows.keys() == wanted.keys()
    assert {path.rpartition(".")[2]: row.r for path, row in rows.items()} == {
        "q_proj": 5,
        "gate_up_proj": 5,
        "down_proj": 6,
    }
    for path, row in rows.items():
        assert row.norm == pytest.approx(torch.stack(wanted[path]).norm().item())
    write_adapter(tmp_path / "both", result)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "both"))
    truth = copy.deepcopy(base)
    for path, each in wanted.items():
        name = path if path.endswith(("_up_proj", "down_proj")) else f"{path}.weight"
        W = truth.get_parameter(name)
        W.data += torch.stack(each).reshape(W.shape)
    torch.testing.assert_close(logits(merged), logits(truth), rtol=0, atol=1e-10)


@pytest.mark.parametrize("base", [tiny.mixtral, tiny.gpt_oss])
@pytest.mark.parametrize("rank", [1, 4])
def test_svd_is_the_best_approximation_for_each_expert(tmp_path, base, rank):
    model = two(base=base)
    adapters = [saved(model, tmp_path, name) for name in ("one", "two")]
    result = combine(adapters, WEIGHTS, "svd", svd_rank=rank)
    wanted = weighted(adapters, base())
    best, lost, whole = {}, {}, {}
    for path, each in wanted.items():
        parts = [torch.linalg.svd(delta, full_matrices=False) for delta in each]
        best[path] = [U[:, :rank] * S[:rank] @ Vh[:rank] for U, S, Vh in parts]
        lost[path] = sum(float(S[rank:].square().sum()) for _, S, _ in parts)
        whole[path] = sum(float(S.square().sum()) for _, S, _ in parts)
    close(deltas(result, base()), best)
    for row in errors(result):
        assert row.error == pytest.approx((lost[row.path] / whole[row.path]) ** 0.5, abs=1e-9)
    total = (sum(lost.values()) / sum(whole.values())) ** 0.5
    assert total_error(errors(result)) == pytest.approx(total)


def test_energy_is_kept_in_every_expert(tmp_path):
    adapter = saved(two(({"r": 6}, {})), tmp_path, "one")
    result = resize(adapter, energy=0.8)
    before, after = deltas(adapter, tiny.mixtral()), deltas(result, tiny.mixtral())
    ranks = {row.path: row.r for row in errors(result)}
    for path, each in before.items():
        needed = []
        for delta, smaller in zip(each, after[path], strict=True):
            assert (delta - smaller).norm() ** 2 <= 0.2 * delta.norm() ** 2
            share = torch.linalg.svdvals(delta).square().cumsum(0) / delta.norm() ** 2
            needed.append(int((share < 0.8).sum()) + 1)
        assert ranks[path] == max(needed) < 6
    assert resize(adapter, rank=6) is adapter


@pytest.mark.parametrize("method", ["ties_svd", "linear_factors", "ties"])
def test_the_other_methods_see_one_expert_at_a_time(tmp_path, method):
    """As if each expert were a layer of its own: trimmed, and dropped from, by itself."""
    fields = {"target_modules": [], "target_parameters": BOTH[1:]}
    model = two((fields, {**fields, "lora_alpha": 2}))
    adapters = [saved(model, tmp_path, name) for name in ("one", "two")]
    extra = {"density": 0.5} if METHODS[method].takes_density else {}
    result = combine(adapters, WEIGHTS, method, **extra)
    path, E = "model.layers.1.mlp.experts.down_proj", 3
    found = deltas(result, tiny.mixtral())[path]
    key = f"{PREFIX}{path.rpartition('.')[0]}"
    for e in range(E):
        alone = []
        for adapter in adapters:
            A, B = (adapter.tensors[f"{key}.lora_{X}.weight"] for X in "AB")
            r = len(A) // E
            tensors = {
                f"{PREFIX}x.lora_A.weight": A[e * r : e * r + r],
                f"{PREFIX}x.lora_B.weight": B[:, e::E],
            }
            plain = LoraConfig(r=r, lora_alpha=adapter.config.lora_alpha, target_modules=["x"])
            alone.append(Adapter(plain, tensors, {}))
        one = combine(alone, WEIGHTS, method, **extra)
        A, B = (one.tensors[f"{PREFIX}x.lora_{X}.weight"].double() for X in "AB")
        torch.testing.assert_close(found[e], B @ A)


def test_dare_drops_other_entries_of_every_expert():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 7, generator=generator).repeat(3, 1)
    B = torch.randn(5, 4, generator=generator).repeat_interleave(3, dim=1)
    plain = LoraConfig(r=4, lora_alpha=3, target_modules=[], target_parameters=["moe.w"])
    tensors = {f"{PREFIX}moe.lora_A.weight": A, f"{PREFIX}moe.lora_B.weight": B}
    result = combine([Adapter(plain, tensors, {})], [1.0], "dare_linear_svd", density=0.5)
    A, B = (result.tensors[f"{PREFIX}moe.lora_{X}.weight"] for X in "AB")
    each = [B[:, e::3] @ A[e * 4 : e * 4 + 4] for e in range(3)]
    assert all((each[i] - each[j]).abs().max() > 0.1 for i, j in [(0, 1), (0, 2), (1, 2)])


def test_in_a_model_with_parameters_of_each_adapters_choice():
    fields = ({}, {"r": 2, "target_parameters": BOTH[1:], "target_modules": ["q_proj", "gate"]})
    model = two(fields)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "both", "linear")
    config = model.peft_config["both"]
    assert (config.target_modules, config.target_parameters) == (["q_proj", "gate"], BOTH)
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.experts"))
    for one in layer.chain():
        parts = [
            w * one.get_delta_weight(name)
            for name, w in zip(("one", "two"), WEIGHTS, strict=True)
            if name in one.r
        ]
        torch.testing.assert_close(one.get_delta_weight("both"), sum(parts), rtol=0, atol=1e-6)
    model.base_model.set_adapter("both")
    both = logits(model)
    model.base_model.set_adapter("one")
    assert (logits(model) - both).abs().max() > 1e-3


def test_what_the_files_do_not_say(tmp_path):
    one, both = (saved(two(f), tmp_path / str(i), "one") for i, f in enumerate([
        ({"target_parameters": BOTH[:1]}, {}), ({}, {})]))  # fmt: skip
    other = saved(two(({"target_parameters": BOTH[1:]}, {})), tmp_path / "2", "one")
    combine([one, both], WEIGHTS, "linear")
    with pytest.raises(CombineError, match="experts: adapter 1 and adapter 2 adapt different ones"):
        combine([one, other], WEIGHTS, "linear")
    # two parameters of one shape and rank, and other alphas: which is which is nowhere
    torch.manual_seed(0)
    tensors = {
        f"{PREFIX}moe.{within}lora_{X}.weight": torch.randn(shape)
        for within in ("", "base_layer.")
        for X, shape in (("A", (6, 5)), ("B", (5, 6)))
    }
    plain = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["moe.w1", "moe.w2"])
    adapter = Adapter(plain, tensors, {})
    result = resize(adapter, energy=0.7)
    assert {row.path for row in errors(result)} == {"moe", "moe.base_layer"}
    assert len({row.r for row in errors(result)}) == 1
    unclear = LoraConfig(**{**plain.to_dict(), "alpha_pattern": {"w1": 4}})
    with pytest.raises(CombineError, match="which of its 2 pairs of factors"):
        resize(adapter._replace(config=unclear), rank=1)
    wrong = LoraConfig(**{**plain.to_dict(), "r": 4})
    with pytest.raises(CombineError, match="does not go with their ranks and shapes"):
        resize(adapter._replace(config=wrong), rank=1)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_files_that_peft_wrote_and_reads(tmp_path):
    """Without a fingerprint, nothing says which of the two parameters is which; they are combined all the same."""
    peft = pytest.importorskip("peft")
    base, fields = tiny.mixtral(), {"target_modules": ["q_proj"], "target_parameters": BOTH[::-1]}
    for r in (2, 3):
        made = peft.get_peft_model(tiny.mixtral(), peft.LoraConfig(r=r, lora_alpha=5, **fields))
        randomise(made, r).save_pretrained(tmp_path / str(r))
    adapters = [read_adapter(tmp_path / "2"), read_adapter(tmp_path / "3")]
    result = combine(adapters, WEIGHTS, "svd", svd_rank=4, check_base=False)
    for path, each in weighted(adapters, base).items():
        for found, M in zip(deltas(result, base)[path], each, strict=True):
            U, S, Vh = torch.linalg.svd(M, full_matrices=False)
            torch.testing.assert_close(found, U[:, :4] * S[:4] @ Vh[:4], rtol=0, atol=1e-10)
    write_adapter(tmp_path / "both", resize(result, energy=0.9))
    ours, theirs = (
        logits(library.PeftModel.from_pretrained(tiny.mixtral(), tmp_path / "both"))
        for library in (lowrank, peft)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
