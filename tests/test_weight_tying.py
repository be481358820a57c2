"""`ensure_weight_tying`: what an adapter trains of tied embeddings stays one tensor."""

import copy
import dataclasses

import pytest
import torch
from folders import InProcess, write_adapter_for, write_base
from safetensors.torch import save_file
from tiny import IDS, bert, bits, llama, logits, randomise, same_bits, t5
from torch import nn

import lowrank
from lowrank.errors import AdapterMismatchError, HotswapError, TargetError
from lowrank.expected import changes
from lowrank.merge import merge_to_folder
from lowrank.model_folder import load_model
from lowrank.verify import verify

NAMES = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]


def adapted(base, names=("embed_tokens",), target="q_proj", **fields):
    config = lowrank.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=[target],
        **({"modules_to_save": list(names)} if names else {}),
        ensure_weight_tying=True,
        **fields,
    )
    return randomise(lowrank.get_peft_model(base, config))


@pytest.mark.parametrize("names", NAMES)
def test_saved_copies_share_one_weight(names, tmp_path):
    base = llama(tied=True)
    start, before = bits(base), logits(base)
    model = adapted(base, names)
    inside = model.get_base_model()
    pair = [m.modules_to_save["default"] for m in (inside.model.embed_tokens, inside.lm_head)]
    assert pair[0].weight is pair[1].weight
    assert type(pair[1]) is nn.Linear
    assert (pair[1].in_features, pair[1].out_features) == (24, 93)
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == 93 * 24 + 2 * 3 * (24 + 24)
    # the gradient is that of a tied model whose weight is trained
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain = llama(tied=True)
    for path, layer in inside.named_modules():
        if isinstance(layer, lowrank.LoraLayer):
            lora = layer.lora("default")
            weight = plain.get_submodule(path).weight
            weight.data = weight.data + lora.scaling * (lora.B @ lora.A).detach()
    plain.model.embed_tokens.weight.data = pair[0].weight.detach().clone()
    torch.testing.assert_close(logits(model), logits(plain))
    plain(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(pair[0].weight.grad, plain.model.embed_tokens.weight.grad)

    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before)
    model.save_pretrained(tmp_path)
    loaded = lowrank.PeftModel.from_pretrained(llama(tied=True), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(plain))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert same_bits(bits(model.unload()), start)


def test_a_head_keeps_its_own_bias():
    model = adapted(bert(), ["word_embeddings"], "query")
    head = model.get_base_model().cls.predictions.decoder.modules_to_save["default"]
    assert head.bias is not None
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert merged.config.tie_word_embeddings


def test_two_adapters_have_a_weight_each():
    model = adapted(llama(tied=True))
    first = logits(model)
    config = lowrank.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True
    )
    model.add_adapter("b", config)
    model.set_adapter("b")
    randomise(model, seed=5)
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first)
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["b", "default", "b"]).logits
    torch.testing.assert_close(mixed, torch.stack([second[0], first[1], second[2]]))


def test_rows_follow_with_and_without_it():
    model = adapted(llama(tied=True), (), trainable_token_indices=[4, 9])
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_where_it_cannot_be_honoured_it_is_an_error():
    def refused(base, names=(), **fields):
        with pytest.raises(TargetError) as error:
            adapted(base, names, **fields)
        return str(error.value)

    tied = llama(tied=True)
    assert "nothing in this LlamaForCausalLM is tied" in refused(llama(), ["embed_tokens"])
    assert "trains nothing of model.embed_tokens" in refused(tied)
    assert "its rank and alpha are not those of model.embed_tokens" in refused(
        tied, target="embed_tokens", rank_pattern={"lm_head": 4}
    )
    apart = {"embed_tokens": [1], "lm_head": [2]}
    assert "other indices for lm_head" in refused(tied, trainable_token_indices=apart)
    alone = refused(tied, trainable_token_indices={"lm_head": [2]})
    assert "trains nothing of model.embed_tokens, which lm_head is tied to" in alone
    assert "trains nothing of shared" in refused(t5(), target="q")


@pytest.mark.parametrize("names", NAMES)
def test_one_adapter_serves_both_of_a_tied_pair(names, tmp_path):
    base = llama(tied=True)
    start, before = bits(base), logits(base)
    config = lowrank.LoraConfig(r=3, lora_alpha=5, target_modules=names, ensure_weight_tying=True)
    model = randomise(lowrank.get_peft_model(base, config))
    embedding = model.get_base_model().model.embed_tokens
    A, B = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
    assert model.get_nb_trainable_parameters()[0] == 3 * (93 + 24)
    assert sum(p.requires_grad for p in model.parameters()) == 2
    # as a tied model whose one weight is W + s·(B·A)ᵀ, with gradients from both of its uses
    plain = llama(tied=True)
    leaves = [t.detach().clone().requires_grad_() for t in (A, B)]
    W = start["model.embed_tokens.weight"] + 5 / 3 * (leaves[1] @ leaves[0]).T
    weights = {"model.embed_tokens.weight": W, "lm_head.weight": W}
    run = {"input_ids": IDS, "labels": IDS}
    truth = torch.func.functional_call(plain, weights, (), run)
    found = model(**run)
    torch.testing.assert_close(found.logits, truth.logits)
    assert (truth.logits - before).abs().max() > 0.1
    found.loss.backward()
    truth.loss.backward()
    torch.testing.assert_close(A.grad, leaves[0].grad)
    torch.testing.assert_close(B.grad, leaves[1].grad)

    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    tensors = lowrank.read_adapter(tmp_path).tensors
    head = "base_model.model.lm_head.lora_{}.weight"
    assert torch.equal(tensors[head.format("A")], B.T)
    assert torch.equal(tensors[head.format("B")], A.T)
    for low in (False, True):
        loaded = lowrank.PeftModel.from_pretrained(
            llama(tied=True), tmp_path, low_cpu_mem_usage=low
        )
        torch.testing.assert_close(logits(loaded), truth.logits.detach())
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded), truth.logits.detach())
    pair = loaded.get_base_model().lm_head, loaded.get_base_model().model.embed_tokens
    assert pair[0].base_layer.weight is pair[1].base_layer.weight
    loaded.unmerge_adapter()
    assert pair[0].base_layer.weight is pair[1].base_layer.weight
    assert torch.equal(pair[0].base_layer.weight, start["lm_head.weight"])
    merged = loaded.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(logits(again), truth.logits.detach())
    assert same_bits(bits(model.unload()), start)


def tied_base(name):
    if name == "t5":
        return t5(), "shared", {"decoder_input_ids": IDS[:, :3]}
    if name == "bert":
        return bert(), "bert.embeddings.word_embeddings", {}
    return llama(tied=True), "model.embed_tokens", {}


@pytest.mark.parametrize(
    ("base", "target", "fields"),
    [
        ("llama", "lm_head", {"use_dora": True}),
        ("llama", "embed_tokens", {"init_lora_weights": "olora"}),
        ("bert", "word_embeddings", {"use_dora": True, "init_lora_weights": "pissa"}),
        ("t5", "embed_tokens", {}),
        ("t5", "shared", {"use_dora": True, "init_lora_weights": "pissa", "use_rslora": True}),
    ],
)
def test_every_method_is_one_adapter_at_all_ends(base, target, fields, tmp_path):
    """W′, written again from the file: one tensor, which all modules that share W run with."""
    plain, path, more = tied_base(base)
    run = {"input_ids": IDS, **more}
    start, before = bits(plain), plain(**run).logits.detach()
    tied = [n for n, p in plain.named_parameters(remove_duplicate=False) if p.shape == (93, 24)]
    W = start[f"{path}.weight"]
    config = lowrank.LoraConfig(
        r=3, lora_alpha=5, target_modules=[target], ensure_weight_tying=True, **fields
    )
    model = lowrank.get_peft_model(copy.deepcopy(plain), config)
    torch.testing.assert_close(model(**run).logits, before)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            generator = torch.Generator().manual_seed(parameter.numel())
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise
    model.save_pretrained(tmp_path / "adapter")
    file = lowrank.read_adapter(tmp_path / "adapter")
    key = f"base_model.model.{path}.lora_"
    found = [file.tensors[key + "embedding_A"], file.tensors[key + "embedding_B"]]
    found += [file.tensors[key + "magnitude_vector"]] if "use_dora" in fields else []
    A, B, *m = (t.clone().requires_grad_() for t in found)
    delta = B @ A
    if "init_lora_weights" in fields:
        delta = delta - file.start[key + "embedding_B"] @ file.start[key + "embedding_A"]
    V = W + 5 / (3**0.5 if "use_rslora" in fields else 3) * delta.T
    merged_W = V * m[0] / V.norm(dim=0).detach() if m else V

    weights = dict.fromkeys(tied, merged_W)
    truth = torch.func.functional_call(plain, weights, (), run).logits
    assert (truth - before).abs().max() > 0.1
    found = model(**run).logits
    torch.testing.assert_close(found, truth)
    probe = torch.randn(truth.shape, generator=torch.Generator().manual_seed(3)).double()
    (found * probe).sum().backward()
    (truth * probe).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len([A, B, *m])
    for ours, leaf in zip(trained, [A, B, *m], strict=True):
        torch.testing.assert_close(ours.grad, leaf.grad)
    with torch.no_grad():
        names = ["default", "__base__", "default"]
        mixed = model(**run, adapter_names=names).logits
    torch.testing.assert_close(mixed[[0, 2]], truth.detach()[[0, 2]])
    torch.testing.assert_close(mixed[1], before[1])
    with model.disable_adapter():
        torch.testing.assert_close(model(**run).logits, before)

    loaded = lowrank.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(loaded(**run).logits, truth)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(**run).logits, truth)
    loaded.unmerge_adapter()
    merged = loaded.merge_and_unload()
    assert len({id(merged.get_parameter(name)) for name in tied}) == 1
    torch.testing.assert_close(merged.get_parameter(tied[0]), nn.Parameter(merged_W.detach()))
    assert merged.config.tie_word_embeddings
    for change in changes(plain.state_dict(), file.tensors, file.config, start=file.start or None):
        torch.testing.assert_close(change.after, merged_W.detach())
    if "init_lora_weights" in fields:
        model.save_pretrained(tmp_path / "as_plain", as_plain_lora=True)
        again = lowrank.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "as_plain")
        torch.testing.assert_close(again(**run).logits, truth)
        assert again.peft_config["default"].init_lora_weights != fields["init_lora_weights"]
    assert same_bits(bits(model.unload()), start)


def test_dora_on_both_of_a_tied_pair_knows_whose_rows_it_normalises():
    """Without ensure_weight_tying: an adapter for each, of one tensor's columns and of its rows."""
    names = ["embed_tokens", "lm_head"]
    config = lowrank.LoraConfig(r=3, target_modules=names, use_dora=True, inference_mode=True)
    model = randomise(lowrank.get_peft_model(llama(tied=True), config))
    found = logits(model)
    torch.testing.assert_close(found, logits(model))
    torch.testing.assert_close(found, logits(model.merge_and_unload()))


def test_a_tied_adapter_takes_the_place_of_another(tmp_path):
    config = lowrank.LoraConfig(
        r=3, target_modules=["lm_head"], ensure_weight_tying=True, use_dora=True
    )
    first, second = (
        randomise(lowrank.get_peft_model(llama(tied=True), config), seed=s) for s in (1, 2)
    )
    second.save_pretrained(tmp_path)
    lowrank.hotswap_adapter(first, tmp_path, "default")
    torch.testing.assert_close(logits(first), logits(second))
    adapter = lowrank.read_adapter(tmp_path)
    adapter.tensors["base_model.model.lm_head.lora_magnitude_vector"] += 1
    lowrank.write_adapter(tmp_path, adapter)
    with pytest.raises(HotswapError, match=r"different values for .*lm_head"):
        lowrank.hotswap_adapter(first, tmp_path, "default")


def test_a_tied_adapter_beside_one_that_is_not():
    model = lowrank.get_peft_model(
        llama(tied=True),
        lowrank.LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True),
    )
    model.add_adapter("apart", lowrank.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    model.base_model.set_adapter(["default", "apart"])
    randomise(model)
    both = logits(model)
    for name in ("default", "apart"):
        model.set_adapter(name)
        alone = logits(model)
        with torch.no_grad():
            mixed = model(input_ids=IDS, adapter_names=[name, "__base__", name]).logits
        torch.testing.assert_close(mixed[[0, 2]], alone[[0, 2]])
    copied = copy.deepcopy(model)
    randomise(copied, seed=9)
    model.base_model.set_adapter(["default", "apart"])
    torch.testing.assert_close(logits(model), both)
    model.delete_adapter("apart")
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    copied.base_model.set_adapter(["default", "apart"])
    expected = logits(copied)
    merged = copied.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert not merged.config.tie_word_embeddings


def test_tied_adapters_combined_stay_tied():
    config = lowrank.LoraConfig(r=3, target_modules=["lm_head"], ensure_weight_tying=True)
    model = lowrank.get_peft_model(llama(tied=True), config, "one")
    model.add_adapter("two", dataclasses.replace(config, r=2, lora_alpha=3))
    model.base_model.set_adapter(["one", "two"])
    randomise(model)
    inside = model.get_base_model()
    pair = inside.model.embed_tokens, inside.lm_head
    wanted = 0.5 * pair[1].get_delta_weight("one") - 2 * pair[1].get_delta_weight("two")
    for method in ("linear", "svd"):
        model.add_weighted_adapter(["one", "two"], [0.5, -2], method, method, svd_rank=None)
    for layer in pair:
        torch.testing.assert_close(layer.get_delta_weight("linear"), wanted, atol=1e-6, rtol=0)
    U, S, Vh = torch.linalg.svd(wanted, full_matrices=False)
    best = U[:, :3] * S[:3] @ Vh[:3]
    for layer in pair:
        torch.testing.assert_close(layer.get_delta_weight("svd"), best, atol=1e-5, rtol=0)
    assert pair[1].leader("svd") is pair[0]


def test_a_file_whose_tied_adapters_differ_is_an_error(tmp_path):
    config = lowrank.LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True)
    randomise(lowrank.get_peft_model(llama(tied=True), config)).save_pretrained(tmp_path)
    adapter = lowrank.read_adapter(tmp_path)
    adapter.tensors["base_model.model.lm_head.lora_A.weight"] += 1
    lowrank.write_adapter(tmp_path, adapter)
    with pytest.raises(AdapterMismatchError, match="different values for lm_head"):
        lowrank.PeftModel.from_pretrained(llama(tied=True), tmp_path)


def test_a_file_with_two_values_for_one_tensor_is_an_error(tmp_path):
    adapted(llama(tied=True)).save_pretrained(tmp_path)
    tensors = lowrank.read_adapter(tmp_path).tensors
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"different values for .*ensure_weight_tying"):
        lowrank.PeftModel.from_pretrained(llama(tied=True), tmp_path)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("how", ["saved", "adapted"])
def test_files_go_both_ways(names, how, tmp_path):
    peft = pytest.importorskip("peft")
    fields = {"r": 3, "lora_alpha": 5, "ensure_weight_tying": True, "target_modules": ["q_proj"]}
    fields |= {"modules_to_save": names} if how == "saved" else {"target_modules": names}
    for writer, reader in ((lowrank, peft), (peft, lowrank)):
        config = writer.LoraConfig(**fields)
        model = randomise(writer.get_peft_model(llama(tied=True), config))
        model.save_pretrained(tmp_path / writer.__name__)
        loaded = reader.PeftModel.from_pretrained(llama(tied=True), tmp_path / writer.__name__)
        torch.testing.assert_close(logits(loaded), logits(model))
    first, second = (lowrank.read_adapter(tmp_path / n).tensors for n in ("lowrank", "peft"))
    shapes = [
        {k: t.shape for k, t in tensors.items() if ".base_layer." not in k}
        for tensors in (first, second)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("method", [{}, {"use_dora": True, "init_lora_weights": "pissa"}])
def test_merged_folders_keep_the_tie(method, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank.verify._start_probe", InProcess)
    base = write_base(llama(tied=True), tmp_path / "base", torch.bfloat16, tokenizer=False)
    fields = {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}
    fields |= method
    adapter = write_adapter_for(base, tmp_path / "adapter", "CAUSAL_LM", **fields)
    merge_to_folder(base, adapter, tmp_path / "merged")
    assert verify(base, adapter, tmp_path / "merged").passed
    merged = load_model(tmp_path / "merged", "CAUSAL_LM").model
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    key = "base_model.model.model.embed_tokens.lora_"
    tensors, start = (getattr(lowrank.read_adapter(adapter), x) for x in ("tensors", "start"))
    A, B = (tensors[f"{key}embedding_{x}"].double() for x in "AB")
    W = load_model(base, "CAUSAL_LM").model.lm_head.weight
    delta = B @ A
    if method:
        delta -= start[f"{key}embedding_B"].double() @ start[f"{key}embedding_A"].double()
    exact = W.double() + 5 / 3 * delta.T
    if method:
        exact *= tensors[f"{key}magnitude_vector"].double() / exact.norm(dim=0)
    torch.testing.assert_close(merged.lm_head.weight, exact.to(torch.bfloat16), atol=0, rtol=2**-7)
    wrong = (merged.lm_head.weight != exact.to(torch.bfloat16)).double().mean()
    assert wrong <= (1e-3 if method else 0)  # a tie in float64 that float32 rounds the other way
