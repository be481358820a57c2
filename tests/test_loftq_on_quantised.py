"""`replace_lora_weights_loftq`: s·B·A is the best of rank r for what the quantisation took."""

import copy

import pytest
import tiny
import torch

import lowrank
from lowrank import LoraConfig, Quantisation, quantise_model, replace_lora_weights_loftq
from lowrank.errors import BaseMismatchError, MergeError, ModelFolderError, TargetError
from lowrank.wrappers import lora_layers

NF4 = Quantisation("nf4", block_size=64)
LLAMA = ["q_proj", "down_proj"]


def setting(targets=LLAMA, **options):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets, **options})


@pytest.fixture(params=["llama", "gpt2"])
def original(request, tmp_path):
    model = getattr(tiny, request.param)(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    return model


def adapted(original, **options):
    targets = ["c_attn", "c_proj"] if original.config.model_type == "gpt2" else LLAMA
    model = copy.deepcopy(original)
    quantise_model(model, NF4)
    return lowrank.get_peft_model(model, setting(targets, **options)).eval()


def weight_of(model, path):
    W = model.get_submodule(path).weight.detach().double()
    return W.T if model.config.model_type == "gpt2" else W


@pytest.mark.parametrize("use_dora", [False, True])
def test_it_is_the_best_of_its_rank_for_what_was_lost(original, tmp_path, use_dora):
    model = adapted(original, use_dora=use_dora)
    paths = replace_lora_weights_loftq(model, tmp_path)
    layers = {path.removeprefix("base_model.model."): m for path, m in lora_layers(model)}
    assert paths == list(layers)
    for path, layer in layers.items():
        W, Q = weight_of(original, path), layer.unmerged_weight().double()
        U, S, Vh = torch.linalg.svd(W - Q)
        best = U[:, :3] @ torch.diag(S[:3]) @ Vh[:3]
        change = layer.get_delta_weight("default").double()
        assert (change - best).norm() < 1e-4 * best.norm()
        assert (W - Q - change).norm() < 0.95 * (W - Q).norm()
        if use_dora:
            torch.testing.assert_close(
                layer.lora("default").magnitude.double(), (Q + best).norm(dim=1), rtol=1e-4, atol=0
            )


def test_the_callback_decides_layer_by_layer(original, tmp_path):
    model, seen = adapted(original, init_lora_weights=False), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def keep(asked, path):
        assert asked is model
        seen.append(path)
        return len(seen) % 2 == 0

    kept = replace_lora_weights_loftq(model, callback=keep, model_path=str(tmp_path))
    assert kept == seen[1::2]
    for name, p in model.named_parameters():
        replaced = ".lora_" in name and any(f".{path}.lora_" in name for path in kept)
        assert torch.equal(p, before[name]) != replaced


def test_what_it_cannot_do_is_said(tmp_path):
    original = tiny.llama(dtype=torch.float32)
    original.save_pretrained(tmp_path / "original")
    tiny.llama(dtype=torch.float32, seed=5).save_pretrained(tmp_path / "other")
    tiny.llama(dtype=torch.float32, vocab=50, layers=1).save_pretrained(tmp_path / "short")
    model = adapted(original)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        BaseMismatchError, match=r"q_proj: the weight in the files is 1\d\d% of its"
    ):
        replace_lora_weights_loftq(model, tmp_path / "other")
    with pytest.raises(ModelFolderError, match=r"(?s)2 problems.*layers.1.self_attn.q_proj.weight"):
        replace_lora_weights_loftq(model, tmp_path / "short")
    with pytest.raises(ModelFolderError, match="does not say where it came from"):
        replace_lora_weights_loftq(model)
    with pytest.raises(ModelFolderError, match="no safetensors files"):
        replace_lora_weights_loftq(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        replace_lora_weights_loftq(model, tmp_path / "original")
    with pytest.raises(TargetError, match="taken out of W"):
        replace_lora_weights_loftq(
            adapted(original, init_lora_weights="pissa"), tmp_path / "original"
        )
    with pytest.raises(TargetError, match="on no quantised layer"):
        replace_lora_weights_loftq(lowrank.get_peft_model(original, setting()))
