"""LoRA+: which parameter is in which group, and one step worked out by hand."""

import sys
import types

import pytest
import torch
from models import Net
from tiny import IDS, llama, randomise
from torch import nn

from lowrank import LoraConfig, create_loraplus_optimizer, get_peft_model
from lowrank.errors import ConfigError, NotTrainableError

RATES = {"lr": 3e-3, "loraplus_lr_ratio": 7.0, "loraplus_lr_embedding": 2e-4}


def net(**fields):
    torch.manual_seed(0)
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "embed"], **fields}
    )
    return randomise(get_peft_model(Net(layers=2).double(), config))


def named_groups(model, optimizer):
    names = {id(p): n.removeprefix("base_model.model.") for n, p in model.named_parameters()}
    return [sorted(names[id(p)] for p in group["params"]) for group in optimizer.param_groups]


def test_groups():
    model = net(bias="lora_only", modules_to_save=["head", "layers.0.norm"], use_dora=True)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, **RATES, loraplus_weight_decay=0.2, betas=(0.8, 0.9)
    )
    assert named_groups(model, optimizer) == [
        [
            "head.modules_to_save.default.weight",
            "layers.0.q_proj.lora_A.default.weight",
            "layers.1.q_proj.lora_A.default.weight",
        ],
        [
            "embed.lora_embedding_A.default",
            "embed.lora_embedding_B.default",
        ],
        [
            "embed.lora_magnitude_vector.default.weight",
            "layers.0.q_proj.lora_B.default.weight",
            "layers.0.q_proj.lora_magnitude_vector.default.weight",
            "layers.1.q_proj.lora_B.default.weight",
            "layers.1.q_proj.lora_magnitude_vector.default.weight",
        ],
        [
            "head.modules_to_save.default.bias",
            "layers.0.norm.modules_to_save.default.bias",
            "layers.0.norm.modules_to_save.default.weight",
            "layers.0.q_proj.base_layer.bias",
            "layers.1.q_proj.base_layer.bias",
        ],
    ]
    found = [(g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups]
    betas = (0.8, 0.9)
    assert found == [
        (3e-3, 0.2, betas),
        (2e-4, 0.2, betas),
        (0.021, 0.2, betas),
        (0.021, 0.0, betas),
    ]


def test_one_step_of_adamw():
    """θ ← θ·(1 − η·λ) − η·m̂/(√v̂ + ε), where after one step m̂ = g and v̂ = g²."""
    model = net()
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, **RATES, loraplus_weight_decay=0.3
    )
    model(torch.tensor([[1, 4, 9], [2, 2, 7]])).square().sum().backward()
    rate = {"lora_A": 3e-3, "lora_B": 0.021, "lora_embedding_A": 2e-4, "lora_embedding_B": 2e-4}
    expected = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            lr = rate[next(part for part in name.split(".") if part.startswith("lora_"))]
            g = p.grad.clone()
            expected[name] = p.detach() * (1 - lr * 0.3) - lr * g / (g.abs() + 1e-8)
    optimizer.step()
    assert len(expected) == 6
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), expected[name], atol=1e-12, rtol=1e-12)


def test_an_eight_bit_optimiser_keeps_embeddings_in_32_bits(monkeypatch):
    seen = []

    class Manager:
        @classmethod
        def get_instance(cls):
            return cls()

        def register_module_override(self, module, name, setting):
            seen.append((type(module), name, setting))

    optim = types.ModuleType("bitsandbytes.optim")
    optim.GlobalOptimManager = Manager
    package = types.ModuleType("bitsandbytes")
    package.optim = optim
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)

    class AdamW8bit(torch.optim.AdamW):
        pass

    create_loraplus_optimizer(net(), AdamW8bit, **RATES)
    assert seen == [(nn.Embedding, "weight", {"optim_bits": 32})]


def test_refusals():
    with pytest.raises(ConfigError, match=r"lr=0, loraplus_lr_ratio=nan"):
        create_loraplus_optimizer(net(), torch.optim.AdamW, lr=0, loraplus_lr_ratio=float("nan"))
    frozen = net(inference_mode=True)
    with pytest.raises(NotTrainableError, match="no LoRA factor"):
        create_loraplus_optimizer(frozen, torch.optim.AdamW, **RATES)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_groups_are_pefts():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer as theirs

    fields = {
        "r": 3,
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
        "use_dora": True,
    }
    found = []
    for library, create in ((peft, theirs), (None, create_loraplus_optimizer)):
        config = (library.LoraConfig if library else LoraConfig)(**fields)
        model = (library.get_peft_model if library else get_peft_model)(llama(), config)
        model(IDS)
        optimizer = create(model, torch.optim.AdamW, **RATES, loraplus_weight_decay=0.1)
        settings = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        found.append((named_groups(model, optimizer), settings))
    assert found[0] == found[1]
