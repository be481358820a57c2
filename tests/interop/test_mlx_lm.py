"""Converted adapters in mlx-lm itself: its logits are ours. What mlx-lm saves, converted: ours are its.

python -m venv mlx && mlx/bin/pip install "mlx[cpu]" mlx-lm
LOWRANK_MLX_PYTHON=mlx/bin/python pytest -m slow tests/interop/test_mlx_lm.py
"""

import json

import pytest
import torch
from foreign import adapted, base, endings, interpreter, run
from tiny import IDS

import lowrank
from lowrank.formats import convert

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
CASES = {
    **{name: (name, {}) for name in MODELS},
    **{f"{name} dora": (name, {"use_dora": True}) for name in ("llama", "qwen2", "phi3")},
    **{
        name: (name, {"target_parameters": EXPERTS})
        for name in ("mixtral", "qwen2_moe", "qwen3_moe")
    },
    "rslora": ("llama", {"use_rslora": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
}
# mlx-lm's Gemma has the exact GELU, transformers' the tanh of it
TOLERANCES = {"gemma": 3e-4}
KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
MOE_KEYS = [
    f"block_sparse_moe.{name}" for name in ("gate", "switch_mlp.up_proj", "switch_mlp.down_proj")
]
SAVED = {
    "saved": ("llama", "lora", KEYS),
    "saved dora": ("llama", "dora", KEYS),
    "saved experts": ("mixtral", "lora", MOE_KEYS),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """mlx-lm's logits, ours and the base's, by case."""
    python, folder = interpreter("LOWRANK_MLX_PYTHON", "mlx_lm"), tmp_path_factory.mktemp("mlx")
    jobs, ours, plain = {}, {}, {}
    for name, (model_type, options) in CASES.items():
        at = folder / name
        model = base(model_type, at / "base")
        as_published(at / "base", model.config)
        plain[name] = logits(model)
        fields = dict(options)
        targets = fields.pop("target_modules", endings(model))
        ours[name] = logits(adapted(model, at / "in", targets, **fields))
        convert(at / "in", at / "mlx", "mlx", base=str(at / "base"))
        jobs[name] = {"base": str(at / "base"), "adapter": str(at / "mlx"), "ids": IDS.tolist()}
    for name, (model_type, kind, keys) in SAVED.items():
        at = folder / name
        plain[name] = logits(base(model_type, at / "base"))
        said = {
            "fine_tune_type": kind,
            "num_layers": 1,
            "lora_parameters": {"rank": 3, "scale": 2.5, "dropout": 0.0, "keys": keys},
        }
        jobs[name] = {"base": str(at / "base"), "adapter": str(at / "mlx"), "ids": IDS.tolist()}
        jobs[name]["save"] = said
    theirs = run(python, "run_mlx_lm.py", jobs, folder)
    for name in SAVED:
        at = folder / name
        convert(at / "mlx", at / "out", "peft", base=str(at / "base"))
        model = base(SAVED[name][0], at / "base")
        ours[name] = logits(lowrank.PeftModel.from_pretrained(model, at / "out").eval())
    return theirs, ours, plain


def as_published(folder, config):
    """The words of config.json that mlx-lm looks for, and transformers 5 does not write."""
    file = folder / "config.json"
    said = json.loads(file.read_text())
    if "rope_theta" in config.rope_parameters:
        said["rope_theta"] = config.rope_parameters["rope_theta"]
    if hasattr(config, "num_experts"):
        said["num_experts"] = config.num_experts
    file.write_text(json.dumps(said))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", [*CASES, *SAVED])
def test_mlx_lm_computes_what_we_do(results, name):
    theirs, ours, plain = (found[name] for found in results)
    assert (ours - plain).abs().max() > 0.05
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCES.get(name, 1e-5))
