"""target_parameters: fused experts and other bare parameters, against W + scaling·B·A for one expert at a time."""

import copy
import math
import pickle

import pytest
import tiny
import torch
from tiny import bits, logits, randomise, same_bits
from torch import nn
from torch.func import functional_call

from lowrank import LoraConfig, PeftModel, get_peft_model, plan, rows
from lowrank.errors import (
    AdapterMismatchError,
    BaseMismatchError,
    ConfigError,
    RowsError,
    TargetError,
)
from lowrank.expected import changes, loss, transposed_weights
from lowrank.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from lowrank.layer import LoraLayer
from lowrank.merge import merge_to_folder
from lowrank.state import get_peft_model_state_dict

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
MODELS = {
    "mixtral": tiny.mixtral,
    "qwen3_moe": tiny.qwen3_moe,
    "gpt_oss": tiny.gpt_oss,
    "llama4": tiny.llama4,
}


def config(**fields) -> LoraConfig:
    names = {"target_modules": [], "target_parameters": BOTH}
    return LoraConfig(**{"r": 3, "lora_alpha": 5, **names, **fields})


def adapted(base, fields=None, seed=1, **more):
    """A copy of `base` with a random adapter."""
    return randomise(get_peft_model(copy.deepcopy(base), config(**(fields or {}), **more)), seed)


def parameters_in_file(base, names) -> dict[str, str]:
    """For the path of every parameter that `names` end, where PEFT's file has its A and B."""
    found: dict[str, list[str]] = {}
    for path, _ in base.named_parameters():
        if any(path.endswith(f".{name}") for name in names):
            found.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: f"base_model.model.{module}{'.base_layer' * depth}"
        for module, paths in found.items()
        for depth, path in enumerate(reversed(paths))
    }


def changed_weights(base, tensors, names, scaling) -> dict[str, torch.Tensor]:
    """Each named parameter of `base` in float64 with the change in `tensors`, an expert at a time."""
    found = {}
    for path, place in parameters_in_file(base, names).items():
        W = base.get_parameter(path).detach().double()
        A, B = (tensors[f"{place}.lora_{X}.weight"].double() for X in "AB")
        s = scaling(path) if callable(scaling) else scaling
        if W.ndim == 2:
            found[path] = W + s * B @ A
            continue
        transposed = getattr(base.get_submodule(path.rpartition(".")[0]), "is_transposed", False)
        E, r = len(W), len(A) // len(W)
        each = []
        for e in range(E):
            delta = torch.zeros(len(B), A.shape[1], dtype=torch.float64)
            for k in range(r):
                delta = delta + s * torch.outer(B[:, k * E + e], A[e * r + k])
            each.append(W[e] + (delta.T if transposed else delta))
        found[path] = torch.stack(each)
    return found


def by_hand(base, tensors, names=BOTH, scaling=5 / 3):
    model = copy.deepcopy(base).double()
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    for path, W in changed_weights(base, tensors, names, scaling).items():
        model.get_parameter(path).data = W
    return logits(model)


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_merge_are_W_plus_BA_for_each_expert(name):
    base = MODELS[name]()
    model = adapted(base)
    truth = by_hand(base, get_peft_model_state_dict(model))
    assert (truth - logits(base)).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-12)

    before = bits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-12)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.unmerge_adapter()
    assert same_bits(before, bits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))

    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, LoraLayer)]
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(merged), truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradients(name):
    base = MODELS[name]().requires_grad_(False)
    model = adapted(base)
    tensors = {k: t.clone().requires_grad_() for k, t in get_peft_model_state_dict(model).items()}
    changed = changed_weights(base, tensors, BOTH, 5 / 3)
    functional_call(base, changed, (tiny.IDS,)).logits.square().sum().backward()
    model(tiny.IDS).logits.square().sum().backward()
    found = {key: p.grad for key, p in named_in_file(model).items()}
    for key, tensor in tensors.items():
        assert tensor.grad.abs().max() > 1e-6
        torch.testing.assert_close(found[key], tensor.grad, rtol=1e-9, atol=1e-12)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]


def named_in_file(model, adapter="default"):
    from lowrank.state import adapter_keys

    parameters = dict(model.named_parameters())
    return {key: parameters[name] for key, name in adapter_keys(model, adapter).items()}


def test_the_file_is_PEFTs():
    shapes = {
        key.removeprefix("base_model.model.model.layers."): tuple(tensor.shape)
        for key, tensor in get_peft_model_state_dict(adapted(tiny.gpt_oss())).items()
        if ".layers.1." in key
    }
    assert shapes == {
        "1.mlp.experts.base_layer.lora_A.weight": (9, 24),
        "1.mlp.experts.base_layer.lora_B.weight": (32, 9),
        "1.mlp.experts.lora_A.weight": (9, 16),
        "1.mlp.experts.lora_B.weight": (24, 9),
    }


def test_matrices_that_are_parameters():
    """A router's weight, an ordinary layer's, and a parameter that no forward hides in a layer."""
    base = tiny.mixtral()
    names = ["gate.weight", "q_proj.weight", "embed_tokens.weight"]
    model = adapted(base, target_parameters=names)
    tensors = get_peft_model_state_dict(model)
    assert tensors["base_model.model.model.embed_tokens.lora_A.weight"].shape == (3, 24)
    truth = by_hand(base, tensors, names)
    torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-12)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-12)


def test_rank_and_alpha_by_the_parameters_path():
    base = tiny.mixtral()
    fields = {
        "rank_pattern": {"experts.gate_up_proj": 2, "q_proj": 4},
        "alpha_pattern": {r".*\.1\..*\.down_proj": 7},
        "use_rslora": True,
        "target_modules": ["q_proj"],
    }
    targets = {t.path: t for t in plan(base, config(**fields))}
    target = targets["model.layers.0.mlp.experts.gate_up_proj"]
    assert (target.r, target.experts, target.out, target.in_) == (2, 3, 32, 24)
    assert target.params == 3 * 2 * (32 + 24)
    assert targets["model.layers.0.self_attn.q_proj"].r == 4

    model = adapted(base, fields)
    tensors = get_peft_model_state_dict(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == sum(t.params for t in targets.values())

    def scaling(path):
        alpha = 7 if path.endswith("1.mlp.experts.down_proj") else 5
        return alpha / math.sqrt(4 if "q_proj" in path else 2 if "gate_up" in path else 3)

    names = [*BOTH, "q_proj.weight"]
    torch.testing.assert_close(
        logits(model), by_hand(base, tensors, names, scaling), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.filterwarnings("ignore:.*grouped_mm")
def test_every_way_in_which_transformers_runs_experts(name, dtype):
    base = MODELS[name](dtype)
    model = adapted(base)
    tensors = get_peft_model_state_dict(model)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    truth = by_hand(base, tensors)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.config._experts_implementation = implementation
        found = logits(model)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=tolerance)
        model.zero_grad()
        model(tiny.IDS).logits.float().square().sum().backward()
        for parameter in named_in_file(model).values():
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0


def test_adapters_of_different_parameters():
    base = tiny.mixtral()
    a, b, c = ({"target_parameters": names} for names in ([BOTH[0]], BOTH, [BOTH[1]]))
    model = get_peft_model(copy.deepcopy(base), config(**c), "c")
    model.add_adapter("b", config(r=2, **b))
    model.add_adapter("a", config(r=4, **a))
    for name in "abc":
        model.set_adapter(name)
        randomise(model, ord(name))
    files = {name: get_peft_model_state_dict(model, adapter_name=name) for name in "abc"}
    for name, fields, scaling in (("a", a, 5 / 4), ("b", b, 5 / 2), ("c", c, 5 / 3)):
        assert files[name].keys() == get_peft_model_state_dict(adapted(base, fields)).keys()
        model.set_adapter(name)
        truth = by_hand(base, files[name], fields["target_parameters"], scaling)
        torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-12)

    model.set_adapter(["a", "b", "c"])
    together = copy.deepcopy(base)
    for name, fields, scaling in (("a", a, 5 / 4), ("b", b, 5 / 2), ("c", c, 5 / 3)):
        for path, W in changed_weights(
            base, files[name], fields["target_parameters"], scaling
        ).items():
            together.get_parameter(path).data += W - base.get_parameter(path)
    torch.testing.assert_close(logits(model), logits(together), rtol=0, atol=1e-12)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(together), rtol=0, atol=1e-12)
    model.unmerge_adapter()

    model.delete_adapter("b")
    model.set_adapter("a")
    truth = by_hand(base, files["a"], a["target_parameters"], 5 / 4)
    torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-12)
    assert same_bits(bits(model.unload()), bits(base))


def test_a_combined_adapter_has_its_parameters_in_their_places():
    base = tiny.mixtral()
    model = adapted(base)
    model.add_adapter("other", config(target_parameters=BOTH[1:]))
    keys = get_peft_model_state_dict(model).keys()
    truth = by_hand(base, get_peft_model_state_dict(model))
    model.add_weighted_adapter(["default"], [1.0], "same", "linear")
    model.set_adapter("same")
    torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-12)
    assert get_peft_model_state_dict(model, adapter_name="same").keys() == keys


def test_save_and_load(tmp_path):
    base = tiny.gpt_oss()
    model = adapted(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].target_parameters == BOTH
    again = get_peft_model(copy.deepcopy(base), config(target_parameters=BOTH[1:]), "other")
    again.load_adapter(tmp_path, "default")
    again.set_adapter("default")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("room", [None, 6])
def test_swapped_in_place(room, tmp_path):
    base = tiny.gpt_oss()
    other = adapted(base, seed=5, r=4, rank_pattern={"experts.down_proj": 2})
    other.save_pretrained(tmp_path)
    model = adapted(base)
    if room:
        prepare_model_for_compiled_hotswap(model, target_rank=room)
        truth = by_hand(base, get_peft_model_state_dict(model))
        torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-12)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-12)
    mine, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_another_base_is_noticed(tmp_path):
    adapted(tiny.mixtral()).save_pretrained(tmp_path)
    other = tiny.mixtral()
    other.model.layers[1].mlp.experts.down_proj.data[2] += 1
    with pytest.raises(BaseMismatchError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path):
    model = adapted(tiny.mixtral())
    model.save_pretrained(tmp_path)
    before = bits(tiny.mixtral())
    other = tiny.mixtral()
    with pytest.raises(AdapterMismatchError):
        PeftModel.from_pretrained(other, tmp_path, config=config(target_parameters=BOTH[1:]))
    assert same_bits(bits(other), before)

    one = adapted(tiny.mixtral(), target_parameters=BOTH[:1])
    before = bits(one)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors"):
        one.load_adapter(tmp_path, "other")
    assert same_bits(bits(one), before)


def test_an_adapter_that_does_not_load_leaves_the_others_nested(tmp_path):
    adapted(tiny.mixtral(), seed=3, r=4).save_pretrained(tmp_path / "wide")
    one = adapted(tiny.mixtral(), target_parameters=BOTH[:1])
    before = bits(one)
    (tmp_path / "wide" / "adapter_config.json").write_text(config(r=3).to_json_string())
    with pytest.raises(AdapterMismatchError):
        one.load_adapter(tmp_path / "wide", "other")
    assert same_bits(bits(one), before)


def test_an_error_in_the_forward_leaves_the_parameters():
    model = adapted(tiny.mixtral())
    experts = model.get_base_model().model.layers[1].mlp.experts.get_base_layer()
    held = dict(experts._parameters)
    experts.act_fn = nn.Linear(5, 7)
    with pytest.raises(RuntimeError):
        model(tiny.IDS)
    assert all(experts._parameters[name] is p for name, p in held.items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_dora_normalises_each_row_of_each_expert(name, tmp_path):
    base = MODELS[name]()
    model = adapted(base, use_dora=True)
    model.save_pretrained(tmp_path)
    tensors = get_peft_model_state_dict(model)
    truth = copy.deepcopy(base)
    for path, V in changed_weights(base, tensors, BOTH, 5 / 3).items():
        place = parameters_in_file(base, BOTH)[path]
        dim = 1 if name == "gpt_oss" else 2  # which of V's is `in`
        m = tensors[f"{place}.lora_magnitude_vector"].unsqueeze(dim)
        truth.get_parameter(path).data = m * V / V.square().sum(dim, keepdim=True).sqrt()
    assert (logits(truth) - by_hand(base, tensors)).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), logits(truth), rtol=0, atol=1e-12)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(truth), rtol=0, atol=1e-12)
    config, held = model.peft_config["default"], transposed_weights(base)
    found = list(changes(base.state_dict(), tensors, config, held))
    merged = loaded.merge_and_unload().state_dict()
    assert len(found) == 4
    for change in found:
        torch.testing.assert_close(merged[change.name], change.after, rtol=0, atol=1e-13)
    # at the start DoRA is its base
    torch.testing.assert_close(
        logits(get_peft_model(MODELS[name](), config)), logits(base), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_every_row_of_a_batch_goes_through_its_own_experts(name):
    base = MODELS[name]()
    names = ["two", "__base__", "one", "one", "two"]
    ids = torch.cat([tiny.IDS, tiny.IDS[:2].flip(1)])
    # the router too, whose module gives several tensors
    router = "router.weight" if name in ("gpt_oss", "llama4") else "gate.weight"
    model = get_peft_model(base, config(target_parameters=[*BOTH, router]), "one")
    model.add_adapter("two", config(r=2, target_modules=["q_proj"], target_parameters=BOTH[1:]))
    model.base_model.set_adapter(["one", "two"])
    randomise(model)
    truth = torch.zeros(5, ids.shape[1], 93, dtype=torch.float64)
    for each in ("one", "two"):
        model.set_adapter(each)
        here = [row for row, other in enumerate(names) if other == each]
        truth[here] = model(ids[here]).logits
    with model.disable_adapter():
        truth[1] = model(ids[1:2]).logits[0]
    model.base_model.set_adapter(["one", "two"])
    found = model(ids, adapter_names=names).logits
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)
    assert (truth[0] - truth[2]).abs().max() > 1e-3
    # the gradients reach each adapter through its own rows alone
    found[2:4].square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if ".two." in n and p.grad is not None}
    assert all(not grad.any() for grad in grads.values())
    layer = model.get_base_model().model.layers[1]
    down = (
        (layer.feed_forward if name == "llama4" else layer.mlp)
        .experts.chain()[0]
        .lora_B["one"]
        .weight
    )
    model.set_adapter("one")
    wanted = torch.autograd.grad(model(ids[2:4]).logits.square().mean(), down)[0]
    torch.testing.assert_close(down.grad, wanted, rtol=0, atol=1e-12)


def test_rows_that_cannot_be_told_apart_are_refused():
    """Experts of a class that is not known, with one tensor: its tokens may lie in any order."""
    model = adapted(tiny.llama4())
    for layer in model.get_base_model().model.layers:
        experts = layer.feed_forward.experts.get_base_layer()
        experts.__class__ = type("Strange", (type(experts),), {})
    with pytest.raises(RowsError, match="not told which tokens go to which expert"):
        model(tiny.IDS, adapter_names=["default", "__base__", "default"])
    same = model(tiny.IDS, adapter_names=["default"] * 3).logits
    assert torch.equal(same, logits(model))
    with rows(model, ["__base__"] * 3):
        assert torch.equal(logits(model), logits(tiny.llama4()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model, plain = adapted(tiny.mixtral()), adapted(tiny.mixtral())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for m in (model, plain):
        m.train()
        m(tiny.IDS, use_cache=False).logits.square().sum().backward()
    theirs = named_in_file(plain)
    for key, parameter in named_in_file(model).items():
        torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-12, atol=1e-14)


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    model = adapted(tiny.mixtral(torch.float32))
    model.get_base_model().config._experts_implementation = "batched_mm"
    layer = model.get_base_model().model.layers[0].mlp.experts
    x, index = torch.randn(5, 24), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]])
    weights = torch.rand(5, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, index, weights), layer(x, index, weights))


def test_copies_and_pickles():
    model = adapted(tiny.gpt_oss())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        kinds = {layer.kind.name for layer in other.modules() if isinstance(layer, LoraLayer)}
        assert kinds == {"transposed experts"}


def test_whoever_takes_the_weight_gets_the_adapted_one():
    model = adapted(tiny.mixtral())
    tensors = get_peft_model_state_dict(model)
    experts = model.get_base_model().model.layers[0].mlp.experts
    truth = changed_weights(tiny.mixtral(), tensors, BOTH, 5 / 3)
    for name in ("gate_up_proj", "down_proj"):
        W = truth[f"model.layers.0.mlp.experts.{name}"]
        torch.testing.assert_close(getattr(experts, name), W, rtol=0, atol=1e-13)
    inner = nn.Parameter(torch.zeros_like(experts.get_base_layer().gate_up_proj))
    experts.gate_up_proj = inner
    assert experts.get_base_layer().gate_up_proj is inner
    assert "gate_up_proj" not in experts._parameters


def test_autocast_keeps_the_weights_dtype():
    model = adapted(tiny.mixtral(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        W = model.get_base_model().model.layers[0].mlp.experts.down_proj
    assert W.dtype == torch.float32


# --- what a configuration means -------------------------------------------------------------------


def refusal(base, **fields) -> str:
    with pytest.raises(TargetError) as caught:
        plan(base, config(**fields))
    return str(caught.value)


def paths(base, **fields) -> list[str]:
    return [target.path for target in plan(base, config(**fields))]


def test_planned_on_the_meta_device_in_the_models_order():
    with torch.device("meta"):
        base = tiny.mixtral(torch.float32)
    found = paths(base, target_modules=["q_proj", "lm_head"])
    assert found[:3] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    assert len(found) == 7
    assert found[-1] == "lm_head"


def test_names_that_match_nothing():
    base = tiny.mixtral()
    assert "nearest: experts.gate_up_proj" in refusal(
        base, target_parameters=["experts.gate_upproj"]
    )
    text = refusal(base, target_parameters=["zzz"])
    assert "those that can be adapted end in: experts.down_proj, experts.gate_up_proj." in text
    text = refusal(base, target_parameters=["mlp.experts"])
    assert "'mlp.experts' is a module; its parameters: gate_up_proj, down_proj" in text
    text = refusal(base, target_parameters=None, target_modules=["gate_up_proj", "experts"])
    assert "'gate_up_proj' is a parameter, no module; name it in target_parameters" in text
    assert "name those in target_parameters (gate_up_proj, down_proj)" in text
    assert "norm.weight: a parameter of 1 dimensions" in refusal(
        base, target_parameters=["model.norm.weight"]
    )
    assert "use target_modules" in refusal(tiny.llama(), target_parameters=["experts.x"])
    assert refusal(base, target_parameters=[]).startswith("target_modules is empty")
    with pytest.raises(ConfigError, match="must be a list"):
        LoraConfig(target_parameters="experts.down_proj")


def test_what_the_experts_cannot_carry():
    text = refusal(
        tiny.llama4(), lora_dropout=0.1, use_dora=True, target_parameters=[*BOTH, "no.such"]
    )
    assert text.startswith("3 problems")
    assert "set lora_dropout=0" in text
    assert "set use_dora=False" in text
    assert "no bias for lora_bias" in refusal(tiny.mixtral(), lora_bias=True)
    assert "fan_in_fan_out=True has no meaning" in refusal(tiny.mixtral(), fan_in_fan_out=True)
    text = refusal(tiny.gpt2(), target_parameters=["c_attn.weight"])
    assert "name the module in target_modules" in text


def test_a_module_and_its_parameter():
    base = tiny.mixtral()
    text = refusal(base, target_modules=["q_proj"], target_parameters=["q_proj.weight"])
    assert "named in target_modules and in target_parameters" in text
    model = get_peft_model(
        tiny.mixtral(), config(target_modules=["embed_tokens"], target_parameters=None)
    )
    text = refusal(model.get_base_model(), target_parameters=["embed_tokens.weight"])
    assert "another adapter adapts the module itself" in text
    # the same weight in the same layout is the same layer
    model.add_adapter("a", config(target_modules=["q_proj", "gate"], target_parameters=None))
    model.add_adapter("b", config(target_parameters=["q_proj.weight", "gate.weight"]))


def test_layers_and_exclusions():
    base = tiny.mixtral()
    assert paths(base, layers_to_transform=[1], target_parameters=BOTH[:1]) == [
        "model.layers.1.mlp.experts.gate_up_proj"
    ]
    both = paths(base, layers_to_transform=1, target_modules=["q_proj"])
    assert both == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    left = paths(base, exclude_modules=["layers.0.mlp.experts", "experts.down_proj"])
    assert left == ["model.layers.1.mlp.experts.gate_up_proj"]
    left = paths(base, exclude_modules=r".*\.0\..*")
    assert left == [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    # PEFT applies neither to parameters, so that the file names them one by one
    model = get_peft_model(base, config(exclude_modules=r".*\.0\..*", target_modules=["q_proj"]))
    assert model.peft_config["default"].target_parameters == left
    assert "rank_pattern: 'down_prj' matches none" in refusal(
        tiny.mixtral(), rank_pattern={"down_prj": 2}
    )


def test_usual_modules_beside_the_parameters():
    """As PEFT: target_modules=None adds an architecture's usual ones, and only for a known one."""
    assert "model.layers.0.self_attn.q_proj" in paths(tiny.mixtral(), target_modules=None)
    odd = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.MultiheadAttention(6, 2)})
    assert paths(odd, target_modules=None, target_parameters=["b.in_proj_weight"]) == [
        "b.in_proj_weight"
    ]


def test_saved_modules():
    assert "either adapted or saved whole" in refusal(tiny.mixtral(), modules_to_save=["mlp"])


# --- the measure of a merge -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_what_a_merge_has_to_give_is_known_from_the_file(name):
    base = MODELS[name]()
    fields = {
        "target_modules": ["q_proj"],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"gate_up_proj": 4},
    }
    model = adapted(base, fields)
    tensors = get_peft_model_state_dict(model)
    found = {
        change.name: change
        for change in changes(
            base.state_dict(), tensors, model.peft_config["default"], transposed_weights(base)
        )
    }
    merged = model.merge_and_unload().state_dict()
    changed = {n for n, t in base.state_dict().items() if not torch.equal(t, merged[n])}
    assert found.keys() == changed
    assert len(changed) == 6 if name != "qwen3_moe" else 4
    for path, change in found.items():
        assert loss(merged[path], change).error == 0
        torch.testing.assert_close(merged[path], change.after, rtol=0, atol=1e-13)
    deeper = ".experts.base_layer.base_layer."
    extra = {key.replace(".experts.base_layer.", deeper): t for key, t in tensors.items()}
    with pytest.raises(AdapterMismatchError, match="belong to nothing"):
        list(changes(base.state_dict(), extra, model.peft_config["default"]))


def test_a_merged_folder(tmp_path):
    base = tiny.mixtral(torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    merge_to_folder(None, tmp_path / "adapter", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    truth = by_hand(base, get_peft_model_state_dict(model))
    torch.testing.assert_close(logits(merged).double(), truth, rtol=0, atol=1e-5)
