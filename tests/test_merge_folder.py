"""`merge_to_folder`: the folder on disk, loaded by transformers alone, against float64."""

import json
import math

import pytest
import tiny
import torch
import transformers
from folders import (
    WORDS,
    InProcess,
    rewrite,
    tensors_of,
    write_adapter_for,
    write_base,
    write_tokenizer,
)
from safetensors.torch import save_file
from tiny import merged_by_hand

from lowrank import LoraConfig, get_peft_model
from lowrank.errors import (
    AdapterMismatchError,
    BaseMismatchError,
    LowrankError,
    MergeError,
    ModelFolderError,
)
from lowrank.merge import merge_to_folder
from lowrank.merge_files import may_overflow
from lowrank.merge_inputs import input_covariances
from lowrank.merge_plan import Part
from lowrank.model_folder import TASKS, is_tied, load_base, load_model
from lowrank.tensor_files import Entry
from lowrank.verify import verify

MODELS = {
    "llama": (tiny.llama, "CAUSAL_LM", ["q_proj", "down_proj"]),
    "llama tied": (lambda: tiny.llama(tied=True), "CAUSAL_LM", ["v_proj", "up_proj"]),
    "gpt2": (tiny.gpt2, "CAUSAL_LM", ["c_attn", "c_proj"]),
    "t5": (tiny.t5, "SEQ_2_SEQ_LM", ["q", "wo"]),
    "bert classifier": (
        lambda: tiny.bert(transformers.BertForSequenceClassification, num_labels=3),
        "SEQ_CLS",
        ["query", "dense"],
    ),
    "llama classifier": (tiny.llama_classifier, "SEQ_CLS", ["q_proj"]),
    "bert tokens": (
        lambda: tiny.bert(transformers.BertForTokenClassification, num_labels=4),
        "TOKEN_CLS",
        ["key"],
    ),
    "bert questions": (
        lambda: tiny.bert(transformers.BertForQuestionAnswering),
        "QUESTION_ANS",
        ["value"],
    ),
    "bert features": (lambda: tiny.bert(transformers.BertModel), "FEATURE_EXTRACTION", ["query"]),
}
METHODS = {
    "lora": ({}, 5 / 3),
    "rslora": ({"use_rslora": True}, 5 / math.sqrt(3)),
    "dora": ({"use_dora": True}, 5 / 3),
}


def outputs(model, task):
    extra = {"decoder_input_ids": tiny.IDS.flip(0)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result = model(input_ids=tiny.IDS, **extra)
    return torch.cat([result[field].flatten() for field in TASKS[task][1]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_computes_what_float64_says(tmp_path, name, method):
    build, task, targets = MODELS[name]
    fields, scaling = METHODS[method]
    base = write_base(build(), tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(
        base, tmp_path / "adapter", task, target_modules=targets, lora_dropout=0.3, **fields
    )

    result = merge_to_folder(base, adapter, tmp_path / "out")

    truth = merged_by_hand(
        load_model(base, task, dtype=torch.float32).model, tensors_of(adapter), scaling
    )
    merged = load_model(tmp_path / "out", task)
    assert type(merged.model) is type(load_model(base, task).model)
    assert not merged.missing
    assert not merged.unexpected
    assert is_tied(merged.model) == is_tied(load_model(base, task).model)
    torch.testing.assert_close(
        outputs(merged.model.double(), task), outputs(truth, task), atol=1e-5, rtol=1e-5
    )
    assert result.dtype == "float32"
    assert result.task == task
    assert result.built is None
    assert 0 < result.overall_rounding < 1e-5


def test_patterns_and_biases(tmp_path):
    base = write_base(tiny.llama(attention_bias=True), tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(
        base,
        tmp_path / "adapter",
        "CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "embed_tokens"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"layers.1.self_attn.v_proj": 7, "embed_tokens": 4},
        bias="lora_only",
    )
    merge_to_folder(base, adapter, tmp_path / "out")
    W, M, a = (tensors_of(tmp_path / part) for part in ("base", "out", "adapter"))

    def product(path, B="lora_B.weight", A="lora_A.weight"):
        key = f"base_model.model.{path}"
        return a[f"{key}.{B}"].double() @ a[f"{key}.{A}"].double()

    for i, scaling in ((0, 5 / 2), (1, 7 / 2)):
        path = f"model.layers.{i}.self_attn.v_proj"
        exact = W[f"{path}.weight"].double() + scaling * product(path)
        torch.testing.assert_close(M[f"{path}.weight"].double(), exact, atol=1e-6, rtol=1e-6)
        assert torch.equal(M[f"{path}.bias"], a[f"base_model.model.{path}.base_layer.bias"])
        assert not torch.equal(M[f"{path}.bias"], W[f"{path}.bias"])
    path = "model.embed_tokens"
    exact = (
        W[f"{path}.weight"].double()
        + 4 / 3 * product(path, "lora_embedding_B", "lora_embedding_A").T
    )
    torch.testing.assert_close(M[f"{path}.weight"].double(), exact, atol=1e-6, rtol=1e-6)


def test_one_rounding_to_the_asked_dtype_and_its_cost(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(
        base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"], scale=0.05
    )
    result = merge_to_folder(base, adapter, tmp_path / "out", dtype="bfloat16")
    W, M, a = (tensors_of(tmp_path / part) for part in ("base", "out", "adapter"))
    noise = change = 0.0
    for i in (0, 1):
        path = f"model.layers.{i}.self_attn.q_proj"
        key = f"base_model.model.{path}"
        delta = 5 / 3 * a[f"{key}.lora_B.weight"].double() @ a[f"{key}.lora_A.weight"].double()
        exact = W[f"{path}.weight"].double() + delta
        assert M[f"{path}.weight"].dtype == torch.bfloat16
        # float32's sum may fall on the other side of a tie, once in some ten thousand
        assert (M[f"{path}.weight"] != exact.to(torch.bfloat16)).sum() <= 1
        lost = (exact.to(torch.bfloat16).double() - exact).norm()
        row = next(row for row in result.rounding if row.name == f"{path}.weight")
        assert row.loss == pytest.approx((lost / delta.norm()).item(), rel=1e-3)
        noise, change = noise + lost**2, change + delta.norm() ** 2
    assert result.overall_rounding == pytest.approx(math.sqrt(noise / change), rel=1e-3)
    assert result.dtype == "bfloat16"
    assert {tensor.dtype for tensor in M.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_bases_own_dtype_is_kept(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", torch.bfloat16, tokenizer=False)
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    assert merge_to_folder(base, adapter, tmp_path / "out").dtype == "bfloat16"
    W, M = tensors_of(base), tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in M.values()} == {torch.bfloat16}
    untouched = [name for name in W if "q_proj" not in name]
    assert all(torch.equal(W[name], M[name]) for name in untouched)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_side_of_a_tied_pair_is_untied(tmp_path, target):
    base = write_base(tiny.llama(tied=True), tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(
        base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj", target]
    )
    assert merge_to_folder(base, adapter, tmp_path / "out").untied
    merged = load_model(tmp_path / "out", "CAUSAL_LM")
    assert not merged.missing
    assert not merged.model.config.tie_word_embeddings
    truth = merged_by_hand(
        load_model(base, "CAUSAL_LM", dtype=torch.float32).model, tensors_of(adapter), 5 / 3
    )
    torch.testing.assert_close(
        outputs(merged.model.double(), "CAUSAL_LM"),
        outputs(truth, "CAUSAL_LM"),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary(tmp_path, tied):
    base = write_base(tiny.llama(tied=tied), tmp_path / "base")
    model = load_model(base, "CAUSAL_LM").model
    model.resize_token_embeddings(97, mean_resizing=False)
    adapted = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    tiny.randomise(adapted).save_pretrained(tmp_path / "adapter")
    write_tokenizer(tmp_path / "adapter", extra=("zebra",))

    result = merge_to_folder(base, tmp_path / "adapter", tmp_path / "out")

    assert result.tokenizer == str(tmp_path / "adapter")
    merged = load_model(tmp_path / "out", "CAUSAL_LM")
    assert not merged.missing
    assert merged.model.config.vocab_size == 97
    assert is_tied(merged.model) == tied
    ids = torch.tensor([[1, 94, 96, 5]])
    with torch.no_grad():
        torch.testing.assert_close(
            merged.model(input_ids=ids).logits,
            adapted.eval()(input_ids=ids).logits,
            atol=1e-5,
            rtol=1e-5,
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("zebra")["input_ids"] == [4 + len(WORDS)]


def test_the_classifier_of_the_adapter_decides_the_labels(tmp_path):
    base = write_base(tiny.bert(transformers.BertModel), tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(
        base, tmp_path / "adapter", "SEQ_CLS", target_modules=["query"], options={"num_labels": 5}
    )
    merge_to_folder(base, adapter, tmp_path / "out")
    merged = load_model(tmp_path / "out", "SEQ_CLS")
    assert not merged.missing
    saved = tensors_of(adapter)["base_model.model.classifier.weight"]
    assert torch.equal(merged.model.classifier.weight, saved)
    assert merged.model.config.num_labels == 5


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base")
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    (base / "preprocessor_config.json").write_text('{"size": 3}')
    # one that transformers itself would refuse to save: a temperature without sampling
    (base / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": false}')
    result = merge_to_folder(None, adapter, tmp_path / "out")
    assert result.base == result.tokenizer == str(base)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "generation_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_an_existing_folder_is_only_replaced_when_asked(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    out = tmp_path / "out"
    out.mkdir()
    merge_to_folder(base, adapter, out)  # an empty one is free
    (out / "mine.txt").write_text("mine")
    with pytest.raises(MergeError, match="exists"):
        merge_to_folder(base, adapter, out)
    assert (out / "mine.txt").exists()
    merge_to_folder(base, adapter, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    for source in (base, adapter, tmp_path):
        with pytest.raises(MergeError, match="which the merge reads"):
            merge_to_folder(base, adapter, source, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    merge_to_folder(base, adapter, tmp_path / "out")
    before = tensors_of(tmp_path / "out")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("lowrank.merge_files.write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        merge_to_folder(base, adapter, tmp_path / "out", overwrite=True)
    assert tiny.same_bits(before, tensors_of(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_a_dtype_too_narrow_is_refused(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(1e5)
    base = write_base(model, tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(MergeError, match=r"model\.norm\.weight.*float16"):
        merge_to_folder(base, adapter, tmp_path / "out", dtype="float16")
    with pytest.raises(MergeError, match=r"int8.*float32, bfloat16, float16"):
        merge_to_folder(base, adapter, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_not_finite_is_told(tmp_path, monkeypatch, dtype, in_place):
    """A sum too large for the dtype; a base that is not finite itself."""
    monkeypatch.setattr("lowrank.merge_blocks.adds_bfloat16", lambda: in_place)
    model = tiny.llama()
    layer = model.model.layers[1].self_attn.q_proj
    layer.weight.data[-1, -1] = torch.finfo(dtype).max
    base = write_base(model, tmp_path / "base", dtype, tokenizer=False)
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    merge_to_folder(base, adapter, tmp_path / "fits")
    tensors = tensors_of(adapter)
    for key in tensors:
        tensors[key] = torch.full_like(tensors[key], 3e18 if ".layers.1." in key else 0.0)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(
        MergeError, match=r"layers\.1\.self_attn\.q_proj\.weight \(largest value inf"
    ):
        merge_to_folder(base, adapter, tmp_path / "out")
    layer.weight.data[0] = math.nan
    broken = write_base(model, tmp_path / "broken", dtype, tokenizer=False)
    tensors = {key: torch.ones_like(tensor) for key, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")  # without a fingerprint
    with pytest.raises(MergeError, match=r"layers\.1\.self_attn\.q_proj\.weight \(the base's own"):
        merge_to_folder(broken, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_sum_below_the_bound_overflows(tmp_path, dtype):
    limits = torch.finfo(dtype)
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    part = Part("W", "W", Entry(tmp_path, "W", name, (2, 2), 0, 8), name)
    half_ulp = limits.max * limits.eps / (4 - 2 * limits.eps)  # of the largest number
    below = half_ulp / 2.1
    assert not may_overflow(part, below)
    exact = torch.tensor([limits.max + below], dtype=torch.float64)
    assert exact.to(dtype).item() == limits.max
    assert may_overflow(part, half_ulp)
    assert torch.tensor([limits.max + half_ulp], dtype=torch.float64).to(dtype).isinf()
    assert may_overflow(part._replace(dtype="F64"), 0.0)


def test_what_does_not_go_together_is_an_error(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    other = write_base(tiny.llama(layers=1), tmp_path / "other", tokenizer=False)
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(AdapterMismatchError, match=r"layers\.1\.self_attn\.q_proj"):
        merge_to_folder(other, adapter, tmp_path / "out")
    with pytest.raises(ModelFolderError, match="nowhere"):
        merge_to_folder(tmp_path / "nowhere", adapter, tmp_path / "out")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )
    with pytest.raises(MergeError, match="names no base"):
        merge_to_folder(None, adapter, tmp_path / "out")


# --- on the files, or in the model ----------------------------------------------------------------


def test_shards_stay_as_the_base_has_them(tmp_path):
    model = tiny.llama().to(torch.bfloat16)
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="15KB")
    adapter = write_adapter_for(
        base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj", "gate_proj"]
    )
    result = merge_to_folder(base, adapter, tmp_path / "out")
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    index = "model.safetensors.index.json"
    places = [json.loads((path / index).read_text()) for path in (base, tmp_path / "out")]
    assert places[0]["weight_map"] == places[1]["weight_map"]
    assert places[0]["metadata"]["total_size"] == places[1]["metadata"]["total_size"]
    W, M, a = (tensors_of(tmp_path / part) for part in ("base", "out", "adapter"))
    for name in W:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        exact, lost = W[name].double(), 0.0
        if f"{key}.lora_A.weight" in a:
            A, B = (a[f"{key}.lora_{which}.weight"].double() for which in "AB")
            exact = exact + 5 / 3 * B @ A
            lost = 2**-16 * 5 / 3 * (B.abs() @ A.abs()).max()
        excess = (M[name] - exact).abs() - (exact.bfloat16() - exact).abs()
        assert excess.max() <= lost, name
    assert result.built is None
    assert not load_model(tmp_path / "out", "CAUSAL_LM").missing


def test_rows_in_blocks(tmp_path, monkeypatch):
    """Blocks that do not divide the rows, in several workers, for every way that a weight is held."""
    monkeypatch.setattr("lowrank.merge_blocks._BLOCK", 1200)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for name, fields in (("lora", {}), ("dora", {"use_dora": True})):
        base = write_base(tiny.gpt2(), tmp_path / name / "base", tokenizer=False)
        adapter = write_adapter_for(
            base, tmp_path / name / "adapter", "CAUSAL_LM", target_modules=["c_attn", "wte", "c_proj"], **fields
        )  # fmt: skip
        result = merge_to_folder(base, adapter, tmp_path / name / "out")
        assert result.built is None
        assert result.untied
        truth = merged_by_hand(
            load_model(base, "CAUSAL_LM", dtype=torch.float32).model, tensors_of(adapter), 5 / 3
        )
        merged = load_model(tmp_path / name / "out", "CAUSAL_LM").model
        for key, exact in truth.state_dict().items():
            torch.testing.assert_close(
                merged.state_dict()[key].double(), exact, atol=1e-7, rtol=1e-7
            )


@pytest.mark.parametrize("in_place", [True, False])
def test_bfloat16_in_blocks(tmp_path, monkeypatch, in_place):
    """The nearest value in bfloat16, whichever way the sum is taken; transposed weights too."""
    monkeypatch.setattr("lowrank.merge_blocks._BLOCK", 500)
    monkeypatch.setattr("lowrank.merge_blocks._TILE", 1)
    monkeypatch.setattr("lowrank.merge_blocks.adds_bfloat16", lambda: in_place)
    base = write_base(tiny.gpt2(), tmp_path / "base", torch.bfloat16, tokenizer=False)
    adapter = write_adapter_for(
        base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["c_attn", "c_proj"]
    )
    result = merge_to_folder(base, adapter, tmp_path / "out")
    assert result.built is None
    truth = merged_by_hand(
        load_model(base, "CAUSAL_LM", dtype=torch.float32).model, tensors_of(adapter), 5 / 3
    )
    merged = load_model(tmp_path / "out", "CAUSAL_LM").model.state_dict()
    noise = change = 0.0
    before = load_model(base, "CAUSAL_LM", dtype=torch.float32).model.state_dict()
    for key, exact in truth.state_dict().items():
        found, nearest = merged[key].double(), exact.bfloat16().double()
        excess = (found - exact).abs() - (nearest - exact).abs()  # of a tie that fell the other way
        change_here = (exact - before[key].double()).abs().max()
        assert excess.max() <= 2**-16 * 2 * change_here  # |B|·|A| is less than twice |B·A| at most
        if not torch.equal(before[key].double(), exact):
            noise += (nearest - exact).square().sum().item()
            change += (exact - before[key].double()).square().sum().item()
    assert result.overall_rounding == pytest.approx((noise / change) ** 0.5, rel=0.02)


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=93,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    return tiny._built(transformers.MixtralForCausalLM, config, torch.float32, 0)


def test_what_is_stored_in_another_form_is_copied_where_the_adapter_leaves_it(tmp_path):
    base = write_base(mixtral(), tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    result = merge_to_folder(base, adapter, tmp_path / "out")
    assert result.built is None
    W, M = tensors_of(base), tensors_of(tmp_path / "out")
    assert W.keys() == M.keys()
    assert any("experts.2.w1" in name for name in W)  # one tensor each on disk, fused in the model
    assert all(torch.equal(W[name], M[name]) for name in W if "q_proj" not in name)
    a = tensors_of(adapter)
    for name in (name for name in W if "q_proj" in name):
        A, B = (a[f"base_model.model.{name[:-7]}.lora_{x}.weight"].double() for x in "AB")
        torch.testing.assert_close(M[name].double(), W[name].double() + 5 / 3 * B @ A)
    assert not load_model(tmp_path / "out", "CAUSAL_LM").missing


def test_a_pickled_base_is_loaded_and_the_log_says_so(tmp_path, caplog):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    streamed = merge_to_folder(base, adapter, tmp_path / "streamed")
    weights = base / "model.safetensors"
    torch.save(tensors_of(base), base / "pytorch_model.bin")
    weights.unlink()
    loaded = merge_to_folder(base, adapter, tmp_path / "loaded")
    assert (streamed.built, loaded.built) == (None, "the base has no safetensors files")
    assert "loading the whole model to merge, since the base has no safetensors" in caplog.text
    for name, M in tensors_of(tmp_path / "streamed").items():
        torch.testing.assert_close(M, tensors_of(tmp_path / "loaded")[name], atol=1e-6, rtol=1e-6)
    assert loaded.overall_rounding == pytest.approx(streamed.overall_rounding, rel=1e-3)


def test_another_base_is_refused_by_its_fingerprint(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    other = write_base(tiny.llama(seed=5), tmp_path / "other", tokenizer=False)
    for name, build in (("gpt2", tiny.gpt2), ("gpt2 other", lambda: tiny.gpt2(seed=5))):
        write_base(build(), tmp_path / name, tokenizer=False)
    for right, wrong, targets in (
        (base, other, ["q_proj", "embed_tokens"]),
        (tmp_path / "gpt2", tmp_path / "gpt2 other", ["c_attn"]),
    ):
        adapter = write_adapter_for(
            right, tmp_path / f"adapter {right.name}", "CAUSAL_LM", target_modules=targets
        )
        merge_to_folder(right, adapter, tmp_path / "out", overwrite=True)
        with pytest.raises(BaseMismatchError, match="was trained on another base"):
            merge_to_folder(wrong, adapter, tmp_path / "nothing")


def test_tensors_that_the_base_keeps_wider_stay_so(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", torch.bfloat16, tokenizer=False)
    tensors = tensors_of(base)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-4
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].float() + 1e-4  # fmt: skip
    rewrite(base, tensors)
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    merge_to_folder(base, adapter, tmp_path / "out", dtype="float16")
    M = tensors_of(tmp_path / "out")
    wide = {name for name, tensor in M.items() if tensor.dtype == torch.float32}
    assert wide == {"model.norm.weight", "model.layers.0.self_attn.q_proj.weight"}
    assert torch.equal(M["model.norm.weight"], tensors["model.norm.weight"])


# --- rounding for the outputs ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rounded_for_inputs(tmp_path, name):
    """Against the layers' inputs, collected here by hooks on base + adapter in float64; and verify accepts it."""
    build, task, targets = MODELS[name]
    base = write_base(build(), tmp_path / "base", torch.bfloat16, tokenizer=False)
    adapter = write_adapter_for(base, tmp_path / "adapter", task, target_modules=targets, scale=0.1)
    examples = [{"input_ids": torch.randint(1, 93, (40,)), "labels": [0]} for _ in range(6)]
    covariances = input_covariances(base, adapter, examples)
    near = merge_to_folder(base, adapter, tmp_path / "near")
    result = merge_to_folder(base, adapter, tmp_path / "out", covariances=covariances)
    assert (near.rounding_for, result.rounding_for) == ("entries", "inputs")

    truth = merged_by_hand(
        load_model(base, task, dtype=torch.float32).model, tensors_of(adapter), 5 / 3
    )
    seen: dict[str, list] = {path: [] for path in covariances}
    for path in covariances:
        truth.get_submodule(path).register_forward_pre_hook(
            lambda m, inputs, path=path: seen[path].append(inputs[0].flatten(0, -2))
        )
    with torch.no_grad():
        for example in examples:
            truth(input_ids=example["input_ids"][None])
    W, N, M = (
        load_model(tmp_path / part, task).model.state_dict() for part in ("base", "near", "out")
    )
    rows = {row.name: row for row in result.rounding}
    assert rows.keys() == {f"{path}.weight" for path in covariances}
    total = {"near": 0.0, "out": 0.0}
    for path, C in covariances.items():
        X = torch.cat(seen[path])
        torch.testing.assert_close(C.double(), X.T @ X / len(X), rtol=0.1, atol=0.05)
        key = f"{path}.weight"
        exact = truth.state_dict()[key]
        errors = {"near": N[key].double() - exact, "out": M[key].double() - exact}
        held = (lambda E: E.T) if name == "gpt2" else (lambda E: E)
        change = (held(exact - W[key].double()) @ X.T).norm()
        for which, E in errors.items():
            total[which] += (held(E) @ X.T).norm().item() ** 2
        assert rows[key].outputs == pytest.approx(
            ((held(errors["out"]) @ X.T).norm() / change).item(), rel=0.15
        )
        assert rows[key].loss == pytest.approx(
            (errors["out"].norm() / (exact - W[key].double()).norm()).item(), rel=1e-2
        )
        ulp = torch.finfo(torch.bfloat16).eps * exact.abs()
        assert (errors["out"].abs() <= ulp + 1e-9).all()
    assert total["out"] < {"llama": 0.9, "gpt2": 0.5}[name] * total["near"]  # squares


def test_verify_knows_that_a_merge_was_rounded_for_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank.verify._start_probe", InProcess)
    base = write_base(tiny.llama(), tmp_path / "base", torch.bfloat16)
    adapter = write_adapter_for(
        base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"], scale=4e-3
    )
    examples = [{"input_ids": torch.arange(1, 60)}]
    covariances = input_covariances(base, adapter, examples)
    merge_to_folder(base, adapter, tmp_path / "out", covariances=covariances)
    assert verify(base, adapter, tmp_path / "out").passed
    tensors = tensors_of(tmp_path / "out")
    rewrite(tmp_path / "out", tensors)  # the same tensors, without the mark
    assert not verify(base, adapter, tmp_path / "out").passed
    small = write_adapter_for(
        base, tmp_path / "small", "CAUSAL_LM", target_modules=["q_proj"], scale=1e-3
    )
    merge_to_folder(base, small, tmp_path / "lost", covariances=covariances)
    marked = {"format": "pt", "lowrank.rounding": "inputs"}
    save_file(tensors_of(base), tmp_path / "lost" / "model.safetensors", metadata=marked)
    assert not verify(base, small, tmp_path / "lost").passed  # the base's own values are neighbours


def test_covariances_of_something_else_are_refused(tmp_path):
    base = write_base(tiny.llama(), tmp_path / "base", tokenizer=False)
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(MergeError, match="no adapted layer: lm_head"):
        merge_to_folder(base, adapter, tmp_path / "out", covariances={"lm_head": torch.eye(24)})
    with pytest.raises(MergeError, match="no examples"):
        input_covariances(base, adapter, [])


@pytest.mark.parametrize("broken", ["lacks", "cut", "tokenizer"])
def test_a_broken_base_is_told_and_nothing_written(tmp_path, broken):
    base = write_base(tiny.llama(), tmp_path / "base")
    adapter = write_adapter_for(base, tmp_path / "a", "CAUSAL_LM", target_modules=["q_proj"])
    file = base / "model.safetensors"
    if broken == "lacks":
        tensors = tensors_of(base)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        rewrite(base, tensors)
        message = "lacks a tensor of its model, which would be random: model.layers.1.mlp.up_proj"
    elif broken == "cut":
        file.write_bytes(file.read_bytes()[:-9])
        message = "cut off"
    else:
        (base / "tokenizer.json").write_text('{"a": 1}')
        message = "has a tokenizer that transformers cannot read"
    with pytest.raises(LowrankError, match=message):
        merge_to_folder(base, adapter, tmp_path / "merged")
    if broken != "tokenizer":
        with pytest.raises(LowrankError, match=message):
            load_base(base, "CAUSAL_LM", {})
    assert not (tmp_path / "merged").exists()
