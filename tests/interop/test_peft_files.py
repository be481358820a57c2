"""Adapter files: PEFT writes and we read, we write and PEFT reads; keys, shapes, bits and logits equal."""

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import (
    IDS,
    bert,
    gpt2,
    llama,
    llama_classifier,
    merged_by_hand,
    randomise,
    same_bits,
    t5,
)
from torch import nn

import lowrank
from lowrank.errors import AdapterFileError, LowrankError

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.interop,
    # PEFT's own: deprecated names of transformers, advice about tied and saved embeddings
    pytest.mark.filterwarnings("ignore"),
]

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Convolutions(nn.Module):
    """(batch, 3, 9, 8) -> (batch, 4)."""

    def __init__(self):
        super().__init__()
        # PEFT's conv layers know neither dilation nor padding_mode nor (in part) groups
        self.conv = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).flatten(2)
        return self.head(torch.tanh(self.line(x)).mean(-1))


class Cube(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 5, (3, 2, 1), stride=(1, 2, 1))

    def forward(self, x):
        return self.conv(x)


class Attention(nn.Module):
    """(batch, sequence, 12) -> the same, through torch's own attention."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.linear = nn.Linear(12, 7)

    def forward(self, x):
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


def plain(kind):
    def build():
        torch.manual_seed(0)
        return kind().double().eval()

    return build


def sequence_classifier():
    return bert(transformers.BertForSequenceClassification)


def numbers(*shape):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# name -> builder of the base, its input, fields of the configuration
CASES = {
    "linear": (llama, IDS, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "all-linear": (llama, IDS, {"target_modules": "all-linear"}),
    "by architecture": (llama, IDS, {}),
    "regular expression": (llama, IDS, {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
    "some layers": (llama, IDS, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "rslora": (llama, IDS, {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        llama,
        IDS,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {"q_proj": 11},
        },
    ),
    "dora": (llama, IDS, {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "lora_bias": (
        lambda: llama(attention_bias=True),
        IDS,
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ),
    "lora_bias without a bias": (llama, IDS, {"target_modules": ["q_proj"], "lora_bias": True}),
    "Conv1D": (gpt2, IDS, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D, dora": (
        gpt2,
        IDS,
        {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True},
    ),
    "embedding": (gpt2, IDS, {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}),
    "embedding, dora": (gpt2, IDS, {"target_modules": ["wpe"], "use_dora": True}),
    "word embedding": (llama, IDS, {"target_modules": ["embed_tokens", "q_proj"]}),
    "lm_head": (llama, IDS, {"target_modules": ["lm_head", "q_proj"]}),
    "tied lm_head": (lambda: llama(tied=True), IDS, {"target_modules": ["lm_head"]}),
    "bias lora_only": (
        gpt2,
        IDS,
        {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only", "fan_in_fan_out": True},
    ),
    "bias all": (bert, IDS, {"target_modules": ["query"], "bias": "all"}),
    "bias all, saved head": (
        sequence_classifier,
        IDS,
        {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
    ),
    "modules_to_save": (
        llama,
        IDS,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "saved embedding": (
        llama,
        IDS,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "classifier": (llama_classifier, IDS, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "seq2seq": (t5, IDS, {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "encoder": (bert, IDS, {"target_modules": ["query", "dense"]}),
    "convolution": (
        plain(Convolutions),
        numbers(2, 3, 9, 8),
        {"target_modules": ["conv", "line", "head"]},
    ),
    "convolution, dora": (
        plain(Convolutions),
        numbers(2, 3, 9, 8),
        {"target_modules": ["conv", "head"], "use_dora": True},
    ),
    "3-d convolution": (plain(Cube), numbers(2, 2, 4, 5, 3), {"target_modules": ["conv"]}),
}


def config_fields(fields):
    return {"r": 3, "lora_alpha": 5, **fields}


def output(model, x):
    if x.dtype != torch.int64:
        arguments = {"x": x}
    else:
        decoder = {"decoder_input_ids": x.flip(0)} if model.config.is_encoder_decoder else {}
        arguments = {"input_ids": x, **decoder}
    with torch.no_grad():
        found = model(**arguments)
    return found if isinstance(found, torch.Tensor) else found.logits


def peft_model(build, fields):
    return randomise(peft.get_peft_model(build(), peft.LoraConfig(**config_fields(fields)))).eval()


def our_model(build, fields):
    config = lowrank.LoraConfig(**config_fields(fields))
    return randomise(lowrank.get_peft_model(build(), config)).eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_writes_and_we_read(case, tmp_path):
    build, x, fields = CASES[case]
    theirs = peft_model(build, fields)
    theirs.save_pretrained(tmp_path)
    expected = output(theirs, x)
    assert (expected - output(build(), x)).abs().max() > 1e-3
    ours = lowrank.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(output(ours, x), expected, **CLOSE)
    # what we write again is, bit for bit, what they wrote (beside base weights that nobody changed)
    again = lowrank.get_peft_model_state_dict(ours)
    written = load_file(tmp_path / "adapter_model.safetensors")
    redundant = {key for key in written if ".original_module." in key or ".modules_to_save." in key}
    base = {key for key in written if "base_layer.weight" in key} | redundant
    assert same_bits(again, {key: tensor for key, tensor in written.items() if key not in base})


@pytest.mark.parametrize("case", CASES)
def test_we_write_and_peft_reads(case, tmp_path):
    build, x, fields = CASES[case]
    ours = our_model(build, fields)
    ours.save_pretrained(tmp_path)
    expected = output(ours, x)
    assert (expected - output(build(), x)).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(output(theirs, x), expected, **CLOSE)
    # PEFT's merge has nowhere to put a bias, and merges into both sides of a tied pair
    if case not in ("lora_bias without a bias", "tied lm_head"):
        torch.testing.assert_close(output(theirs.merge_and_unload(), x), expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_keys_and_shapes_of_the_files_are_equal(case, tmp_path):
    build, _, fields = CASES[case]
    peft_model(build, fields).save_pretrained(tmp_path / "theirs")
    our_model(build, fields).save_pretrained(tmp_path / "ours")
    theirs = shapes(tmp_path / "theirs")
    ours = shapes(tmp_path / "ours")
    for key in set(theirs) - set(ours):
        # PEFT also writes embeddings that it adapts but that did not change, and saved biases twice
        assert (
            key.endswith("base_layer.weight")
            or ".modules_to_save." in key
            or (".original_module." in key)
        ), key
    assert ours.items() <= theirs.items()


def shapes(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


@pytest.mark.parametrize("case", CASES)
def test_configurations_say_the_same(case, tmp_path):
    build, _, fields = CASES[case]
    theirs, ours = peft_model(build, fields), our_model(build, fields)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    a, b = (
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("theirs", "ours")
    )
    assert set(a) == set(b)
    different = {key for key in a if normal(a[key]) != normal(b[key])}
    # PEFT names heads that this model lacks too, and spells all-linear out in another way
    assert different <= {"peft_version", "modules_to_save", "target_modules"}
    assert peft.PeftConfig.from_pretrained(tmp_path / "ours").peft_type == "LORA"
    assert lowrank.PeftConfig.from_pretrained(tmp_path / "theirs").r == 3


def normal(value):
    return sorted(value) if isinstance(value, list) else value


# --- MultiheadAttention ---------------------------------------------------------------------------


def test_multihead_attention_of_peft(tmp_path):
    """PEFT always adapts out_proj too and counts that change twice, in its forward as in its merge.

    So its file is refused until out_proj is asked for; then every change counts once, as it is written.
    """
    build, x = plain(Attention), numbers(2, 6, 12)
    peft_model(build, {"target_modules": ["attention"]}).save_pretrained(tmp_path)
    with pytest.raises(LowrankError, match=r"attention\.base_layer\.out_proj\.lora_A"):
        lowrank.PeftModel.from_pretrained(build(), tmp_path)
    config = lowrank.PeftConfig.from_pretrained(tmp_path)
    config.target_modules = ["attention", "out_proj"]
    ours = lowrank.PeftModel.from_pretrained(build(), tmp_path, config=config)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert same_bits(lowrank.get_peft_model_state_dict(ours), written)
    tensors = {key.replace("base_layer.", ""): tensor for key, tensor in written.items()}
    truth = output(merged_by_hand(build(), tensors, 5 / 3), x)
    torch.testing.assert_close(output(ours, x), truth, **CLOSE)
    torch.testing.assert_close(output(ours.merge_and_unload(), x), truth, **CLOSE)


def test_multihead_attention_of_ours(tmp_path):
    """Without out_proj there is nothing that PEFT could count twice."""
    build, x = plain(Attention), numbers(2, 6, 12)
    ours = our_model(build, {"target_modules": ["attention"]})
    ours.save_pretrained(tmp_path)
    truth = merged_by_hand(build(), lowrank.get_peft_model_state_dict(ours), 5 / 3)
    torch.testing.assert_close(output(ours, x), output(truth, x), **CLOSE)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(output(theirs, x), output(ours, x), **CLOSE)


# --- resized vocabularies, pickles, and other files of PEFT's -------------------------------------


@pytest.fixture
def base(tmp_path):
    def load(tied):
        folder = tmp_path / f"base{tied}"
        if not folder.exists():
            llama(tied=tied).save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    return load


def resized(model, seed):
    torch.manual_seed(seed)
    model.resize_token_embeddings(101, mean_resizing=False)
    return model


NEW_IDS = torch.tensor([[1, 95, 7, 99, 33], [100, 4, 6, 94, 10]])
RESIZED = {
    "attention": {"target_modules": ["q_proj"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_of_ours_loads_in_peft(case, tied, base, tmp_path):
    ours = our_model(lambda: resized(base(tied), 3), RESIZED[case])
    ours.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(resized(base(tied), 77), tmp_path / "adapter")
    torch.testing.assert_close(output(theirs, NEW_IDS), output(ours, NEW_IDS), **CLOSE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_of_peft_loads_here(case, tied, base, tmp_path):
    theirs = peft_model(lambda: resized(base(tied), 3), RESIZED[case])
    theirs.save_pretrained(tmp_path / "adapter")
    # where it adapts one of two untied embeddings, PEFT's file lacks the other one's new rows
    read = peft.PeftModel.from_pretrained(resized(base(tied), 77), tmp_path / "adapter")
    ours = lowrank.PeftModel.from_pretrained(resized(base(tied), 77), tmp_path / "adapter")
    torch.testing.assert_close(output(ours, NEW_IDS), output(read, NEW_IDS), **CLOSE)
    with pytest.raises(LowrankError, match=r"resize_token_embeddings\(101\)"):
        lowrank.PeftModel.from_pretrained(base(tied), tmp_path / "adapter")


def test_embeddings_that_peft_was_asked_to_save(tmp_path):
    theirs = peft_model(llama, {"target_modules": ["q_proj"]})
    with torch.no_grad():
        theirs.get_input_embeddings().weight.add_(0.1)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = lowrank.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(output(ours, IDS), output(theirs, IDS), **CLOSE)


def test_a_pickle_that_peft_wrote_is_refused(tmp_path):
    peft_model(llama, {"target_modules": ["q_proj"]}).save_pretrained(
        tmp_path, safe_serialization=False
    )
    if (tmp_path / "adapter_model.safetensors").exists():
        pytest.skip("this PEFT writes no pickles")
    with pytest.raises(AdapterFileError, match="python -c"):
        lowrank.PeftModel.from_pretrained(llama(), tmp_path)


def test_an_adapter_of_peft_has_no_fingerprint_and_says_so(tmp_path, caplog):
    peft_model(llama, {"target_modules": ["q_proj"]}).save_pretrained(tmp_path)
    caplog.clear()
    lowrank.PeftModel.from_pretrained(llama(), tmp_path)
    ours = [record for record in caplog.records if record.name.startswith("lowrank")]
    assert len(ours) == 1
    assert "could not be checked" in ours[0].getMessage()


def test_several_adapters_of_peft(tmp_path):
    theirs = peft_model(llama, {"target_modules": ["q_proj"]})
    theirs.add_adapter("other", peft.LoraConfig(r=4, target_modules=["v_proj"]))
    theirs.set_adapter("other")
    randomise(theirs, seed=3)
    theirs.save_pretrained(tmp_path)
    ours = lowrank.PeftModel.from_pretrained(llama(), tmp_path)
    ours.load_adapter(tmp_path / "other", "other")
    for name in ("other", "default"):
        theirs.set_adapter(name)
        ours.set_adapter(name)
        torch.testing.assert_close(output(ours, IDS), output(theirs, IDS), **CLOSE)
    theirs.base_model.set_adapter(["default", "other"])
    ours.set_adapter(["default", "other"])
    torch.testing.assert_close(output(ours, IDS), output(theirs, IDS), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_bases(dtype, tmp_path):
    def build():
        return llama(dtype=dtype)

    for writer, loader in ((peft_model, lowrank.PeftModel), (our_model, peft.PeftModel)):
        written = writer(build, {"target_modules": ["q_proj", "v_proj"]})
        folder = tmp_path / writer.__name__
        written.save_pretrained(folder)
        read = loader.from_pretrained(build(), folder)
        expected = output(written, IDS)
        assert expected.dtype == dtype
        # PEFT casts x to float32, we cast A and B to x's dtype: equal to the dtype's precision
        tolerance = 20 * torch.finfo(dtype).eps
        torch.testing.assert_close(output(read, IDS), expected, atol=tolerance, rtol=tolerance)
        dtypes = {
            tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()
        }
        assert dtypes == {torch.float32}


def test_no_warning_of_ours_on_the_way(tmp_path):
    our_model(llama, {"target_modules": ["q_proj"]}).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowrank.PeftModel.from_pretrained(llama(), tmp_path)
