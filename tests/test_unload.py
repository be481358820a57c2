"""The plain base model that is left when adapters are merged or taken out, tied embeddings above all."""

import copy
import json

import pytest
import torch
import transformers
from tiny import (
    IDS,
    bert,
    bits,
    gpt2,
    llama,
    llama_classifier,
    logits,
    merged_by_hand,
    randomise,
    same_bits,
    t5,
)

import lowrank
from lowrank import LoraConfig, LoraLayer, get_peft_model
from lowrank.errors import MergeError, TargetError
from lowrank.saved_module import ModulesToSaveWrapper

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def adapted(base, **options):
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **options}
    return randomise(get_peft_model(base, LoraConfig(**options)))


def truth_of(model, base):
    return merged_by_hand(base, lowrank.get_peft_model_state_dict(model), 5 / 3)


def reloaded(model, folder):
    """The model after plain transformers has saved it and loaded it."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float64).eval()


def tie_on_disk(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def is_plain(model):
    return not any(isinstance(m, LoraLayer | ModulesToSaveWrapper) for m in model.modules())


# --- tied embeddings ------------------------------------------------------------------------------

BERT_HEAD = "cls.predictions.decoder"
TIED = {
    "llama, lm_head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "llama, embed_tokens": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama, both": (llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "llama, lm_head, dora": (llama, {"target_modules": ["lm_head"], "use_dora": True}),
    "llama, embed_tokens saved": (llama, {"modules_to_save": ["embed_tokens"]}),
    "llama, lm_head saved": (llama, {"modules_to_save": ["lm_head"]}),
    "llama, both saved": (llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "gpt2, wte": (gpt2, {"target_modules": ["wte", "c_attn"]}),
    "gpt2, lm_head": (gpt2, {"target_modules": ["lm_head"]}),
    "gpt2, lm_head saved": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "bert, decoder": (bert, {"target_modules": [BERT_HEAD]}),
    "bert, word_embeddings": (bert, {"target_modules": ["word_embeddings"]}),
    "bert, decoder saved": (bert, {"target_modules": ["query"], "modules_to_save": [BERT_HEAD]}),
    "bert, cls saved": (bert, {"target_modules": ["query"], "modules_to_save": ["cls"]}),
    "t5, lm_head": (t5, {"target_modules": ["lm_head", "q"]}),
    "t5, lm_head saved": (t5, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
}


def tied(build):
    return build(tied=True) if build is llama else build()


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("case", TIED)
def test_one_side_of_a_tied_pair(case, merged_before, tmp_path):
    """Forward, merge, unmerge (the tie comes back), and a merged model that plain transformers reloads."""
    build, options = TIED[case]
    base = tied(build)
    shared = base.get_input_embeddings().weight
    assert base.get_output_embeddings().weight is shared
    model = adapted(base, **options)
    truth = truth_of(model, tied(build))
    expected = logits(truth)
    assert (expected - logits(tied(build))).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tied(build)), atol=0, rtol=0)
    before = bits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    model.unmerge_adapter()
    assert same_bits(bits(model), before)
    if merged_before:
        model.merge_adapter()
    merged = model.merge_and_unload()
    assert merged is base
    assert is_plain(merged)
    assert merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), expected, **CLOSE)
    again = reloaded(merged, tmp_path)
    torch.testing.assert_close(logits(again), logits(merged), atol=0, rtol=0)
    assert tie_on_disk(tmp_path) is False


@pytest.mark.parametrize("case", ["llama, lm_head", "llama, embed_tokens", "gpt2, lm_head saved"])
def test_unload_gives_the_tied_base_back(case):
    build, options = TIED[case]
    base = tied(build)
    before, weight = bits(base), base.get_input_embeddings().weight
    for merge in (False, True):
        model = adapted(base, **options)
        if merge:
            model.merge_adapter()
        plain = model.unload()
        assert plain is base
        assert is_plain(plain)
        assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight is weight
        assert plain.config.tie_word_embeddings is True
        assert same_bits(bits(plain), before)
        torch.testing.assert_close(logits(plain), logits(tied(build)), atol=0, rtol=0)


def test_a_tie_that_the_adapter_does_not_touch_stays(tmp_path):
    for build, options in [(llama, {}), (bert, {"target_modules": ["query"]})]:
        model = adapted(tied(build), **options)
        merged = model.merge_and_unload()
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        assert merged.config.tie_word_embeddings is True
        torch.testing.assert_close(
            logits(reloaded(merged, tmp_path)), logits(merged), atol=0, rtol=0
        )


@pytest.mark.parametrize("target", ["encoder.embed_tokens", "decoder.embed_tokens", "embed_tokens"])
def test_t5_embeddings(target, tmp_path):
    """Encoder and decoder have each their own, tied to `shared`; the output's tie stays as it is."""
    for options in (
        {"target_modules": [target, "q"]},
        {"target_modules": ["q"], "modules_to_save": [target]},
    ):
        model = adapted(t5(), **options)
        expected = logits(truth_of(model, t5()))
        torch.testing.assert_close(logits(model), expected, **CLOSE)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, **CLOSE)
        folder = tmp_path / next(iter(options))
        torch.testing.assert_close(logits(reloaded(merged, folder)), expected, **CLOSE)


@pytest.mark.parametrize("scaled", [True, False])
def test_t5_keeps_its_output_scale(scaled, tmp_path):
    """T5 1.1 and flan-T5 say tie_word_embeddings=False on disk, which transformers reads as: no scaling."""
    build = t5 if scaled else lambda: t5(tie_word_embeddings=False)
    model = adapted(build(), target_modules=["lm_head"])
    assert model.config.scale_decoder_outputs is scaled
    expected = logits(truth_of(model, build()))
    merged = reloaded(model.merge_and_unload(), tmp_path)
    assert merged.config.scale_decoder_outputs is scaled
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["shared"]}, {"target_modules": ["q"], "modules_to_save": ["shared"]}],
)
@pytest.mark.parametrize("build", [t5, "bart"])
def test_an_embedding_that_only_lends_its_weight_is_refused(build, options):
    """`shared` of an encoder-decoder is never called: an adapter on it would train nothing."""
    if build == "bart":
        config = transformers.BartConfig(
            vocab_size=93, d_model=24, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64,
        )  # fmt: skip
        base = transformers.BartForConditionalGeneration(config)
        if options["target_modules"] == ["q"]:
            options = {**options, "target_modules": ["q_proj"]}
    else:
        base = t5()
    with pytest.raises(TargetError, match=r"shared.*encoder\.embed_tokens.*decoder\.embed_tokens"):
        get_peft_model(base, LoraConfig(r=3, **options))


class ReadsTheTie(transformers.LlamaForCausalLM):
    """As UMT5, Switch or UDOP: another function when the configuration says that nothing is tied."""

    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        if self.config.tie_word_embeddings:
            hidden = hidden * self.config.hidden_size**-0.5
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden))


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
)  # fmt: skip
@pytest.mark.parametrize("merged_before", [False, True])
def test_an_architecture_whose_forward_reads_the_tie_is_refused(options, safe_merge, merged_before):
    base = ReadsTheTie(llama(tied=True).config).double().eval()
    model = adapted(base, **options)
    if merged_before:
        model.merge_adapter()
    before, expected = bits(model), logits(model)
    with pytest.raises(MergeError, match="forward depends on that"):
        model.merge_and_unload(safe_merge=safe_merge)
    assert same_bits(bits(model), before)
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)
    plain = model.unload()
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_where_the_forward_reads_the_tie_other_layers_can_be_merged():
    base = ReadsTheTie(llama(tied=True).config).double().eval()
    model = adapted(base)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, **CLOSE)


def test_a_switch_transformer_is_refused():
    config = transformers.SwitchTransformersConfig(
        vocab_size=93, d_model=24, d_kv=6, d_ff=40, num_layers=1, num_decoder_layers=1,
        num_heads=4, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    base = transformers.SwitchTransformersForConditionalGeneration(config)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["lm_head"]))
    with pytest.raises(MergeError, match="forward depends on that"):
        model.merge_and_unload()


# --- saved modules --------------------------------------------------------------------------------


def test_unload_gives_the_original_modules_back():
    base = llama_classifier()
    head, before = base.score, bits(base)
    plain = adapted(base, task_type="SEQ_CLS", modules_to_save=["norm"]).unload()
    assert plain.score is head
    assert same_bits(bits(plain), before)


def two_classifiers():
    model = adapted(llama_classifier(), task_type="SEQ_CLS")
    model.add_adapter(
        "other", LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj"], task_type="SEQ_CLS")
    )
    model.set_adapter("other")
    randomise(model, seed=2)
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("safe_merge", [False, True])
def test_the_saved_modules_of_the_merged_adapters_are_the_ones_that_stay(safe_merge):
    for name in ("default", "other"):
        model = two_classifiers()
        tensors = lowrank.get_peft_model_state_dict(model, adapter_name=name)
        expected = logits(merged_by_hand(llama_classifier(), tensors, 5 / 3))
        merged = model.merge_and_unload(adapter_names=[name], safe_merge=safe_merge)
        torch.testing.assert_close(logits(merged), expected, **CLOSE)


def test_two_copies_of_one_module_cannot_both_be_merged():
    model = two_classifiers()
    before = bits(model)
    with pytest.raises(MergeError, match="score"):
        model.merge_and_unload(adapter_names=["default", "other"])
    assert same_bits(bits(model), before)


# --- the plain model ------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [False, True])
def test_the_merged_model_is_plain_and_saves_under_the_bases_names(safe_merge, tmp_path):
    names = list(llama().state_dict())
    model = adapted(llama())
    expected = logits(truth_of(model, llama()))
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert is_plain(merged)
    assert list(merged.state_dict()) == names
    torch.testing.assert_close(logits(reloaded(merged, tmp_path)), expected, **CLOSE)
    twin = copy.deepcopy(merged)
    torch.testing.assert_close(logits(twin), expected, **CLOSE)
    renewed = adapted(merged)
    torch.testing.assert_close(logits(renewed), logits(truth_of(renewed, twin)), **CLOSE)


def test_unload_twice_and_after_a_merge():
    base = llama()
    before = bits(base)
    model = adapted(base)
    model.merge_adapter()
    assert model.unload() is base
    assert same_bits(bits(base), before)
    assert model.unload() is base


def test_a_merge_of_several_adapters_with_one_of_them_named():
    model = adapted(llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    tensors = lowrank.get_peft_model_state_dict(model, adapter_name="other")
    expected = logits(merged_by_hand(llama(), tensors, 8 / 2))
    merged = model.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(logits(merged), expected, **CLOSE)


def test_the_merge_computes_a_loss_as_before():
    model = adapted(t5(), target_modules=["q", "v"])
    before = model(input_ids=IDS, labels=IDS).loss
    after = model.merge_and_unload()(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(after, before, **CLOSE)
