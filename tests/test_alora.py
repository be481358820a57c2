"""Activated LoRA: the base before the invocation, the adapter from it on, against a float64 recomputation."""

import math

import pytest
import tiny
import torch

from lowrank import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from lowrank.alora import NEVER, invocation_starts
from lowrank.errors import ConfigError, MergeError, RowsError, TargetError

CALL = [7, 9]
# twice, the last counts; at the very end; not at all; right at the start
IDS = torch.tensor(
    [
        [1, 7, 9, 33, 12, 7, 9, 4],
        [2, 4, 6, 8, 10, 3, 7, 9],
        [11, 9, 7, 71, 7, 3, 5, 7],
        [7, 9, 2, 5, 8, 13, 21, 34],
    ]
)
# Llama norms in float32 whatever its dtype, so that a last bit of float64 is not the last bit of its output
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
STARTS = [5, 6, NEVER, 0]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def config(**fields):
    return LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 5,
            "target_modules": TARGETS,
            "alora_invocation_tokens": CALL,
            "task_type": "CAUSAL_LM",
            **fields,
        }
    )


def adapted(base=None, seed=1, **fields):
    model = get_peft_model(base or tiny.llama(attention_bias=True, mlp_bias=True), config(**fields))
    return tiny.randomise(model, seed).eval()


def truth(model, ids, starts, name="default", tensors=None):
    """Logits of the base whose linear layers add scaling·B·A·x (+ bias) at the positions from `starts` on."""
    tensors = tensors or get_peft_model_state_dict(model, adapter_name=name)
    c = model.peft_config[name]
    scaling = c.lora_alpha / (math.sqrt(c.r) if c.use_rslora else c.r)
    base = tiny.llama(attention_bias=True, mlp_bias=True)
    on = torch.arange(ids.shape[1])[None] >= torch.tensor(starts)[:, None]

    def add(path):
        A = tensors[f"base_model.model.{path}.lora_A.weight"]
        B = tensors[f"base_model.model.{path}.lora_B.weight"]
        bias = tensors.get(f"base_model.model.{path}.lora_B.bias", 0.0)
        return lambda module, args, out: (
            out + on[..., None] * scaling * (args[0] @ A.T @ B.T + bias)
        )

    for path, module in base.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            module.register_forward_hook(add(path))
    return base(input_ids=ids).logits


def test_the_last_occurrence_starts_the_adapter():
    assert invocation_starts(IDS, CALL).tolist() == STARTS
    assert invocation_starts(IDS[:, :1], CALL).tolist() == [NEVER] * 4
    assert invocation_starts(IDS, [5, 7]).tolist() == [NEVER, NEVER, 6, NEVER]


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_forward(fields):
    model = adapted(**fields)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        torch.testing.assert_close(found, truth(model, IDS, STARTS), **CLOSE)
        base = tiny.llama(attention_bias=True, mlp_bias=True)(input_ids=IDS).logits
        assert torch.equal(found[2], base[2])  # never called
        assert torch.equal(found[0, :5], base[0, :5])  # what comes before is the base's
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base)
        assert torch.equal(model(IDS).logits, found)  # by position
        offsets = [3, 2, None, 8]
        assert torch.equal(model(input_ids=IDS, alora_offsets=offsets).logits, found)
        embedded = model.get_input_embeddings()(IDS)
        found_embedded = model(inputs_embeds=embedded, alora_offsets=offsets).logits
        torch.testing.assert_close(found_embedded, found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing):
    model = adapted().train()
    if checkpointing:
        checkpoint(model)
    weight = torch.randn(4, 8, 93, dtype=torch.float64)
    tensors = {
        key: tensor.detach().clone().requires_grad_()
        for key, tensor in get_peft_model_state_dict(model).items()
    }
    (truth(model, IDS, STARTS, tensors=tensors) * weight).sum().backward()
    (model(input_ids=IDS).logits * weight).sum().backward()
    for key, tensor in tensors.items():
        found = model.get_parameter(key.replace(".weight", ".default.weight")).grad
        torch.testing.assert_close(found, tensor.grad, rtol=1e-4, atol=1e-5)


def checkpoint(model):
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()


def test_checkpointing_knows_one_forward_at_a_time():
    model = adapted().train()
    checkpoint(model)
    first = model(input_ids=IDS).logits
    with pytest.raises(RowsError, match="backward"):
        model(input_ids=IDS[:2])
    with torch.no_grad():  # keeps nothing for backward
        model(input_ids=IDS[:2])
    first.sum().backward()
    second = model(input_ids=IDS[:2]).logits
    del second  # its backward can never come
    last = model(input_ids=IDS[:2]).logits
    model.eval()  # nothing is checkpointed
    with pytest.raises(RowsError, match="backward"):
        model(input_ids=IDS)
    last.sum().backward()
    outputs = [model(input_ids=IDS).logits for _ in range(2)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_generate_goes_on_with_the_adapter(options):
    model = adapted()
    found = model.generate(
        input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, **options
    )
    assert found.shape == (4, 12)
    if "num_beams" in options:
        return
    ids = IDS
    for _ in range(4):  # greedy, by hand
        with torch.no_grad():
            last = truth(model, ids, STARTS)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, last], 1)
    assert torch.equal(found, ids)


def test_beams_agree_with_a_forward_over_what_they_found():
    model = adapted()
    found = model.generate(
        input_ids=IDS,
        max_new_tokens=3,
        num_beams=3,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    with torch.no_grad():
        logits = truth(model, found.sequences, STARTS).log_softmax(-1)
    picked = logits[:, 7:-1].gather(-1, found.sequences[:, 8:, None]).sum((1, 2))
    torch.testing.assert_close(picked.float(), found.sequences_scores.float(), **CLOSE)


def test_a_cache_by_hand_needs_the_offsets():
    model = adapted()
    with torch.no_grad():
        first = model(input_ids=IDS[:, :7], use_cache=True)
        with pytest.raises(RowsError, match="alora_offsets"):
            model(input_ids=IDS[:, 7:], past_key_values=first.past_key_values)
        rest = model(
            input_ids=IDS[:2, 7:],
            past_key_values=model(input_ids=IDS[:2, :7], use_cache=True).past_key_values,
            alora_offsets=[3, 2],
        ).logits
    expected = truth(model, IDS[:2], STARTS[:2])[:1, 7:]
    torch.testing.assert_close(rest[:1], expected, **CLOSE)


def test_mixed_batch():
    model = adapted()
    model.add_adapter("plain", config(alora_invocation_tokens=None, r=2))
    model.add_adapter("other", config(alora_invocation_tokens=[71], r=2))
    for name in ("plain", "other"):
        model.set_adapter(name)
        tiny.randomise(model, seed=len(name))
    model.set_adapter("default")
    names = ["plain", "default", "other", "__base__"]
    with torch.no_grad():
        found = model(input_ids=IDS, adapter_names=names).logits
        expected = [
            truth(model, IDS, [0] * 4, "plain")[0],
            truth(model, IDS, STARTS)[1],
            truth(model, IDS, [NEVER, NEVER, 3, NEVER], "other")[2],
            truth(model, IDS, [NEVER] * 4)[3],
        ]
        torch.testing.assert_close(found, torch.stack(expected), **CLOSE)
        tokens = model.generate(
            input_ids=IDS, adapter_names=names, max_new_tokens=2, do_sample=False, eos_token_id=None
        )
    assert torch.equal(tokens[:, 8], found[:, -1].argmax(-1))


def test_what_it_cannot_do_is_refused():
    model = adapted()
    with pytest.raises(MergeError, match="activated"):
        model.merge_adapter()
    with pytest.raises(RowsError, match="token ids"):
        model.get_base_model()(input_ids=IDS)
    with pytest.raises(RowsError, match="input_ids"):
        model(inputs_embeds=torch.randn(2, 3, 24, dtype=torch.float64))
    with pytest.raises(ConfigError, match="use_dora"):
        config(use_dora=True)
    for wrong in ([], [1.5], 7):
        with pytest.raises(ConfigError, match="token ids"):
            config(alora_invocation_tokens=wrong)
    with pytest.raises(TargetError, match="linear layers only"):
        get_peft_model(tiny.llama(), config(target_modules=["embed_tokens"]))
    model.add_adapter("plain", config(alora_invocation_tokens=None))
    model.set_adapter("plain")
    with pytest.raises(RowsError, match="no adapter"):
        model(input_ids=IDS, alora_offsets=[1, 2, 3, 4])
    model.delete_adapter("default")
    model.merge_adapter()


def test_save_and_load(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(attention_bias=True, mlp_bias=True), tmp_path)
    assert again.peft_config["default"].alora_invocation_tokens == CALL
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it
@pytest.mark.interop
def test_peft_and_lowrank_load_each_others(tmp_path):
    import peft

    def base():
        return tiny.llama(attention_bias=True, mlp_bias=True, dtype=torch.float32)

    ours = adapted(base())
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    back = tmp_path / "theirs"
    theirs.save_pretrained(back)
    again = PeftModel.from_pretrained(base(), back)
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        for model in (ours, again):
            torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        ours.generate(input_ids=IDS, **options), theirs.generate(input_ids=IDS, **options)
    )
