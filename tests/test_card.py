"""The README.md of a saved adapter."""

import pytest
from huggingface_hub import ModelCard

from lowrank import LoraConfig
from lowrank.card import write_card


def card(folder, **values):
    write_card(
        folder, LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **values})
    )
    return ModelCard.load(folder / "README.md")


def test_the_hub_can_read_its_front_matter(tmp_path):
    found = card(tmp_path, base_model_name_or_path="org/model-1.5")
    assert found.data.base_model == "org/model-1.5"
    assert found.data.to_dict()["library_name"] == "peft"
    assert found.data.tags == ["lora", "lowrank"]
    assert "r=3, lora_alpha=5, on q_proj" in found.text


def test_a_local_base_is_not_claimed_to_be_on_the_hub(tmp_path):
    base = tmp_path / "home" / "secret" / "my-base"
    base.mkdir(parents=True)
    found = card(tmp_path, base_model_name_or_path=str(base))
    assert found.data.base_model is None
    assert "`my-base`" in found.text
    assert "secret" not in found.content


def test_a_base_that_is_gone_is_not_claimed_either(tmp_path):
    found = card(tmp_path, base_model_name_or_path="/home/somebody/secret/my-base")
    assert found.data.base_model is None
    assert "secret" not in found.content


def test_a_base_without_a_name(tmp_path):
    found = card(tmp_path)
    assert found.data.base_model is None
    assert "`unknown`" in found.text


def test_targets_that_are_a_regular_expression(tmp_path):
    found = card(tmp_path, target_modules=r".*\.(q|v)_proj")
    assert r"on .*\.(q|v)_proj" in found.text


@pytest.mark.parametrize("text", ["", "---\nlicense: mit\n---\nWritten by a person.\n"])
def test_what_a_person_wrote_stays(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    write_card(tmp_path, LoraConfig())
    assert (tmp_path / "README.md").read_text() == text


def test_the_folder_is_made(tmp_path):
    assert card(tmp_path / "new" / "folder").text
