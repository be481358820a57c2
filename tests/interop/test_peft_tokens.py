"""`trainable_token_indices` in lowrank and in PEFT: the same names, files and logits."""

import pytest
import torch
from tiny import IDS, llama, logits, randomise

import lowrank

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # PEFT's own, and transformers' about PEFT's calls
]

CASES = {
    "list": (False, [9, 4, 71]),
    "list, tied": (True, [9, 4, 71]),
    "embedding by its name, tied": (True, {"embed_tokens": [9, 4, 71]}),
    "both, tied": (True, {"embed_tokens": [9, 4], "lm_head": [9, 4]}),
    "both apart, tied": (True, {"embed_tokens": [9, 4], "lm_head": [71, 4, 3]}),
    "both, not tied": (False, {"model.embed_tokens": [9, 4], "lm_head": [71, 4, 3]}),
    "only the head": (False, {"lm_head": [71, 4, 3]}),
}


def config_of(library, case, **fields):
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **fields}
    return library.LoraConfig(trainable_token_indices=CASES[case][1], **fields)


def model_of(library, case, **fields):
    return library.get_peft_model(llama(tied=CASES[case][0]), config_of(library, case, **fields))


def trained(model):
    return {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_names_and_logits(case):
    ours, theirs = randomise(model_of(lowrank, case)), model_of(peft, case)
    assert trained(ours) == trained(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(logits(ours), logits(theirs))
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, theirs.get_parameter(name).grad)


@pytest.mark.parametrize("case", CASES)
def test_files_go_both_ways(case, tmp_path):
    tied = CASES[case][0]
    for writer, reader in ((lowrank, peft), (peft, lowrank)):
        folder = tmp_path / writer.__name__
        model = randomise(model_of(writer, case))
        model.save_pretrained(folder)
        loaded = reader.PeftModel.from_pretrained(llama(tied=tied), folder)
        torch.testing.assert_close(logits(loaded), logits(model))
    first, second = (lowrank.read_adapter(tmp_path / n).tensors for n in ("lowrank", "peft"))
    assert {k: t.shape for k, t in first.items()} == {k: t.shape for k, t in second.items()}
