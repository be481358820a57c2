"""target_parameters against the installed PEFT: the same file in, the same logits out, both ways."""

import copy

import pytest
import tiny
import torch
from tiny import logits, randomise

import lowrank

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.interop,
    # PEFT's own, among them that a pattern for a parameter's path is ignored, which it is not
    pytest.mark.filterwarnings("ignore"),
]

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "mixtral": (tiny.mixtral, {"target_parameters": BOTH}),
    "mixtral, down only": (tiny.mixtral, {"target_parameters": BOTH[1:]}),
    "mixtral, all kinds": (
        tiny.mixtral,
        {
            "target_parameters": ["gate.weight", *BOTH, "k_proj.weight"],
            "target_modules": ["q_proj"],
            "use_rslora": True,
            "rank_pattern": {"experts.gate_up_proj": 2},
            "alpha_pattern": {"experts.down_proj": 7},
        },
    ),
    "qwen3_moe": (tiny.qwen3_moe, {"target_parameters": BOTH}),
    "gpt_oss": (tiny.gpt_oss, {"target_parameters": BOTH}),
    "llama4": (tiny.llama4, {"target_parameters": BOTH}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_file_means_the_same(case, tmp_path):
    build, fields = CASES[case]
    base = build()
    fields = {"r": 3, "lora_alpha": 5, "target_modules": [], **fields}
    ours = randomise(lowrank.get_peft_model(copy.deepcopy(base), lowrank.LoraConfig(**fields)))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    names = {n: tuple(p.shape) for n, p in ours.named_parameters() if "lora_" in n}
    assert names == {n: tuple(p.shape) for n, p in theirs.named_parameters() if "lora_" in n}
    randomise(theirs, seed=2)
    for writer, reader in ((ours, peft.PeftModel), (theirs, lowrank.PeftModel)):
        folder = tmp_path / type(writer).__module__
        writer.save_pretrained(folder)
        loaded = reader.from_pretrained(copy.deepcopy(base), folder).eval()
        written = logits(writer.eval())
        assert (written - logits(base)).abs().max() > 1e-2
        torch.testing.assert_close(logits(loaded), written, rtol=0, atol=1e-12)
