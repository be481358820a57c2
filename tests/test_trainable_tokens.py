"""`trainable_token_indices`: single rows of embeddings and of what is tied to them."""

import copy
import json
import re

import pytest
import torch
from models import Net
from tiny import IDS, bert, bits, llama, logits, randomise, same_bits, t5
from torch import nn

import lowrank
from lowrank.cli import main
from lowrank.errors import (
    AdapterMismatchError,
    AdapterNameError,
    ConfigError,
    MergeError,
    TargetError,
)
from lowrank.expected import changes
from lowrank.trainable_tokens import TrainableTokensWrapper
from lowrank.wrappers import wrappers

TOKENS = [9, 4, 71]  # all three are in IDS, and not in order


def adapted(base, tokens=TOKENS, seed=1, **fields):
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **fields}
    config = lowrank.LoraConfig(trainable_token_indices=tokens, **fields)
    return randomise(lowrank.get_peft_model(base, config), seed)


def delta(model, path="model.embed_tokens", name="default"):
    wrapper = model.get_base_model().get_submodule(path)
    return wrapper.token_adapter.trainable_tokens_delta[name]


def by_hand(model, base, put, tokens=TOKENS, name="default"):
    """The logits of `base`, whose weights `put` were given the adapter's rows; its LoRA is merged."""
    base = copy.deepcopy(base)
    base.config.tie_word_embeddings = False
    rows = delta(model, put[0], name).detach()
    for path in put:
        module = base.get_submodule(path)
        weight = module.weight.detach().clone()
        weight[tokens] = rows.to(weight.dtype)
        module.weight = nn.Parameter(weight)
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, lowrank.LoraLayer):
            lora = layer.lora(name)
            weight = base.get_submodule(path).weight
            weight.data = weight.data + lora.scaling * (lora.B @ lora.A).detach()
    return logits(base)


MODELS = {
    "llama": (llama, ["model.embed_tokens"], {}),
    "llama, tied": (lambda: llama(tied=True), ["model.embed_tokens", "lm_head"], {}),
    "llama, only the head": (
        lambda: llama(tied=True),
        ["lm_head"],
        {"tokens": {"lm_head": TOKENS}},
    ),
    "bert, tied, a head with a bias": (
        bert,
        ["bert.embeddings.word_embeddings", "cls.predictions.decoder"],
        {"target_modules": ["query"]},
    ),
    "t5, tied three times": (
        t5,
        ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
        {"target_modules": ["q"]},
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_forward_disable_merge_and_unmerge(case):
    build, put, fields = MODELS[case]
    base = build()
    if case.startswith("t5"):  # whichever of them this version of transformers ties
        weight = base.shared.weight
        put = [path for path in put if base.get_submodule(path).weight is weight]
    before, start = logits(base), bits(base)
    model = adapted(build(), **fields)
    expected = by_hand(model, base, put)
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(logits(model), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before)
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected)
    assert same_bits(bits(copy.deepcopy(model).unload()), start)

    tied = len(put) > 1
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert not list(wrappers(merged))
    pair = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert (pair[0] is pair[1]) == tied
    assert merged.config.tie_word_embeddings == tied


def test_rows_start_as_they_are_and_only_they_are_trained():
    base = llama(tied=True)
    model = lowrank.get_peft_model(
        llama(tied=True),
        lowrank.LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS),
    )
    torch.testing.assert_close(logits(model), logits(base))
    assert torch.equal(delta(model), base.model.embed_tokens.weight[TOKENS])
    randomise(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert [n for n in trained if "lora" not in n] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    ]
    # against a model whose whole weight is trained
    whole = copy.deepcopy(model).merge_and_unload()
    weight = whole.model.embed_tokens.weight.requires_grad_(True)
    whole(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(delta(model).grad, weight.grad[TOKENS])


def test_nothing_is_learnt_of_the_paddings_row():
    def net():
        torch.manual_seed(0)
        module = Net().double()
        module.embed = nn.Embedding(11, 7, padding_idx=4).double()
        return module

    model = adapted(net(), {"embed": [4, 2]})
    model(torch.tensor([[4, 2, 1]])).sum().backward()
    grad = delta(model, "embed").grad
    assert not grad[0].any()
    assert grad[1].any()


def test_several_adapters():
    base = llama(tied=True)
    model = adapted(llama(tied=True), seed=1)
    lora = {"r": 2, "target_modules": ["q_proj"], "lora_alpha": 7}
    model.add_adapter("b", lowrank.LoraConfig(trainable_token_indices=[7, 12], **lora))
    model.add_adapter("c", lowrank.LoraConfig(trainable_token_indices=[4], **lora))
    model.add_adapter("plain", lowrank.LoraConfig(**lora))
    for name in ("b", "c", "plain"):
        model.set_adapter(name)
        randomise(model, seed=len(name))
    put = ["model.embed_tokens", "lm_head"]
    alone = {}
    for name, tokens in (("default", TOKENS), ("b", [7, 12]), ("c", [4])):
        model.set_adapter(name)
        alone[name] = logits(model)
        torch.testing.assert_close(alone[name], by_hand(model, base, put, tokens, name))

    # rows of both, as long as none is in both
    model.set_adapter(["default", "b"])
    together = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), together)
    model.unmerge_adapter()
    rows = model.get_base_model().model.embed_tokens.weight
    torch.testing.assert_close(rows[[9, 4, 71]], delta(model))
    torch.testing.assert_close(rows[[7, 12]], delta(model, name="b"))
    with pytest.raises(AdapterNameError, match="row for token 4"):
        model.set_adapter(["default", "c"])
    assert model.active_adapters == ["default", "b"]
    torch.testing.assert_close(logits(model), together)
    with pytest.raises(MergeError, match="row for token 4"):
        model.merge_adapter(["default", "c"])
    torch.testing.assert_close(logits(model), together)

    # one batch, any order of rows
    model.set_adapter("plain")
    alone |= {"plain": logits(model), "__base__": logits(base)}
    for names in (["default", "b", "__base__"], ["__base__", "c", "default"], ["b", "plain", "b"]):
        with torch.no_grad():
            mixed = model(input_ids=IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row])
    torch.testing.assert_close(logits(model), alone["plain"])
    with pytest.raises(IndexError), lowrank.rows(model, ["b", "c", "b"]):
        model(IDS + 50)  # beyond the vocabulary
    torch.testing.assert_close(logits(model), alone["plain"])

    model.delete_adapter("b")
    model.delete_adapter("default")
    model.set_adapter("c")
    torch.testing.assert_close(logits(model), alone["c"])


def test_save_and_load_into_a_vocabulary_resized_at_random(tmp_path):
    """Rows are replaced, not shifted: what the new process made up for the new tokens does not matter."""

    def resized(seed):
        model = llama(tied=True)
        torch.manual_seed(seed)
        model.resize_token_embeddings(97, mean_resizing=False)
        return model

    model = adapted(resized(1), [94, 3])
    model.get_base_model().name_or_path = ""
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    file = lowrank.read_adapter(tmp_path)
    prefix = "base_model.model.model.embed_tokens.token_adapter"
    assert [k for k in file.tensors if "lora" not in k] == [f"{prefix}.trainable_tokens_delta"]
    assert file.config.trainable_token_indices == [94, 3]
    ids = torch.tensor([[1, 94, 3, 5]])
    other = lowrank.PeftModel.from_pretrained(resized(2), tmp_path, is_trainable=True)
    with torch.no_grad():
        expected, found = model(ids).logits, other(ids).logits
    known = [i for i in range(97) if i not in (93, 95, 96)]
    torch.testing.assert_close(found[..., known], expected[..., known])
    assert delta(other).requires_grad
    with pytest.raises(TargetError, match=r"\[94\] are not among its rows, 0 to 92.*resize"):
        lowrank.PeftModel.from_pretrained(llama(tied=True), tmp_path)
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    assert f"{prefix}.base_layer.weight" in lowrank.read_adapter(tmp_path / "whole").tensors
    other = lowrank.PeftModel.from_pretrained(resized(2), tmp_path / "whole")
    torch.testing.assert_close(logits(other), logits(model))
    with pytest.raises(TypeError):
        model.get_base_model().resize_token_embeddings(101)


def test_loading_over_other_rows_is_an_error(tmp_path):
    adapted(llama()).save_pretrained(tmp_path)
    for tokens in ([1, 2], [9, 4, 3]):  # also of as many rows, which would stand for other tokens
        model = adapted(llama(), tokens)
        before = logits(model)
        with pytest.raises(AdapterMismatchError, match=r"trainable_token_indices=\[9, 4, 71\]"):
            model.load_adapter(tmp_path, "default")
        torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_float32_on_a_bfloat16_base(tied):
    model = adapted(llama(tied=tied, dtype=torch.bfloat16))
    assert delta(model).dtype == torch.float32
    y = logits(model)
    assert y.dtype == torch.bfloat16
    merged = logits(model.merge_and_unload())
    torch.testing.assert_close(y, merged, atol=0.1, rtol=0.05)


def test_a_scaled_embedding_and_one_with_a_forward_of_its_own():
    class Doubled(nn.Embedding):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    net = Net().double()
    net.embed = Doubled(11, 7).double()
    ids = torch.tensor([[1, 4, 9], [2, 2, 7]])
    model = adapted(net, {"embed": [9, 2]})
    expected = copy.deepcopy(model).merge_and_unload()(ids)
    torch.testing.assert_close(model(ids), expected)
    with lowrank.rows(model, ["default", "__base__"]):
        torch.testing.assert_close(model(ids)[0], expected[0])

    import transformers

    config = transformers.Gemma3TextConfig(
        vocab_size=93,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    gemma = transformers.Gemma3ForCausalLM(config).double().eval()
    before = copy.deepcopy(gemma)
    model = adapted(gemma)
    expected = by_hand(model, before, ["model.embed_tokens", "lm_head"])
    torch.testing.assert_close(logits(model), expected)


def test_whoever_takes_the_weight_gets_the_rows():
    model = adapted(llama())
    wrapper = model.get_base_model().model.embed_tokens
    assert isinstance(wrapper, TrainableTokensWrapper)
    assert torch.equal(wrapper.weight[TOKENS], delta(model))
    with model.disable_adapter():
        assert wrapper.weight is wrapper.original_module.weight
    assert wrapper.embedding_dim == 24


@pytest.mark.parametrize(
    "tokens", [TOKENS, {"lm_head": TOKENS}, {"embed_tokens": [9, 4], "lm_head": [4, 71, 3]}]
)
def test_the_files_alone_say_what_a_merge_gives(tokens, tmp_path):
    """What `merge` and `verify` hold a merged model against."""
    base = llama(tied=True)
    model = adapted(llama(tied=True), tokens)
    model.save_pretrained(tmp_path)
    file = lowrank.read_adapter(tmp_path)
    expected = dict(base.state_dict())
    for change in changes(base.state_dict(), file.tensors, file.config):
        assert torch.equal(change.before, base.state_dict()[change.name])
        expected[change.name] = change.after
    merged = model.merge_and_unload().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, msg=name)


def test_plan_prints_them(capsys):
    flags = ["--target_modules", "q_proj", "v_proj", "--lora.trainable_token_indices", "[5, 9]"]
    assert main(["plan", "embedded", *flags]) == 0
    out = capsys.readouterr().out
    assert re.search(r"embed_tokens +2 rows +\d+\n lm_head +tied to it", out)
    assert main(["plan", "embedded", *flags, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["trainable_tokens"]
    assert [(row["path"], row["rows"], row["tied"]) for row in rows] == [
        ("model.embed_tokens", 2, ["lm_head"])
    ]


def problems(base, tokens, **fields):
    fields = {"target_modules": ["q_proj"], **fields}
    with pytest.raises((TargetError, ConfigError)) as error:
        lowrank.plan(base, lowrank.LoraConfig(trainable_token_indices=tokens, **fields))
    return str(error.value)


def test_refusals():
    assert "[93, -1] are not among its rows, 0 to 92" in problems(llama(), [3, 93, -1])
    assert "has [3] twice" in problems(llama(), [3, 3, 4])
    assert "is empty" in problems(llama(), [])
    assert "must be a list of token ids" in problems(llama(), {"lm_head": ["a"]})
    assert "Did you mean 'embed_tokens'?" in problems(llama(), {"embed_token": [1], "x": [1]})
    assert "gives a dictionary" in problems(Net(), [1]).replace("give a", "gives a")
    both = problems(llama(), [1], modules_to_save=["embed_tokens"])
    assert "embed_tokens: it is in modules_to_save too" in both
    both = problems(llama(), [1], target_modules=["q_proj", "embed_tokens"])
    assert "embed_tokens: it is in target_modules too" in both
    tied = problems(llama(tied=True), [1], target_modules=["q_proj", "lm_head"])
    assert "lm_head, tied to model.embed_tokens: it is in target_modules too" in tied
    assert "no weight with a row for each token" in problems(llama(), {"model.norm": [1]})
    model = adapted(llama()).get_base_model()
    assert "another adapter trains some of its rows" in problems(
        model, None, target_modules=["embed_tokens"]
    )
    assert "already has an adapter" in problems(model, None, modules_to_save=["embed_tokens"])
    lora = lowrank.get_peft_model(llama(), lowrank.LoraConfig(target_modules=["embed_tokens"]))
    assert "another adapter adapts it" in problems(lora.get_base_model(), [1])
    apart = {"embed_tokens": [1], "lm_head": [2]}
    model = adapted(llama(tied=True)).get_base_model()
    assert "in one adapter and not in another" in problems(model, apart)


def test_a_tied_pair_with_indices_of_its_own_comes_apart():
    base = llama(tied=True)
    model = adapted(llama(tied=True), {"embed_tokens": [9, 4], "lm_head": [4, 71, 3]})
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    weights = merged.model.embed_tokens.weight, merged.lm_head.weight
    original = base.lm_head.weight
    changed = [(w != original).any(1).nonzero().flatten().tolist() for w in weights]
    assert changed == [[4, 9], [3, 4, 71]]
    assert not merged.config.tie_word_embeddings


def test_it_names_all_that_are_active_as_a_layer_does():
    """transformers asks the first module for the model's active adapters, and saves what that answers."""
    model = lowrank.get_peft_model(
        llama(), lowrank.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5])
    )
    model.add_adapter("other", lowrank.LoraConfig(target_modules=["q_proj"]))
    wrapper = model.get_submodule("base_model.model.model.embed_tokens")
    for names in ("other", ["default", "other"], "default"):
        model.set_adapter(names)
        assert wrapper.active_adapter == names
