"""Every optimiser of `train.optimizer`: one step through the Trainer, with LoRA+ and without."""

import importlib.util

import pytest
import text
import tiny
import torch

from lowrank import LoraConfig, compat, get_peft_model
from lowrank.errors import MissingExtraError
from lowrank.train.data.encode import encode
from lowrank.train.data.rows import Row
from lowrank.train.run.optimizers import OPTIMIZERS, transformers_name
from lowrank.train.settings import TrainSettings
from lowrank.train.tasks.sft import train_sft

ROWS = [Row(pair["prompt"], pair["completion"], "f") for pair in text.pairs(4)]
LR, RATIO = 1e-2, 4.0


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("ratio", [None, RATIO])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_goes_against_the_gradient_at_its_rate(name, ratio, tmp_path):
    if OPTIMIZERS[name].bitsandbytes:
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(3)
    base = tiny.llama(vocab=text.VOCABULARY, dtype=torch.float32, layers=1)
    config = LoraConfig(
        r=128, target_modules=["down_proj"]
    )  # A has 5120 entries: enough for 8 bits
    model = tiny.randomise(get_peft_model(base, config))
    start, gradients = {}, {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            start[key] = parameter.detach().clone()
            parameter.register_hook(lambda g, key=key: gradients.__setitem__(key, g.clone()))
    settings = TrainSettings(
        optimizer=name,
        loraplus_lr_ratio=ratio,
        learning_rate=LR,
        max_steps=1,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        batch_size=4,
    )
    tokenizer = text.byte_tokenizer()
    data = encode(ROWS, tokenizer, max_length=64)
    seen = {}

    with compat.standing_in():
        from transformers import TrainerCallback

        class Look(TrainerCallback):
            def on_step_end(self, args, state, control, optimizer=None, **kwargs):
                held = getattr(optimizer, "optimizer", optimizer).state.values()
                tensors = [t for state in held for t in state.values() if torch.is_tensor(t)]
                seen["dtypes"] = {t.dtype for t in tensors}

        train_sft(model, tokenizer, data, None, tmp_path, settings, callbacks=[Look()])
    assert (torch.uint8 in seen["dtypes"]) == name.endswith("8bit")
    for key, before in start.items():
        moved, g = dict(model.named_parameters())[key].detach() - before, gradients[key]
        clear = g.abs() > g.abs().max() / 20
        assert torch.equal(moved[clear].sign(), -g[clear].sign()), key
        rate = LR * (ratio or 1) if "lora_B" in key else LR
        if name != "adafactor":  # AdamW's first step and every step of Lion: the rate, by the sign
            torch.testing.assert_close(
                moved[clear].abs(), torch.full_like(moved[clear], rate), rtol=0.05, atol=0
            )


def test_without_bitsandbytes_it_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"lowrank\[bnb\][\s\S]*Without it: adamw or adafactor"
    ):
        transformers_name("lion_8bit")
    assert transformers_name("adamw") == "adamw_torch_fused"
    from lowrank.cli import main

    words = ["--model", "nowhere", "--data", "none.jsonl", "--output", f"{tmp_path}/run"]
    assert main(["train", *words, "--optimizer", "paged_adamw_8bit"]) == 2
    assert "not installed" in capsys.readouterr().err
