"""Files of PEFT's and ours beyond test_peft_both_ways.py: attention, resized vocabularies, pickles, 16 bits."""

import warnings

import pytest
import torch
import transformers
from features import SEQUENCES, Attention, output, plain
from safetensors.torch import load_file
from tiny import IDS, llama, merged_by_hand, randomise, same_bits

import lowrank
from lowrank.errors import AdapterFileError, LowrankError

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.interop,
    # PEFT's own: deprecated names of transformers, advice about tied and saved embeddings
    pytest.mark.filterwarnings("ignore"),
]

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def config_fields(fields):
    return {"r": 3, "lora_alpha": 5, **fields}


def peft_model(build, fields):
    return randomise(peft.get_peft_model(build(), peft.LoraConfig(**config_fields(fields)))).eval()


def our_model(build, fields):
    config = lowrank.LoraConfig(**config_fields(fields))
    return randomise(lowrank.get_peft_model(build(), config)).eval()


# --- MultiheadAttention ---------------------------------------------------------------------------


def test_multihead_attention_of_peft(tmp_path):
    """PEFT always adapts out_proj too and counts that change twice, in its forward as in its merge.

    So its file is refused until out_proj is asked for; then every change counts once, as it is written.
    """
    build, x = plain(Attention), SEQUENCES
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
    build, x = plain(Attention), SEQUENCES
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
