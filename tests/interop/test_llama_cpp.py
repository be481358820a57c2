"""Converted adapters in llama.cpp itself: its logits are ours.

python -m venv llama && llama/bin/pip install llama-cpp-python
LOWRANK_LLAMA_PYTHON=llama/bin/python pytest -m slow tests/interop/test_llama_cpp.py
"""

import pytest
import tiny
import torch
from foreign import adapted, base, endings, interpreter, run
from gguf_base import write_base
from tiny import IDS

from lowrank.formats import convert
from lowrank.formats.base_model import ARCHITECTURES

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ENDS = ["embed_tokens", "lm_head", "k_proj"]
CASES = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "rslora": ("llama", {"use_rslora": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "alpha 0": ("llama", {"lora_alpha": 0}),
    "activated": ("llama", {"alora_invocation_tokens": [7]}),
    "embeddings": ("llama", {"target_modules": ENDS}),
    "f16": ("llama", {"dtype": "f16"}),
}
# llama.cpp looks the GELU up in a table in float16
TOLERANCES = {**dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gpt2"), 3e-3), "f16": 3e-3}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """llama.cpp's logits and ours by case, with the base's at "base <case>"."""
    python = interpreter("LOWRANK_LLAMA_PYTHON", "llama_cpp")
    folder = tmp_path_factory.mktemp("llama")
    jobs, ours = {}, {}
    for name, (model_type, options) in CASES.items():
        at, row = folder / name, ARCHITECTURES[model_type]
        fields = {"fan_in_fan_out": row.transposed, **options}
        dtype = fields.pop("dtype", None)
        if row.experts:
            fields["target_parameters"] = [
                "experts.gate_up_proj",
                "experts.down_proj",
                "mlp.router.weight" if model_type == "gpt_oss" else "mlp.gate.weight",
            ]
        if model_type == "gpt2":
            model = tiny.gpt2(torch.float32)
            model.save_pretrained(at / "base")
        else:
            model = base(model_type, at / "base")
        targets = fields.pop("target_modules", endings(model))
        write_base(model, at / "base.gguf", row.gguf, row.rotary, row.transposed)
        ours[f"base {name}"] = logits(model)
        ours[name] = logits(adapted(model, at / "in", targets, **fields))
        convert(at / "in", at / "a.gguf", "gguf", base=str(at / "base"), dtype=dtype)
        job = {"base": str(at / "base.gguf"), "ids": IDS.tolist()}
        jobs |= {f"base {name}": {**job, "adapter": None}}
        jobs |= {name: {**job, "adapter": str(at / "a.gguf")}}
    return run(python, "run_llama_cpp.py", jobs, folder), ours


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_we_do(results, name):
    theirs, ours = results
    assert (ours[name] - ours[f"base {name}"]).abs().max() > 0.005
    for case in (f"base {name}", name):
        torch.testing.assert_close(
            theirs[case], ours[case], rtol=0, atol=TOLERANCES.get(name, 1e-5)
        )
