"""`ensure_weight_tying`: what an adapter trains of tied embeddings stays one tensor."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import IDS, bert, bits, llama, logits, randomise, same_bits, t5
from torch import nn

import lowrank
from lowrank.errors import AdapterMismatchError, TargetError

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
    assert "A and B of a tied pair" in refused(tied, target="embed_tokens")
    apart = {"embed_tokens": [1], "lm_head": [2]}
    assert "other indices for lm_head" in refused(tied, trainable_token_indices=apart)
    alone = refused(tied, trainable_token_indices={"lm_head": [2]})
    assert "trains nothing of model.embed_tokens, which lm_head is tied to" in alone
    assert "trains nothing of shared" in refused(t5(), target="q")


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
def test_files_go_both_ways(names, tmp_path):
    peft = pytest.importorskip("peft")
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "ensure_weight_tying": True}
    for writer, reader in ((lowrank, peft), (peft, lowrank)):
        config = writer.LoraConfig(modules_to_save=list(names), **fields)
        model = randomise(writer.get_peft_model(llama(tied=True), config))
        model.save_pretrained(tmp_path / writer.__name__)
        loaded = reader.PeftModel.from_pretrained(llama(tied=True), tmp_path / writer.__name__)
        torch.testing.assert_close(logits(loaded), logits(model))
    first, second = (lowrank.read_adapter(tmp_path / n).tensors for n in ("lowrank", "peft"))
    assert {k: t.shape for k, t in first.items()} == {k: t.shape for k, t in second.items()}
