"""`lowrank convert` as it is called."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lowrank import Adapter, LoraConfig, read_adapter, write_adapter
from lowrank.cli import convert, main
from lowrank.formats import FORMATS
from lowrank.formats.layers import KINDS

PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    """An adapter of a llama, its base's config.json, and DoRA for a unet."""
    tensors = {
        f"base_model.model.{PATH}.lora_A.weight": torch.randn(3, 10),
        f"base_model.model.{PATH}.lora_B.weight": torch.randn(8, 3),
    }
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"])
    write_adapter(tmp_path / "a", Adapter(config, tensors, {}))
    at = "base_model.model.mid_block.attentions.0.proj_in"
    tensors = {key.replace(f"base_model.model.{PATH}", at): t for key, t in tensors.items()}
    tensors[f"{at}.lora_magnitude_vector"] = torch.rand(8)
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["proj_in"])
    write_adapter(tmp_path / "parts" / "unet", Adapter(config, tensors, {}))
    (tmp_path / "base").mkdir()
    values = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "base" / "config.json").write_text(json.dumps(values))
    return tmp_path


NAMES = ("a", "parts", "base", "out", "out.gguf", "out.safetensors", "nothing")


def call(folder, *words):
    return main(["convert", *(str(folder / word) if word in NAMES else word for word in words)])


def test_there_and_back(folder, capsys):
    assert call(folder, "a", "out.gguf", "--to", "gguf", "--base", "base") == 0
    shown = capsys.readouterr().out
    assert "1 layers, rank 3, 54 parameters" in shown
    assert f"written  {folder / 'out.gguf'}" in shown
    assert call(folder, "out.gguf", "out", "--to", "peft") == 0
    A, B = read_adapter(folder / "out").tensors.values()
    before = read_adapter(folder / "a")
    A0, B0 = before.tensors.values()
    assert read_adapter(folder / "out").config.lora_alpha == pytest.approx(5 * 3**0.5)
    torch.testing.assert_close(A, A0)
    torch.testing.assert_close(B, B0)


def test_json_and_drop(folder, capsys):
    assert (
        call(folder, "parts", "out.safetensors", "--to", "kohya", "--drop", "dora", "--json") == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["from"] == "peft"
    assert result["files"] == [str(folder / "out.safetensors")]
    assert result["adapters"]["unet"] == {"layers": 1, "ranks": [3], "dora": False, "params": 54}
    assert len(result["dropped"]["dora"]) == 1
    assert not any("dora_scale" in key for key in load_file(folder / "out.safetensors"))


def test_dora_in_kohya_s_file_comes_with_a_note(folder, capsys):
    assert call(folder, "parts", "out.safetensors", "--to", "kohya") == 0
    shown = capsys.readouterr().out
    assert "DoRA" in shown
    assert "LyCORIS" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if str(folder) not in line)
    assert "dropped" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "out"], "--to"),
        (["a", "out", "--to", "ggml"], "invalid choice"),
        (["a", "out", "--to", "gguf", "--base", "base"], "must be the name of a file"),
        (["a", "out.gguf", "--to", "gguf"], "--base"),
        (["a", "base", "--to", "mlx"], "exists. Name another"),
        (["a", "a", "--to", "mlx", "--overwrite"], "is what is read"),
        (["a", "out", "--to", "diffusers"], "--component"),
        (["parts", "out.gguf", "--to", "gguf", "--base", "base"], "takes one"),
        (["nothing", "out", "--to", "mlx"], "nothing"),
        (["parts", "out", "--to", "mlx", "--component", "unet"], "mid_block.attentions.0.proj_in"),
    ],
)
def test_what_cannot_be_done_ends_with_2(folder, words, message, capsys):
    assert call(folder, *words) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert not (folder / "out.gguf").exists()


def test_the_command_names_all_formats_and_kinds():
    """They stand in the command too, so that --help imports no torch."""
    assert tuple(FORMATS) == convert.FORMATS
    assert tuple(KINDS) == convert.KINDS
