"""Adapters of experts in GGUF, against each expert's ΔW worked out in float64 from the bytes of both files."""

import json

import pytest
import torch
from adapters import PREFIX, assert_same, of_gguf, of_mlx, written
from safetensors.torch import load_file

from lowrank import Adapter, LoraConfig, read_adapter, write_adapter
from lowrank.errors import ConvertError
from lowrank.formats import convert

E, H, F = 3, 10, 7
AT = "model.layers.1.mlp.experts"
LOCAL = ("mixtral", "gpt_oss")  # what config.json calls their sizes
SHAPES = {f"{AT}.gate_up_proj": (2 * F, H), f"{AT}.down_proj": (H, F)}


def base_folder(folder, model_type="mixtral"):
    folder.mkdir()
    values = {
        "model_type": model_type,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": H,
        "num_hidden_layers": 2,
        "num_local_experts" if model_type in LOCAL else "num_experts": E,
        "intermediate_size" if model_type in LOCAL else "moe_intermediate_size": F,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def write_fused(folder, ranks, alphas, names=tuple(SHAPES), router=""):
    """PEFT's keys: the module's own, within base_layer that of the parameter before it."""
    tensors = {}
    for depth, path in enumerate(reversed(names)):
        at, (out, in_), r = PREFIX + AT + ".base_layer" * depth, SHAPES[path], ranks[path]
        tensors[f"{at}.lora_A.weight"] = torch.randn(E * r, in_)
        tensors[f"{at}.lora_B.weight"] = torch.randn(out, E * r)
    targets = [path.partition("mlp.")[2] for path in names]
    if router:
        at = f"{PREFIX}model.layers.1.mlp.{router}"
        tensors[f"{at}.lora_A.weight"] = torch.randn(4, H)
        tensors[f"{at}.lora_B.weight"] = torch.randn(E, 4)
        targets.append(f"mlp.{router}.weight")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[],
        target_parameters=targets,
        rank_pattern={path.partition("mlp.")[2]: ranks[path] for path in names},
        alpha_pattern={path.partition("mlp.")[2]: alphas[path] for path in names},
    )
    write_adapter(folder, Adapter(config, tensors, {}))
    return folder


def fused_delta(folder, depth, r, alpha):
    """(expert, out, in): expert e has rows e·r… of A and columns e, E + e, 2E + e, … of B."""
    tensors = load_file(folder / "adapter_model.safetensors")
    at = PREFIX + AT + ".base_layer" * depth
    A, B = (tensors[f"{at}.lora_{factor}.weight"].double() for factor in "AB")
    return torch.stack([alpha / r * B[:, e::E] @ A[e * r : (e + 1) * r] for e in range(E)])


@pytest.mark.parametrize("r", [4, 5], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_fused_experts(tmp_path, r, kind):
    """Of equal rank only the base's sizes tell which of the two is which. gpt-oss has gate's and up's rows by turns."""
    base = base_folder(tmp_path / "base", kind)
    word = "router" if kind == "gpt_oss" else "gate"
    ranks = dict(zip(SHAPES, (r, 4), strict=True))
    alphas = dict(zip(SHAPES, (6, 2.5), strict=True)) if r == 5 else dict.fromkeys(SHAPES, 6)
    source = write_fused(tmp_path / "in", ranks, alphas, router=word)
    convert(source, tmp_path / "a.gguf", "gguf", base=base)
    wide = fused_delta(source, 1, r, alphas[f"{AT}.gate_up_proj"])
    gate, up = (wide[:, ::2], wide[:, 1::2]) if kind == "gpt_oss" else wide.chunk(2, dim=1)
    down = fused_delta(source, 0, 4, alphas[f"{AT}.down_proj"])
    tensors = load_file(source / "adapter_model.safetensors")
    A, B = (tensors[f"{PREFIX}model.layers.1.mlp.{word}.lora_{f}.weight"].double() for f in "AB")
    wanted = {"gate_exps": gate, "up_exps": up, "down_exps": down, "gate_inp": 6 / 4 * B @ A}
    wanted = {f"blk.1.ffn_{name}.weight": delta for name, delta in wanted.items()}
    assert_same(of_gguf(tmp_path / "a.gguf"), wanted)

    convert(tmp_path / "a.gguf", tmp_path / "out", "peft", base=base)
    config = read_adapter(tmp_path / "out").config
    assert set(config.target_parameters) == {*SHAPES, f"model.layers.1.mlp.{word}.weight"}
    before = read_adapter(source).tensors
    after = read_adapter(tmp_path / "out").tensors
    assert {k: t.shape for k, t in after.items()} == {k: t.shape for k, t in before.items()}
    convert(tmp_path / "out", tmp_path / "b.gguf", "gguf")
    assert_same(of_gguf(tmp_path / "b.gguf"), wanted)


def mlx_name(name, block):
    number, word = name.split(".")[1], name.split(".")[2].split("_")[1]
    end = "gate" if "gate_inp" in name else f"switch_mlp.{word}_proj"
    return f"model.layers.{number}.{block}.{end}"


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_fused_experts_in_mlx(tmp_path, kind):
    base, block = (
        base_folder(tmp_path / "base", kind),
        "block_sparse_moe" if kind == "mixtral" else "mlp",
    )
    ranks, alphas = dict(zip(SHAPES, (5, 2), strict=True)), dict(zip(SHAPES, (6, 2.5), strict=True))
    source = write_fused(tmp_path / "in", ranks, alphas, router="gate")
    with pytest.raises(ConvertError, match=r"how many experts.*base="):
        convert(source, tmp_path / "mlx", "mlx")
    convert(source, tmp_path / "mlx", "mlx", base=base)
    convert(source, tmp_path / "a.gguf", "gguf", base=base)
    found = of_gguf(tmp_path / "a.gguf")  # which the test above has compared
    wanted = {mlx_name(name, block): delta for name, delta in found.items()}
    assert_same(of_mlx(tmp_path / "mlx"), wanted)
    convert(tmp_path / "mlx", tmp_path / "out", "peft", base=base)
    convert(tmp_path / "out", tmp_path / "b.gguf", "gguf")
    assert_same(of_gguf(tmp_path / "b.gguf"), found)
    oss = base_folder(tmp_path / "oss", "gpt_oss")
    with pytest.raises(ConvertError, match="not for gpt_oss"):
        convert(source, tmp_path / "x", "mlx", base=oss)
    singles = {f"model.layers.0.mlp.experts.{e}.w2": (H, F) for e in range(E)}
    with pytest.raises(ConvertError, match="no DoRA for experts"):
        convert(written(tmp_path / "m", singles, dora=True), tmp_path / "x", "mlx", base=base)


@pytest.mark.parametrize("name", SHAPES)
def test_one_parameter_alone(tmp_path, name):
    base = base_folder(tmp_path / "base", "qwen3_moe")
    source = write_fused(tmp_path / "in", {name: 2}, {name: 5}, names=(name,))
    convert(source, tmp_path / "a.gguf", "gguf", base=base)
    delta = fused_delta(source, 0, 2, 5)
    words = ["down"] if "down" in name else ["gate", "up"]
    parts = delta.chunk(len(words), dim=1)
    wanted = {f"blk.1.ffn_{w}_exps.weight": p for w, p in zip(words, parts, strict=True)}
    assert_same(of_gguf(tmp_path / "a.gguf"), wanted)
    convert(tmp_path / "a.gguf", tmp_path / "out", "peft")
    torch.testing.assert_close(fused_delta(tmp_path / "out", 0, 2, 5), delta, rtol=0, atol=1e-5)


MIXTRAL = {"w1": ("gate", F, H), "w3": ("up", F, H), "w2": ("down", H, F)}
QWEN = {f"{word}_proj": (word, out, in_) for word, out, in_ in MIXTRAL.values()}


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_single_experts(tmp_path, kind):
    """Of different ranks and alphas, one expert's missing, one layer's up too."""
    base, names = base_folder(tmp_path / "base", kind), MIXTRAL if kind == "mixtral" else QWEN
    inner = "block_sparse_moe" if kind == "mixtral" else "mlp"
    wanted, shapes, last = {}, {}, list(names)[1]
    for i in range(2):
        for name, (_, out, in_) in names.items():
            if (i, name) != (1, last):
                shapes |= {
                    f"model.layers.{i}.{inner}.experts.{e}.{name}": (out, in_) for e in (0, 2)
                }
    first = next(iter(names))
    patterns = {
        "rank_pattern": {f"experts.2.{first}": 5},
        "alpha_pattern": {f"layers.1.{inner}.experts.0.{first}": 1},
    }
    source = written(tmp_path / "in", shapes, **patterns)
    tensors = load_file(source / "adapter_model.safetensors")
    for path, (out, in_) in shapes.items():
        A, B = (tensors[f"{PREFIX}{path}.lora_{factor}.weight"].double() for factor in "AB")
        _, _, i, _, _, e, name = path.split(".")
        alpha = 1 if (i, e, name) == ("1", "0", first) else 6
        at = f"blk.{i}.ffn_{names[name][0]}_exps.weight"
        delta = wanted.setdefault(at, torch.zeros(E, out, in_, dtype=torch.float64))
        delta[int(e)] = alpha / len(A) * B @ A
    convert(source, tmp_path / "a.gguf", "gguf", base=base)
    assert_same(of_gguf(tmp_path / "a.gguf"), wanted)
    # back they are fused, gate over up at the sum of their ranks
    convert(tmp_path / "a.gguf", tmp_path / "out", "peft", base=base)
    convert(tmp_path / "out", tmp_path / "b.gguf", "gguf")
    found = of_gguf(tmp_path / "b.gguf")
    assert not found.pop("blk.1.ffn_up_exps.weight").any()
    assert_same(found, wanted)


def test_experts_that_the_base_has_not_are_refused(tmp_path):
    base = base_folder(tmp_path / "base")
    source = written(tmp_path / "in", {"model.layers.0.block_sparse_moe.experts.3.w1": (F, H)})
    with pytest.raises(ConvertError, match="has 3 experts"):
        convert(source, tmp_path / "a.gguf", "gguf", base=base)
    adapter = read_adapter(
        write_fused(tmp_path / "x", dict.fromkeys(SHAPES, 2), dict.fromkeys(SHAPES, 3))
    )
    single = f"{PREFIX}{AT}.1.w2"
    more = {
        f"{single}.lora_A.weight": torch.ones(4, F),
        f"{single}.lora_B.weight": torch.ones(H, 4),
    }
    write_adapter(tmp_path / "twice", adapter._replace(tensors={**adapter.tensors, **more}))
    with pytest.raises(ConvertError, match="down of the experts is adapted twice"):
        convert(tmp_path / "twice", tmp_path / "a.gguf", "gguf", base=base)
    half = tmp_path / "half"
    half.mkdir()
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "num_local_experts": 6}))
    with pytest.raises(ConvertError):
        convert(tmp_path / "x", tmp_path / "a.gguf", "gguf", base=str(half))
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ConvertError, match="no weight for"):
        convert(tmp_path / "x", tmp_path / "a.gguf", "gguf", base=str(dense))
