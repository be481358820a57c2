"""`extract`: the adapter of two checkpoints on disk, against an SVD in float64."""

import pytest
import tiny
import torch
import transformers
from folders import rewrite, tensors_of, write_base

from lowrank import PeftModel, read_adapter, write_adapter
from lowrank.combine import errors
from lowrank.errors import ExtractError, TargetError
from lowrank.extract import extract
from lowrank.merge import merge_to_folder
from lowrank.model_folder import load_model
from lowrank.task_arithmetic import low_rank

PREFIX = "base_model.model."


def tuned_from(base, folder, change, only=lambda name: True):
    """A copy of `base` whose matrices have `change` (name, W) added."""
    load_model(base, "CAUSAL_LM").model.save_pretrained(folder)
    tensors = tensors_of(folder)
    for name, W in tensors.items():
        if only(name):
            tensors[name] = (W.float() + change(name, W)).to(W.dtype)
    rewrite(folder, tensors)
    return folder


def noise(name, W):
    generator = torch.Generator().manual_seed(len(name) * 131 + W.numel())
    return torch.randn(W.shape, generator=generator) * 0.1


def is_linear(name):
    return "proj" in name and name.endswith("weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_is_the_best_approximation(tmp_path, dtype):
    base = write_base(tiny.llama(), tmp_path / "base", dtype, tokenizer=False)
    tuned = tuned_from(base, tmp_path / "tuned", noise, is_linear)
    result = extract(base, tuned, rank=3)
    W, M = tensors_of(base), tensors_of(tuned)
    rows = {row.path: row for row in errors(result.adapter)}
    assert set(rows) == {name.removesuffix(".weight") for name in W if is_linear(name)}
    for path, row in rows.items():
        delta = M[f"{path}.weight"].double() - W[f"{path}.weight"].double()
        U, S, Vh = torch.linalg.svd(delta)
        A, B = (result.adapter.tensors[f"{PREFIX}{path}.lora_{x}.weight"].double() for x in "AB")
        assert A.shape == (3, delta.shape[1])
        torch.testing.assert_close(B @ A, U[:, :3] * S[:3] @ Vh[:3], atol=1e-5, rtol=0)
        assert row.error == pytest.approx((S[3:].norm() / S.norm()).item(), rel=1e-4)
        assert row.norm == pytest.approx(S.norm().item(), rel=1e-4)
    assert result.rest == []
    assert result.identical == sum(not is_linear(name) for name in W)


def test_energy_keeps_as_many_as_it_takes(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    tuned = tuned_from(base, tmp_path / "tuned", noise, is_linear)
    result = extract(base, tuned, energy=0.7, target_modules=["q_proj", "down_proj"])
    write_adapter(tmp_path / "adapter", result.adapter)
    W, M = tensors_of(base), tensors_of(tuned)
    ranks = {row.path: row.r for row in errors(result.adapter)}
    assert len(set(ranks.values())) > 1
    for path, r in ranks.items():
        S = torch.linalg.svdvals(M[f"{path}.weight"].double() - W[f"{path}.weight"].double())
        share = S.square().cumsum(0) / S.square().sum()
        assert share[r - 1] >= 0.7 > share[r - 2]
    again = read_adapter(tmp_path / "adapter")
    model = PeftModel.from_pretrained(
        load_model(base, "CAUSAL_LM").model, str(tmp_path / "adapter")
    )
    assert set(again.config.target_modules) == {"q_proj", "down_proj"}
    assert {path.split("base_model.model.")[-1]: layer.r["default"] for path, layer in _lora_layers(model)} == ranks  # fmt: skip


def _lora_layers(model):
    return [(path, m) for path, m in model.named_modules() if type(m).__name__ == "LoraLayer"]


def test_gpt2_and_layers_that_are_the_same(tmp_path):
    base = write_base(tiny.gpt2(), tmp_path / "base", tokenizer=False)
    tuned = tuned_from(base, tmp_path / "tuned", noise, lambda n: "h.1.attn.c_attn.weight" in n)
    result = extract(base, tuned, rank=24)
    assert [row.path for row in errors(result.adapter)] == ["transformer.h.1.attn.c_attn"]
    write_adapter(tmp_path / "adapter", result.adapter)
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    M, W = tensors_of(tuned), tensors_of(tmp_path / "merged")
    assert all(torch.allclose(W[name], M[name], atol=1e-5) for name in M)


@pytest.mark.parametrize("save", [False, True])
def test_what_is_no_matrix_is_listed_and_saved_when_asked(tmp_path, save):
    base = write_base(tiny.llama(attention_bias=True), tmp_path / "base", tokenizer=False)
    changed = ("q_proj.weight", "v_proj.bias", "v_proj.weight", "model.norm.weight", "lm_head")
    tuned = tuned_from(base, tmp_path / "tuned", noise, lambda n: any(c in n for c in changed))
    result = extract(base, tuned, rank=24, save_rest=save)
    found = {row.name: row for row in result.rest}
    assert set(found) == {
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.self_attn.v_proj.bias" for i in (0, 1)),
    }
    W, M = tensors_of(base), tensors_of(tuned)
    for name, row in found.items():
        share = (M[name].double() - W[name].double()).norm() / W[name].double().norm()
        assert row.change == pytest.approx(share.item(), rel=1e-6)
        assert row.saved is save
    write_adapter(tmp_path / "adapter", result.adapter)
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    for name in M:
        same = save or name not in found
        torch.testing.assert_close(merged[name], M[name] if same else W[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_grew(tmp_path, tied):
    base = write_base(tiny.llama(tied=tied), tmp_path / "base", tokenizer=False)
    tuned = tuned_from(base, tmp_path / "tuned", noise, is_linear)
    model = load_model(tuned, "CAUSAL_LM").model
    model.resize_token_embeddings(97, mean_resizing=False)
    model.save_pretrained(tuned)
    assert all(row.change is None for row in extract(base, tuned, rank=2).rest)
    result = extract(base, tuned, rank=40, save_rest=True)
    assert len(result.rest) == (1 if tied else 2)
    write_adapter(tmp_path / "adapter", result.adapter)
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    M, found = tensors_of(tuned), tensors_of(tmp_path / "merged")
    assert M.keys() == found.keys()
    for name in M:
        torch.testing.assert_close(found[name], M[name], atol=1e-5, rtol=0)


def test_what_does_not_go_together_is_told_at_once(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    tuned = tuned_from(base, tmp_path / "tuned", noise, is_linear)
    tensors = tensors_of(tuned)
    del tensors["model.norm.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:5].clone()
    rewrite(tuned, tensors)
    with pytest.raises(
        ExtractError, match=r"2 problems(.|\n)*\(5, 24\)(.|\n)*norm\.weight is only in"
    ):
        extract(base, tuned, rank=2)
    with pytest.raises(ExtractError, match="are the same in every layer"):
        extract(base, base, rank=2)
    with pytest.raises(ExtractError, match=r"needs either rank=… or energy"):
        extract(base, base)
    with pytest.raises(ExtractError, match="at least 1"):
        extract(base, base, rank=0)
    with pytest.raises(TargetError, match="q_prj"):
        extract(base, base, rank=2, target_modules=["q_prj"])


@pytest.mark.parametrize("head_too", [False, True])
def test_a_head_that_left_its_tie(tmp_path, head_too):
    base = write_base(tiny.llama(tied=True), tmp_path / "base", tokenizer=False)
    model = load_model(base, "CAUSAL_LM").model
    head = model.get_input_embeddings().weight.detach().clone() + 0.1
    model.lm_head.weight = torch.nn.Parameter(
        head if head_too else model.lm_head.weight.data.clone()
    )
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    result = extract(base, tmp_path / "tuned", rank=2, save_rest=True)
    assert [(row.name, row.saved) for row in result.rest] == [("lm_head.weight", True)] * head_too
    write_adapter(tmp_path / "adapter", result.adapter)
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    if head_too:
        assert torch.equal(tensors_of(tmp_path / "merged")["lm_head.weight"], head)


def test_a_pickled_checkpoint_is_refused(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    (base / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ExtractError, match="no safetensors files"):
        extract(base, base, rank=2)


@pytest.mark.parametrize("decay", ["fast", "slow", "flat"])
def test_the_randomised_svd_is_near_the_best(decay):
    """Large enough to be randomised; also where the singular values hardly fall."""
    torch.manual_seed(0)
    n = torch.arange(1.0, 601.0, dtype=torch.float64)
    S = {"fast": n**-2, "slow": n**-0.5, "flat": 1 + 1 / n}[decay]
    U, V = (torch.linalg.qr(torch.randn(k, 600, dtype=torch.float64)).Q for k in (700, 620))
    M = (U * S @ V.T).float()
    generator = torch.Generator().manual_seed(1)
    found = low_rank(M, generator, rank=20)
    best = (S[20:].norm() / S.norm()).item()
    assert best * 0.999 <= found.error <= best * 1.01
    share = S.square().cumsum(0) / S.square().sum()
    energy = share[40].item() - 1e-4
    needed = int((share >= energy).nonzero()[0, 0]) + 1
    by_energy = low_rank(M, generator, energy=energy)
    assert by_energy.error**2 <= 1 - energy + 1e-6
    assert needed <= len(by_energy.A) <= needed + 5


def test_a_classifier(tmp_path):
    build = transformers.BertForSequenceClassification
    base = write_base(tiny.bert(build, num_labels=3), tmp_path / "base", tokenizer=False)
    model = load_model(base, "SEQ_CLS").model
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.add_(0.3)
        model.classifier.weight.add_(0.3)
    model.save_pretrained(tmp_path / "tuned")
    result = extract(base, tmp_path / "tuned", rank=1)  # a head is saved in any case
    assert result.adapter.config.task_type == "SEQ_CLS"
    assert [row.name for row in result.rest] == ["classifier.weight"]
    write_adapter(tmp_path / "adapter", result.adapter)
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    M, found = tensors_of(tmp_path / "tuned"), tensors_of(tmp_path / "merged")
    for name in M:
        torch.testing.assert_close(found[name], M[name], atol=1e-5, rtol=0)


# --- fused experts --------------------------------------------------------------------------------

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def changed_experts(model, path, seed):
    """A change of rank 5 for each expert of the parameter, in float32, in the parameter's own form."""
    W = model.get_parameter(path)
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(len(W), W.shape[1], 5, generator=random)
    return left @ torch.randn(len(W), 5, W.shape[2], generator=random) / 10


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.8}])
def test_each_fused_expert_is_approximated_by_itself(tmp_path, name, how):
    """Mixtral's files have a tensor for each expert and matrix; GPT-OSS's all in one, transposed."""
    base = getattr(tiny, name)(torch.float32)
    base.save_pretrained(tmp_path / "base")
    tuned = getattr(tiny, name)(torch.float32)
    paths = [n for n, _ in base.named_parameters() if n.endswith(tuple(BOTH))]
    del paths[0]  # gate_up_proj of the first layer stays: its module adapts one parameter only
    deltas = {}
    with torch.no_grad():
        for i, path in enumerate(paths):
            tuned.get_parameter(path).add_(changed_experts(base, path, i))
            delta = tuned.get_parameter(path).double() - base.get_parameter(path).double()
            deltas[path] = delta.mT if name == "gpt_oss" else delta
        tuned.model.layers[1].self_attn.q_proj.weight += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    result = extract(
        tmp_path / "base",
        tmp_path / "tuned",
        target_modules=["q_proj"],
        target_parameters=BOTH,
        **how,
    )
    rows = {row.path: row for row in errors(result.adapter)}
    assert rows.keys() == {*paths, "model.layers.1.self_attn.q_proj"}
    assert result.rest == []
    write_adapter(tmp_path / "adapter", result.adapter)
    base = load_model(tmp_path / "base", "CAUSAL_LM").model
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))  # compares the fingerprint
    for path, delta in deltas.items():
        module, _, parameter = path.rpartition(".")
        chain = model.get_base_model().get_submodule(module).chain()
        layer = next(layer for layer in chain if layer.kind.weight == parameter)
        found = layer.get_delta_weight("default").double()
        found = found.mT if name == "gpt_oss" else found
        parts = [torch.linalg.svd(each, full_matrices=False) for each in delta]
        shares = [S.square().cumsum(0) / S.square().sum() for _, S, _ in parts]
        k = how.get("rank") or max(int((share < 0.8).sum()) + 1 for share in shares)
        assert rows[path].r == k
        lost = 0.0
        for e, (U, S, Vh) in enumerate(parts):
            own = k if "rank" in how else int((shares[e] < 0.8).sum()) + 1
            best = U[:, :own] * S[:own] @ Vh[:own]
            torch.testing.assert_close(found[e], best, atol=1e-5, rtol=0)
            lost += S[own:].square().sum().item()
        assert rows[path].error == pytest.approx((lost**0.5) / delta.norm().item(), rel=1e-3)
    merge_to_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_experts_that_are_not_named_are_listed(tmp_path):
    base = tiny.mixtral(torch.float32)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.model.layers[0].mlp.experts.down_proj[1] += 0.1
        base.model.layers[0].self_attn.q_proj.weight += 0.1
    base.save_pretrained(tmp_path / "tuned")
    result = extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert [row.name.rpartition("experts.")[2] for row in result.rest] == ["1.w2.weight"]
    with pytest.raises(TargetError, match="target_parameters"):
        extract(tmp_path / "base", tmp_path / "tuned", rank=2, target_parameters=["experts.down"])
