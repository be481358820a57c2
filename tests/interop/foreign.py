"""Tiny models with adapters for the programs that read converted files, and their interpreters.

Such a program runs in an interpreter of its own, which an environment variable names: ours needs nothing of it.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.formats.base_model import ARCHITECTURES

# what a model_type needs beside the sizes
OPTIONS = {
    "qwen3": {"head_dim": 10},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 14,
        "shared_expert_intermediate_size": 18,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 14,
        "head_dim": 10,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 10,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "gemma": {"head_dim": 10},
    "gemma2": {"head_dim": 10, "query_pre_attn_scalar": 10},
    # six layers are a whole pattern of local and global attention; √36 is exact in bfloat16, which mlx-lm rounds to
    "gemma3_text": {
        "head_dim": 10,
        "num_hidden_layers": 6,
        "hidden_size": 36,
        "query_pre_attn_scalar": 10,
    },
}


def base(model_type, folder, **options):
    """A model in float32, and its folder."""
    sizes = {**tiny.DECODER, "intermediate_size": 40, **OPTIONS.get(model_type, {}), **options}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    config.tie_word_embeddings = ARCHITECTURES[model_type].tied
    kind = transformers.AutoModelForCausalLM.from_config
    model = tiny._built(kind, config, torch.float32, 0)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # torch's grouped_mm knows no odd sizes
    model.save_pretrained(folder)
    return model


def adapted(model, folder, targets, **fields):
    """The model with an adapter of several ranks and alphas, which is saved too."""
    fields = {
        "r": 3,
        "lora_alpha": 7,
        "rank_pattern": {targets[0]: 5},
        "alpha_pattern": {targets[1]: 2},
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
        **fields,
    }
    model = lowrank.get_peft_model(model, LoraConfig(target_modules=targets, **fields))
    tiny.randomise(model).eval().save_pretrained(folder)
    return model


def endings(model):
    """The last names of all linear layers but the head."""
    kinds = nn.Linear, transformers.pytorch_utils.Conv1D
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths if path != "lm_head"))


def interpreter(variable, module):
    """The interpreter that has the module; skips where none is named."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter that has {module}")
    return python


def run(python, script, jobs, folder):
    """What the program gives for each job, by name."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [python, Path(__file__).with_name(script), folder / "jobs.json", folder / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "out.npz") as found:
        return {name: torch.from_numpy(found[name]) for name in jobs}
