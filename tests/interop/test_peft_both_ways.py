"""Every feature that lowrank and PEFT both have: the same file in, the same logits out, both ways."""

import copy
import json

import pytest
import torch
from features import FEATURES, forward, output
from safetensors.torch import load_file
from tiny import randomise, same_bits

import lowrank

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.interop,
    # PEFT's own: deprecated names of transformers, advice about tied and saved embeddings
    pytest.mark.filterwarnings("ignore"),
]

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
R, ALPHA = 3, 5


@pytest.fixture(scope="module")
def pairs():
    """By feature: the base, and the two libraries' models of it, made once; no test leaves a trace in them."""
    made = {}

    def get(name):
        if name not in made:
            made.clear()
            feature = FEATURES[name]
            base = feature.build()
            models = []
            for library, seed in ((lowrank, 1), (peft, 2)):
                config = library.LoraConfig(**{"r": R, "lora_alpha": ALPHA, **feature.fields})
                model = library.get_peft_model(copy.deepcopy(base), config)
                models.append(randomise(model, seed).eval())
            made[name] = (feature, base, *models)
        return made[name]

    return get


@pytest.mark.parametrize("name", FEATURES)
def test_the_same_file_gives_the_same_logits(name, pairs, tmp_path):
    feature, base, ours, theirs = pairs(name)
    before = output(base, feature.x)
    for writer, reader in ((ours, peft), (theirs, lowrank)):
        folder = tmp_path / reader.__name__
        writer.save_pretrained(folder)
        expected = output(writer, feature.x)
        assert (expected - before).abs().max() > 1e-3
        read = reader.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        torch.testing.assert_close(output(read, feature.x), expected, **CLOSE)
        if reader is lowrank:
            again = lowrank.get_peft_model_state_dict(read)
        exact = merges_exactly(read, feature.x, expected)
        assert exact == (reader.__name__ in feature.merges), reader.__name__
    check_files(tmp_path / "peft", tmp_path / "lowrank", again)


def merges_exactly(model, x, expected):
    """Whether the merged model has no trace of an adapter and gives `expected`; an error counts as no."""
    try:
        merged = model.merge_and_unload()
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
    assert not any("lora" in key or "base_layer" in key for key in merged.state_dict())
    return torch.allclose(output(merged, x), expected, **CLOSE)


def check_files(by_us, by_peft, again):
    """The same keys and shapes; read and written again the same bits; configurations that say the same."""
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (by_us, by_peft))
    # PEFT also writes base weights that nobody changed, and saved biases twice
    more = {
        key
        for key in theirs
        if "base_layer.weight" in key or ".original_module." in key or ".modules_to_save." in key
    }
    assert same_bits(again, {key: tensor for key, tensor in theirs.items() if key not in more})
    found, expected = (
        {key: (tuple(t.shape), t.dtype) for key, t in tensors.items() if key not in more}
        for tensors in (ours, theirs)
    )
    assert found == expected
    a, b = (json.loads((f / "adapter_config.json").read_text()) for f in (by_us, by_peft))
    assert set(a) == set(b)
    different = {key for key in a if in_order(a[key]) != in_order(b[key])}
    # PEFT names heads that this model lacks too, and spells all-linear out in another way
    assert different <= {"peft_version", "modules_to_save", "target_modules"}


def in_order(value):
    return sorted(value, key=str) if isinstance(value, list) else value


@pytest.mark.parametrize("name", FEATURES)
def test_the_same_parameters_give_the_same_gradients(name, pairs):
    feature, _, ours, theirs = pairs(name)
    a, b = ({n: described(p) for n, p in m.named_parameters()} for m in (ours, theirs))
    assert a == b
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    state = copy.deepcopy(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    outputs = [forward(model, feature.x) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, **CLOSE)
    for found in outputs:
        found.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        if expected[key].grad is None:  # frozen, or a bias that no forward uses
            assert p.grad is None, key
        else:
            torch.testing.assert_close(p.grad, expected[key].grad, atol=1e-7, rtol=1e-5, msg=key)
    theirs.load_state_dict(state)
    for model in (ours, theirs):
        model.zero_grad()


def described(p):
    return tuple(p.shape), p.dtype, p.requires_grad
