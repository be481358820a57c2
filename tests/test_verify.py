"""`verify`: a true merge passes, and each way of going wrong is done for real and has to be caught."""

import dataclasses
import json
import math
import subprocess
import sys

import peft
import pytest
import tiny
import torch
import transformers
from folders import InProcess, edit_config, rewrite, tensors_of, write_adapter_for, write_base
from safetensors.torch import save_file

import lowrank.verify as verifying
from lowrank import LoraConfig, get_peft_model
from lowrank.errors import AdapterMismatchError
from lowrank.merge import merge_to_folder
from lowrank.model_folder import load_model
from lowrank.verify import probe, verify
from lowrank.verify.inputs import MAX_TOKENS, TEXTS


@pytest.fixture(autouse=True)
def _in_process(monkeypatch, request):
    if "fresh" not in request.node.name:
        monkeypatch.setattr(verifying, "_start_probe", InProcess)


@pytest.fixture
def llama(tmp_path):
    """(base, adapter, merged folder): a right merge in float32, to be spoilt."""
    return make(tmp_path, tiny.llama(), ["q_proj", "down_proj"])


def make(tmp_path, model, targets, task="CAUSAL_LM", dtype=None, scale=0.3, **fields):
    base = write_base(model, tmp_path / "base")
    adapter = write_adapter_for(
        base, tmp_path / "adapter", task, target_modules=targets, scale=scale, **fields
    )
    merge_to_folder(base, adapter, tmp_path / "merged", dtype=dtype)
    return base, adapter, tmp_path / "merged"


def spoil(merged, change):
    """Rewrite the merged folder's tensors with `change(name, tensor) -> tensor or None` (left out)."""
    new = {name: change(name, tensor) for name, tensor in tensors_of(merged).items()}
    rewrite(merged, {name: tensor for name, tensor in new.items() if tensor is not None})


def rescaled(base, factor):
    """W + factor·ΔW in place of W + ΔW."""
    W = tensors_of(base)
    return lambda name, M: W[name] + factor * (M - W[name])


MODELS = {
    "llama": (tiny.llama, "CAUSAL_LM", ["q_proj", "down_proj"], {}),
    "llama tied": (lambda: tiny.llama(tied=True), "CAUSAL_LM", ["v_proj"], {"use_rslora": True}),
    "llama embedding": (tiny.llama, "CAUSAL_LM", ["embed_tokens", "lm_head"], {"use_dora": True}),
    "gpt2": (tiny.gpt2, "CAUSAL_LM", ["c_attn", "c_fc"], {"use_dora": True}),
    "t5": (tiny.t5, "SEQ_2_SEQ_LM", ["q", "wi"], {"bias": "none"}),
    "bert classifier": (
        lambda: tiny.bert(transformers.BertForSequenceClassification, num_labels=3),
        "SEQ_CLS",
        ["query", "value"],
        {"bias": "all"},
    ),
    "bert questions": (
        lambda: tiny.bert(transformers.BertForQuestionAnswering),
        "QUESTION_ANS",
        ["query"],
        {"alpha_pattern": {"layer.1.*query": 9}, "rank_pattern": {"layer.0.*query": 2}},
    ),
    "bert features": (lambda: tiny.bert(transformers.BertModel), "FEATURE_EXTRACTION", ["key"], {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_true_merge_passes(tmp_path, name):
    build, task, targets, fields = MODELS[name]
    result = verify(*make(tmp_path, build(), targets, task, **fields))
    assert result.passed, result.reasons
    assert result.right == result.adapted + result.untouched
    assert not result.warnings
    assert result.outputs.effect > 1e-4
    assert result.outputs.relative_difference < 1e-3
    assert result.rounding < 1e-5
    assert (result.outputs.kl is None) == (task == "FEATURE_EXTRACTION")


def test_a_true_merge_passes_in_a_fresh_process(llama, capfd):
    result = verify(*llama)
    assert result.passed, result.reasons
    assert result.outputs.top1_agreement == 1
    assert capfd.readouterr() == ("", "")


def test_the_fresh_process_knows_nothing_of_lowrank(llama, tmp_path):
    from lowrank.verify.inputs import Inputs

    job = tmp_path / "job"
    job.mkdir()
    inputs = Inputs([{"input_ids": tiny.IDS[:1]}], [None], "")
    verifying._write_job(job, llama[2], inputs, "CAUSAL_LM")
    subprocess.run([sys.executable, "-P", probe.__file__, str(job)], check=True)
    answer = json.loads((job / "answer.json").read_text())
    assert answer == {
        "class": "LlamaForCausalLM",
        "missing": [],
        "unexpected": [],
        "lowrank": [],
    }


@pytest.mark.parametrize("factor", [0.5, 0.89, 1.1, 2, -1])
def test_another_scaling_is_caught(llama, factor):
    spoil(llama[2], rescaled(llama[0], factor))
    result = verify(*llama)
    assert not result.passed
    assert f"{factor:.3f} times the adapter's change" in result.reasons[0]
    assert all(check.present == pytest.approx(factor, abs=1e-3) for check in result.worst[:4])
    # the outputs alone would have shown it too
    assert result.outputs.relative_difference > 0.05


@pytest.mark.parametrize("factor", [0.89, 1.11])
def test_another_scaling_is_caught_under_bfloat16s_rounding(tmp_path, factor):
    folders = make(tmp_path, tiny.llama(), ["q_proj", "down_proj"], scale=0.02)
    rounded = rescaled(folders[0], factor)
    spoil(folders[2], lambda name, M: rounded(name, M).bfloat16())
    edit_config(folders[2], dtype="bfloat16")
    result = verify(*folders, tolerance=0.99)
    assert not result.passed
    assert "adapted tensors do not hold W + ΔW" in result.reasons[0]


def test_a_layer_left_out_is_caught(llama):
    W = tensors_of(llama[0])
    left_out = "model.layers.1.self_attn.q_proj.weight"
    spoil(llama[2], lambda name, M: W[name] if name == left_out else M)
    result = verify(*llama)
    assert not result.passed
    assert result.reasons[0] == (
        "1 of 4 adapted tensors do not hold W + ΔW; "
        f"the adapter's change was left out in {left_out}."
    )
    assert result.worst[0].name == left_out
    assert result.worst[0].present == pytest.approx(0, abs=1e-6)


def test_no_merge_at_all_is_caught(llama):
    rewrite(llama[2], tensors_of(llama[0]))
    result = verify(*llama)
    assert not result.passed
    assert "Nothing was merged" in result.reasons[0]
    assert result.outputs.relative_difference == pytest.approx(1, rel=1e-3)


def test_a_swapped_adapter_is_caught(llama, tmp_path):
    other = write_adapter_for(
        llama[0], tmp_path / "b", "CAUSAL_LM", seed=2, target_modules=["q_proj", "down_proj"]
    )
    result = verify(llama[0], other, llama[2])
    assert not result.passed
    assert "Merged with another adapter?" in result.reasons[0]


def test_dora_merged_as_lora_is_caught(tmp_path):
    folders = make(tmp_path, tiny.llama(), ["q_proj"], use_dora=True)
    W, a = tensors_of(folders[0]), tensors_of(folders[1])

    def as_lora(name, M):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in a:
            return M
        return W[name] + 5 / 3 * a[f"{key}.lora_B.weight"] @ a[f"{key}.lora_A.weight"]

    spoil(folders[2], as_lora)
    assert "adapted tensors do not hold" in verify(*folders).reasons[0]


def test_a_touched_base_tensor_is_caught(llama):
    def nudge(name, M):
        if name == "model.norm.weight":
            M[3] += 1e-4
        return M

    spoil(llama[2], nudge)
    result = verify(*llama)
    assert result.reasons == [
        "Not as in the base, though the adapter does not touch them: model.norm.weight."
    ]
    assert result.worst[0].problem == "1 of 24 values are not the base's"


def test_a_base_that_is_not_finite_proves_nothing(llama):
    """W + ΔW has a NaN where W has one: the folder is what it should be, and no model."""
    base, adapter, merged = llama
    save_file(tensors_of(adapter), adapter / "adapter_model.safetensors")  # without a fingerprint

    def broken(name, tensor):
        if name.endswith("layers.1.self_attn.q_proj.weight"):
            tensor[2, 3] = math.nan
        return tensor

    spoil(base, broken)
    spoil(merged, broken)
    result = verify(*llama)
    assert not result.passed
    wrong = [check for check in result.worst if check.problem]
    assert [check.name for check in wrong] == ["model.layers.1.self_attn.q_proj.weight"]
    assert wrong[0].problem.startswith("1 of ")
    assert any("outputs that are not finite" in reason for reason in result.reasons)


def test_tensors_too_few_and_too_many_are_caught(llama):
    def drop(name, M):
        return None if name == "model.layers.0.mlp.up_proj.weight" else M

    spoil(llama[2], drop)
    tensors = tensors_of(llama[2])
    rewrite(llama[2], tensors | {"model.layers.0.mlp.up_proj.base_layer.weight": torch.ones(2)})
    result = verify(*llama)
    assert not result.passed
    assert result.missing == ["model.layers.0.mlp.up_proj.weight"]
    assert result.unexpected == ["model.layers.0.mlp.up_proj.base_layer.weight"]


def test_a_tensor_of_another_shape_is_caught(llama):
    spoil(llama[2], lambda name, M: M[:-3] if name == "lm_head.weight" else M)
    result = verify(*llama)
    assert not result.passed
    assert result.missing == ["lm_head.weight"]


def test_a_folder_of_another_architecture_is_caught(llama, tmp_path):
    tiny.llama(layers=1, vocab=91, dtype=torch.float32).save_pretrained(tmp_path / "small")
    result = verify(llama[0], llama[1], tmp_path / "small")
    assert not result.passed
    assert "model.layers.1.self_attn.q_proj.weight" in result.missing
    assert result.outputs is None


class TestEmbeddings:
    def test_a_tied_head_forgotten_is_caught(self, tmp_path):
        """lm_head is adapted and the folder written as if it were still tied."""
        folders = make(tmp_path, tiny.llama(tied=True), ["q_proj", "lm_head"])
        assert verify(*folders).passed
        spoil(folders[2], lambda name, M: None if name == "lm_head.weight" else M)
        edit_config(folders[2], tie_word_embeddings=True)
        result = verify(*folders)
        assert not result.passed
        assert result.tied_merged
        assert any("only one of them" in reason for reason in result.reasons)
        assert result.worst[0].name == "lm_head.weight"

    def test_the_embedding_following_its_head_is_caught(self, tmp_path):
        """One tensor for both, W + ΔW of the head: the input embedding is wrong."""
        folders = make(tmp_path, tiny.llama(tied=True), ["q_proj", "lm_head"])
        tensors = tensors_of(folders[2])
        tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
        rewrite(folders[2], tensors)
        edit_config(folders[2], tie_word_embeddings=True)
        result = verify(*folders)
        assert not result.passed
        assert any("Not as in the base" in reason for reason in result.reasons)

    def test_untying_without_need_is_only_told(self, tmp_path):
        folders = make(tmp_path, tiny.llama(tied=True), ["q_proj"])
        tensors = tensors_of(folders[2])
        rewrite(folders[2], tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
        edit_config(folders[2], tie_word_embeddings=False)
        result = verify(*folders)
        assert result.passed
        assert result.tied_base
        assert result.tied_merged is False
        assert "two equal ones" in result.warnings[0]

    @pytest.mark.parametrize("rows", [1, 3])
    def test_forgotten_rows_of_rare_tokens_are_caught(self, tmp_path, rows):
        """The texts do not have these tokens: only the tensors can show it."""
        folders = make(tmp_path, tiny.llama(), ["embed_tokens"])
        W = tensors_of(folders[0])["model.embed_tokens.weight"]

        def forget(name, M):
            if name == "model.embed_tokens.weight":
                M[88 : 88 + rows] = W[88 : 88 + rows]
            return M

        spoil(folders[2], forget)
        result = verify(*folders, inputs=["the old lighthouse keeper"])
        assert not result.passed
        assert len(result.reasons) == 1
        assert "model.embed_tokens.weight" in result.reasons[0]
        row = int(result.worst[0].problem.rsplit(maxsplit=1)[-1])
        assert 88 <= row < 88 + rows
        assert result.outputs.rms_difference < 1e-6

    def test_a_change_of_rare_tokens_alone(self, tmp_path):
        """ΔW is zero but in one row. Made-up inputs contain that token; given ones that do not say so."""
        base = write_base(tiny.llama(), tmp_path / "base")
        adapter = write_adapter_for(
            base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["embed_tokens"]
        )
        tensors = tensors_of(adapter)
        key = "base_model.model.model.embed_tokens.lora_embedding_A"
        keep = torch.zeros(93)
        keep[77] = 1
        tensors[key] = tensors[key] * keep
        from safetensors.torch import save_file

        save_file(tensors, adapter / "adapter_model.safetensors")
        merge_to_folder(base, adapter, tmp_path / "merged")

        assert verify(base, adapter, tmp_path / "merged").outputs.effect > 1e-4
        result = verify(base, adapter, tmp_path / "merged", inputs=["the old keeper"])
        assert result.passed
        assert "no effect on these 1 inputs" in result.warnings[0]

        rewrite(tmp_path / "merged", tensors_of(base))
        assert not verify(base, adapter, tmp_path / "merged", inputs=["the old keeper"]).passed


class TestRounding:
    def test_bfloat16_of_a_strong_adapter_passes_and_is_told(self, tmp_path):
        folders = make(tmp_path, tiny.llama(), ["q_proj", "down_proj"], dtype="bfloat16")
        result = verify(*folders)
        assert result.passed, result.reasons
        assert result.dtype == "bfloat16"
        share = result.outputs.relative_difference
        assert 1e-3 < share < 0.1
        assert result.worst[0].rounding > 1e-3

    def test_bfloat16_of_a_weak_adapter_fails_with_advice(self, tmp_path):
        base = write_base(tiny.llama(), tmp_path / "base", torch.bfloat16)
        adapter = write_adapter_for(
            base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["lm_head"], scale=3e-4
        )
        folders = base, adapter, tmp_path / "merged"
        merge_to_folder(*folders)
        result = verify(*folders)
        assert not result.passed
        assert len(result.reasons) == 1
        assert "rounding to bfloat16" in result.reasons[0]
        assert "--dtype float32" in result.reasons[0]
        assert result.right == result.adapted + result.untouched  # the merge itself is right
        assert result.rounding > 0.1
        # in float32 the same adapter is kept
        merge_to_folder(*folders[:2], folders[2], dtype="float32", overwrite=True)
        assert verify(*folders).passed

    def test_the_rounding_of_each_tensor_is_that_of_float64(self, tmp_path):
        folders = make(tmp_path, tiny.gpt2(), ["c_attn"], dtype="bfloat16")
        W, a = tensors_of(folders[0]), tensors_of(folders[1])
        worst = {check.name: check for check in verify(*folders).worst}
        noise = change = 0
        for i in (0, 1):
            key = f"base_model.model.transformer.h.{i}.attn.c_attn"
            delta = 5 / 3 * a[f"{key}.lora_B.weight"].double() @ a[f"{key}.lora_A.weight"].double()
            exact = W[f"transformer.h.{i}.attn.c_attn.weight"].double() + delta.T
            lost = (exact.bfloat16().double() - exact).norm()
            check = worst[f"transformer.h.{i}.attn.c_attn.weight"]
            assert check.rounding == pytest.approx((lost / delta.norm()).item(), rel=1e-6)
            noise, change = noise + lost**2, change + delta.norm() ** 2
        assert verify(*folders).rounding == pytest.approx(math.sqrt(noise / change), rel=1e-6)

    @pytest.mark.interop
    @pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers the old way
    def test_a_merge_by_peft_in_bfloat16_passes(self, tmp_path):
        """It rounds ΔW before the sum and the sum after it: within the room that is left for that."""
        base = write_base(tiny.llama(), tmp_path / "base", torch.bfloat16)
        adapter = write_adapter_for(
            base,
            tmp_path / "adapter",
            "CAUSAL_LM",
            target_modules=["q_proj", "down_proj"],
            scale=0.3,
        )
        model = load_model(base, "CAUSAL_LM").model
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        result = verify(base, adapter, tmp_path / "merged")
        assert result.passed, result.reasons


def test_an_adapter_that_changes_nothing_is_no_proof(tmp_path):
    folders = make(tmp_path, tiny.llama(), ["q_proj"], scale=0)
    result = verify(*folders)
    assert not result.passed
    assert "every ΔW is exactly zero" in result.reasons[0]


def test_the_numbers_are_those_of_float64(llama):
    spoil(llama[2], rescaled(llama[0], 0.8))
    data = [{"input_ids": tiny.IDS[0], "labels": [-100, -100, *tiny.IDS[0, 2:].tolist()]}]
    o = verify(*llama, inputs=data).outputs
    base, merged = (
        load_model(folder, "CAUSAL_LM").model.double() for folder in (llama[0], llama[2])
    )
    live = tiny.merged_by_hand(base, tensors_of(llama[1]), 5 / 3)
    with torch.no_grad():
        b, a, m = (model(input_ids=tiny.IDS[:1]).logits[0] for model in (base, live, merged))
    p, q = a.log_softmax(-1), m.log_softmax(-1)
    assert o.max_difference == pytest.approx((m - a).abs().max().item(), rel=1e-3)
    assert o.mean_difference == pytest.approx((m - a).abs().mean().item(), rel=1e-3)
    assert o.rms_difference == pytest.approx((m - a).square().mean().sqrt().item(), rel=1e-3)
    assert o.effect == pytest.approx((a - b).square().mean().sqrt().item(), rel=1e-3)
    assert o.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-2)
    assert o.top1_agreement == (a.argmax(-1) == m.argmax(-1)).double().mean().item()
    for found, logits in (
        (o.perplexity_base, b),
        (o.perplexity_adapter, a),
        (o.perplexity_merged, m),
    ):
        loss = torch.nn.functional.cross_entropy(logits[1:-1], tiny.IDS[0, 2:])
        assert found == pytest.approx(loss.exp().item(), rel=1e-4)
    assert o.perplexity_tokens == 5
    assert o.source == "1 examples given"


def test_perplexities_of_a_translation_model(tmp_path):
    folders = make(tmp_path, tiny.t5(), ["q", "v"], "SEQ_2_SEQ_LM")
    labels = tiny.IDS[1]
    o = verify(*folders, inputs=[{"input_ids": tiny.IDS[0], "labels": labels}]).outputs
    model = load_model(folders[2], "SEQ_2_SEQ_LM").model
    with torch.no_grad():
        loss = model(input_ids=tiny.IDS[:1], labels=labels[None]).loss
    assert o.perplexity_merged == pytest.approx(loss.exp().item(), rel=1e-4)
    assert o.perplexity_tokens == 7


def test_the_same_seed_gives_the_same_inputs(llama):
    first, second = (verify(*llama, seed=3).outputs for _ in range(2))
    assert first == second
    assert verify(*llama, seed=4).outputs != first
    assert first.source == f"{len(TEXTS)} texts and 2 rows of token ids (seed 3)"


def test_long_inputs_are_cut(llama):
    ids = torch.randint(93, (MAX_TOKENS + 50,))
    assert verify(*llama, inputs=[{"input_ids": ids}]).outputs.positions == MAX_TOKENS


def test_the_result_is_json(llama):
    spoil(llama[2], rescaled(llama[0], math.inf))
    result = verify(*llama)
    assert not result.passed
    from lowrank.report.data import to_json

    text = json.dumps(to_json(result), allow_nan=False)
    assert json.loads(text)["passed"] is False
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.passed = True


@pytest.mark.parametrize("beside", [True, False], ids=["start saved", "start computed"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_that_was_taken_out_is_taken_out_again(init, beside, tmp_path):
    """W + s·(B·A − B₀·A₀): merged, verified, and wrong where B₀·A₀ is forgotten."""
    base = write_base(tiny.llama(), tmp_path / "base")
    model = get_peft_model(
        load_model(base, "CAUSAL_LM", dtype=torch.float32).model,
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=init,
            task_type="CAUSAL_LM",
        ),
    )
    tiny.randomise(model).save_pretrained(tmp_path / "adapter")
    if not beside:
        (tmp_path / "adapter" / "lora_start.safetensors").unlink()
    if not beside and init == "pissa_niter_2":
        with pytest.raises(AdapterMismatchError, match="'pissa_niter_2' took out"):
            merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
        return
    merge_to_folder(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", "CAUSAL_LM").model
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model.eval()), atol=1e-5, rtol=1e-5)
    assert verify(base, tmp_path / "adapter", tmp_path / "merged").passed
    layer = merged.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.weight += 1e-3
    merged.save_pretrained(tmp_path / "wrong")
    assert not verify(base, tmp_path / "adapter", tmp_path / "wrong").passed
