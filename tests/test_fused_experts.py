"""Adapters of single experts (`experts.0.w1`), from before transformers fused them, on fused models."""

import copy
import json
import math

import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny import logits

from lowrank import LoraConfig, PeftModel, get_peft_model, plan
from lowrank.errors import AdapterMismatchError, TargetError
from lowrank.fused_experts import build_peft_weight_mapping, conversions_of, for_fused_experts

# model -> (builder, {name within an expert: (out, in)}, experts, the module's name in the file and here)
MODELS = {
    "mixtral": (
        tiny.mixtral,
        {"w1": (16, 24), "w3": (16, 24), "w2": (24, 16)},
        3,
        ("block_sparse_moe", "mlp"),
        [0, 1],
    ),
    "qwen3_moe": (
        tiny.qwen3_moe,
        {"gate_proj": (12, 24), "up_proj": (12, 24), "down_proj": (24, 12)},
        5,
        ("mlp", "mlp"),
        [1],
    ),
}


def old_file(name, folder, r=2, alpha=3, seed=4, leave_out=(), **fields):
    """An adapter as transformers 4 and PEFT would have written it; its tensors, without the prefix."""
    _, shapes, experts, (old, _), layers = MODELS[name]
    torch.manual_seed(seed)
    shapes = {n: shape for n, shape in shapes.items() if n not in leave_out}
    tensors = {}

    def add(path, out, in_, rank=r):
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, in_, dtype=torch.float64)
        tensors[f"{path}.lora_B.weight"] = torch.randn(out, rank, dtype=torch.float64) * 0.3

    for layer in layers:
        for e in range(experts):
            for n, (out, in_) in shapes.items():
                rank = fields.get("rank_pattern", {}).get(n, r)
                add(f"model.layers.{layer}.{old}.experts.{e}.{n}", out, in_, rank)
    if name == "qwen3_moe":  # layer 0 is an ordinary MLP with layers of the same names
        for n in shapes:
            add(f"model.layers.0.mlp.{n}", *((24, 28) if n == "down_proj" else (28, 24)))
    for layer in (0, 1):
        add(f"model.layers.{layer}.self_attn.q_proj", 24, 24)
    folder.mkdir(exist_ok=True)
    prefixed = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["q_proj", *shapes], **fields)
    (folder / "adapter_config.json").write_text(config.to_json_string())
    return tensors


def by_hand(name, base, tensors, scaling):
    """The logits with W + scaling·B·A in each expert's own rows."""
    _, shapes, _, (old, new), _ = MODELS[name]
    gate, up, down = shapes
    model = copy.deepcopy(base)
    for key in tensors:
        if not key.endswith("lora_A.weight"):
            continue
        path = key.removesuffix(".lora_A.weight")
        delta = tensors[f"{path}.lora_B.weight"] @ tensors[key]
        module, _, n = path.rpartition(".")
        delta = delta * scaling(n)
        if ".experts." not in path:
            model.get_submodule(path).weight.data += delta
            continue
        fused, _, e = module.replace(old, new).rpartition(".")
        fused, half = model.get_submodule(fused), shapes[gate][0]
        if n == down:
            fused.down_proj.data[int(e)] += delta
        else:
            rows = slice(0, half) if n == gate else slice(half, None)
            assert n in (gate, up)
            fused.gate_up_proj.data[int(e), rows] += delta
    return logits(model)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_an_old_file_gives_the_same_logits(name, rslora, tmp_path):
    base = MODELS[name][0]()
    tensors = old_file(name, tmp_path, use_rslora=rslora)
    scaling = 3 / math.sqrt(2) if rslora else 3 / 2
    truth = by_hand(name, base, tensors, lambda n: scaling)
    assert (truth - logits(base)).abs().max() > 1e-2
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(loaded), truth, rtol=0, atol=1e-12)
    # and is written as what it is now
    loaded.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    parameters = [p.rpartition(".")[2] for p in config["target_parameters"]]
    assert parameters == ["gate_up_proj", "down_proj"]
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new")
    torch.testing.assert_close(logits(again), truth, rtol=0, atol=1e-12)


def test_only_one_of_the_two_parameters(tmp_path):
    base = tiny.mixtral()
    for leave_out in (["w2"], ["w1", "w3"]):
        tensors = old_file("mixtral", tmp_path, leave_out=leave_out)
        truth = by_hand("mixtral", base, tensors, lambda n: 1.5)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        torch.testing.assert_close(logits(loaded), truth, rtol=0, atol=1e-12)


def test_ranks_that_differ(tmp_path):
    """w1 and w3 of ranks 1 and 3, with alphas that give both the scaling 3/2."""
    base = tiny.mixtral()
    patterns = {
        "rank_pattern": {"w1": 1, "w3": 3},
        "alpha_pattern": {"w1": 1.5, "w3": 4.5},
    }
    tensors = old_file("mixtral", tmp_path, **patterns)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    truth = by_hand("mixtral", base, tensors, lambda n: 1.5)
    torch.testing.assert_close(logits(loaded), truth, rtol=0, atol=1e-12)
    with pytest.raises(TargetError, match="w1 and w3 have different scalings"):
        plan_old(base, ["w1", "w3"], rank_pattern={"w1": 1})


def plan_old(base, names, **fields):
    return plan(base, for_fused_experts(base, LoraConfig(r=2, target_modules=names, **fields)))


def test_what_new_adapters_mean_by_the_old_names():
    targets = {t.path: t for t in plan_old(tiny.qwen3_moe(), ["gate_proj", "up_proj", "q_proj"])}
    assert list(targets) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    ]
    fused = targets["model.layers.1.mlp.experts.gate_up_proj"]
    assert (fused.r, fused.scaling) == (4, 4)
    with pytest.raises(TargetError, match="name gate_proj too"):
        plan_old(tiny.qwen3_moe(), ["up_proj"])
    model = get_peft_model(tiny.mixtral(), LoraConfig(r=2, target_modules=r".*\.(w1|w3|q_proj)"))
    assert model.peft_config["default"].target_parameters == ["experts.gate_up_proj"]
    # the names of modules that are still there mean what they say
    dense = LoraConfig(target_modules=["layers.0.mlp.up_proj"])
    assert for_fused_experts(tiny.qwen3_moe(), dense) is dense
    assert for_fused_experts(tiny.llama(), dense) is dense


def test_a_file_that_lacks_an_expert(tmp_path):
    tensors = old_file("mixtral", tmp_path)
    del tensors["model.layers.1.block_sparse_moe.experts.1.w3.lora_B.weight"]
    prefixed = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    save_file(prefixed, tmp_path / "adapter_model.safetensors")
    base = tiny.mixtral()
    with pytest.raises(AdapterMismatchError, match=r"experts\.1\.w3\.lora_B"):
        PeftModel.from_pretrained(base, tmp_path)
    assert type(base.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("leave_out", [(), ("w2",)])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it_by_our_mapping(name, leave_out, tmp_path, monkeypatch):
    """`model.load_adapter`, which asks peft for build_peft_weight_mapping."""
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    if leave_out and (name != "mixtral"):
        leave_out = ("down_proj",)
    base = MODELS[name][0]()
    tensors = old_file(name, tmp_path, leave_out=leave_out)
    if name == "qwen3_moe":  # PEFT forgets the ordinary layers of the same names
        dense = [key for key in tensors if "layers.0.mlp" in key]
        tensors = {key: t for key, t in tensors.items() if key not in dense}
    truth = by_hand(name, base, tensors, lambda n: 1.5)
    model = copy.deepcopy(base)
    monkeypatch.setattr(conversion, "build_peft_weight_mapping", build_peft_weight_mapping)
    model.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(model), truth, rtol=0, atol=1e-12)


def test_the_mapping_of_an_ordinary_model():
    assert conversions_of(torch.nn.Linear(2, 3)) == []
    names = build_peft_weight_mapping(None, "a")
    for key, meant in {
        "base_model.model.model.layers.0.q_proj.lora_A.weight": "model.layers.0.q_proj.lora_A.a.weight",
        "base_model.model.embed.lora_embedding_B": "embed.lora_embedding_B.a",
        "base_model.model.q.lora_magnitude_vector": "q.lora_magnitude_vector.a.weight",
    }.items():
        for renaming in names:
            key = renaming.rename_source_key(key)[0]
        assert key == meant
