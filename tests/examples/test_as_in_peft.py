"""What users of PEFT write, with `lowrank` in the place of `peft`: each test is one page's worth."""

import pytest
import tiny
import torch
from torch import nn

import lowrank
from lowrank import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)


@pytest.fixture
def base(tmp_path):
    """A folder with a base model."""
    tiny.llama(dtype=torch.float32).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_configure_wrap_train_save_and_load(base, tmp_path, capsys):
    model = load(base)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    assert "trainable params: " in capsys.readouterr().out

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tiny.IDS, labels=tiny.IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path / "output")
    expected = tiny.logits(model.eval())
    config = PeftConfig.from_pretrained(tmp_path / "output")
    again = PeftModel.from_pretrained(load(config.base_model_name_or_path), tmp_path / "output")
    assert torch.equal(tiny.logits(again), expected)
    with_base = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "output")
    assert torch.equal(tiny.logits(with_base), expected)


def test_switch_merge_and_unload(base, tmp_path):
    model = get_peft_model(load(base), LoraConfig(r=4, target_modules="all-linear"), "english")
    model.add_adapter("french", LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True))
    for seed, name in enumerate(("english", "french")):
        model.set_adapter(name)
        tiny.randomise(model, seed)
    model.save_pretrained(tmp_path, selected_adapters=["french"])

    model = PeftModel.from_pretrained(load(base), tmp_path / "french", adapter_name="french")
    french = tiny.logits(model)
    model.load_adapter(tmp_path / "french", adapter_name="again")
    model.set_adapter("again")
    assert model.active_adapters == ["again"]
    assert torch.equal(tiny.logits(model), french)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(load(base)))
    model.delete_adapter("again")
    model.set_adapter("french")
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged), french, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_combine_and_mix_in_one_batch(base):
    model = get_peft_model(load(base), LoraConfig(r=4, init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(r=4, init_lora_weights=False))
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="linear")
    alone = {}
    for name in ("a", "both"):
        model.set_adapter(name)
        alone[name] = tiny.logits(model)
    with torch.no_grad():
        rows = model(input_ids=tiny.IDS, adapter_names=["a", "__base__", "both"]).logits
    with model.disable_adapter():
        alone["__base__"] = tiny.logits(model)
    for row, name in enumerate(["a", "__base__", "both"]):
        torch.testing.assert_close(rows[row], alone[name][row], rtol=1e-4, atol=1e-5)


class MLP(nn.Module):
    def __init__(self, width=20):
        super().__init__()
        self.seq = nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, x):
        return self.seq(x)


def test_a_model_of_your_own(tmp_path):
    config = LoraConfig(target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"], use_dora=True)
    torch.manual_seed(0)
    model = get_peft_model(MLP(), config)
    x = torch.randn(5, 6)
    model(x).sum().backward()
    tiny.randomise(model).save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(MLP(), tmp_path)
    assert torch.equal(again(x), model(x))


def test_inject_without_a_wrapper():
    torch.manual_seed(0)
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["seq.2"]), MLP())
    tensors = get_peft_model_state_dict(tiny.randomise(model))
    assert sorted(tensors) == ["seq.2.lora_A.weight", "seq.2.lora_B.weight"]
    torch.manual_seed(0)
    other = inject_adapter_in_model(LoraConfig(r=4), MLP(), state_dict=tensors)
    result = set_peft_model_state_dict(other, tensors)
    assert result.unexpected_keys == []
    assert torch.equal(other(torch.ones(1, 6)), model(torch.ones(1, 6)))


def test_the_files(base, tmp_path):
    model = get_peft_model(load(base), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()} - {"base"}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    keys = lowrank.load_peft_weights(tmp_path)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert LoraConfig.from_pretrained(tmp_path).r == 4
