"""The two files of an adapter: what is in them, what is refused, and that a crash leaves the old ones."""

import errno
import json
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import bits, llama, logits, randomise, same_bits

import lowrank
from lowrank import LoraConfig, PeftModel, adapter_file, get_peft_model
from lowrank.errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNameError,
    BaseMismatchError,
    ConfigError,
    UnknownFieldError,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapted(base=None, **options):
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **options}
    return randomise(get_peft_model(base or llama(layers=1), LoraConfig(**options)))


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and the model that it came from."""
    model = adapted()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    return folder, model


def header(folder):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return file.metadata()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is written ------------------------------------------------------------------------------


def test_the_files(saved):
    folder, model = saved
    assert sorted(contents(folder)) == ["README.md", CONFIG, WEIGHTS]
    assert same_bits(load_file(folder / WEIGHTS), lowrank.get_peft_model_state_dict(model))
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"]) == (3, 5)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert "runtime_config" not in config
    assert model.peft_config["default"].inference_mode is False


def test_read_adapter_is_what_write_adapter_was_given(tmp_path):
    tensors = {
        "base_model.model.a.lora_A.weight": torch.randn(3, 5),
        "base_model.model.a.lora_B.weight": torch.randn(5, 4).T,  # not contiguous
        "base_model.model.low": torch.randn(7).bfloat16(),
        "base_model.model.count": torch.tensor(12),
        "base_model.model.empty": torch.zeros(0, 3),
        "base_model.model.nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    config = LoraConfig(r=3, target_modules=["a"], rank_pattern={"b": 2}, task_type="CAUSAL_LM")
    adapter = lowrank.Adapter(config, tensors, {"run": {"seed": 3, "name": "é"}})
    lowrank.write_adapter(tmp_path / "new" / "folder", adapter)
    again = lowrank.read_adapter(tmp_path / "new" / "folder")
    assert again.config == config
    assert same_bits(again.tensors, tensors)
    assert again.metadata == adapter.metadata
    assert isinstance(again.config, LoraConfig)


def test_tensors_that_share_memory_are_written_each(tmp_path):
    whole = torch.randn(4, 6)
    tensors = {"a": whole, "b": whole, "c": whole[:2], "d": whole[2:]}
    lowrank.write_adapter(tmp_path, lowrank.Adapter(LoraConfig(), tensors, {}))
    assert same_bits(lowrank.read_adapter(tmp_path).tensors, tensors)


def test_our_metadata_is_beside_what_others_read(saved):
    folder, model = saved
    assert set(header(folder)) == {"format", "lowrank"}
    assert header(folder)["format"] == "pt"
    ours = json.loads(header(folder)["lowrank"])
    assert ours["versions"] == {"lowrank": lowrank.__version__, "torch": torch.__version__}
    assert ours["base"]["architecture"] == "LlamaForCausalLM"
    assert ours["base"]["model_type"] == "llama"
    weight = ours["base"]["weights"]["model.layers.0.self_attn.v_proj"]
    assert weight["shape"] == [12, 24]
    assert "run" not in ours
    model.run_settings = {"learning_rate": 1e-3, "data": "lines.jsonl"}
    model.save_pretrained(folder)
    assert lowrank.read_adapter(folder).metadata["run"] == model.run_settings


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_can_be_read_by_those_whom_the_umask_lets(tmp_path, umask):
    before = os.umask(umask)
    try:
        adapted().save_pretrained(tmp_path / "adapter")
    finally:
        os.umask(before)
    for path in (tmp_path / "adapter").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


def test_a_readme_is_never_overwritten(saved):
    folder, model = saved
    (folder / "README.md").write_text("mine")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_saving_in_the_base_dtype_keeps_it(tmp_path):
    base = llama(layers=1, dtype=torch.bfloat16)
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(llama(layers=1, dtype=torch.bfloat16), tmp_path)
    dtypes = {p.dtype for n, p in loaded.named_parameters() if "lora_" in n}
    assert dtypes == {torch.float32}


# --- several adapters, options --------------------------------------------------------------------


def two_adapters():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    return model


def test_default_goes_into_the_folder_and_others_into_folders_of_their_names(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path)
    assert sorted(contents_below(tmp_path)) == [
        "README.md",
        CONFIG,
        WEIGHTS,
        f"other/{CONFIG}",
        f"other/{WEIGHTS}",
    ]
    loaded = PeftModel.from_pretrained(llama(layers=1), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)
    loaded.load_adapter(tmp_path, "second", subfolder="other")
    loaded.set_adapter("second")
    model.set_adapter("other")
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)
    alone = PeftModel.from_pretrained(llama(layers=1), tmp_path, subfolder="other")
    torch.testing.assert_close(logits(alone), logits(model), atol=0, rtol=0)
    assert lowrank.read_adapter(tmp_path, subfolder="other").config.r == 2
    assert lowrank.PeftConfig.from_pretrained(tmp_path, subfolder="other").r == 2


def contents_below(folder):
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_selected_adapters(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert f"other/{WEIGHTS}" in contents_below(tmp_path)
    assert WEIGHTS not in contents_below(tmp_path)
    with pytest.raises(AdapterNameError, match="Did you mean 'other'"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["default", "othr"])
    assert not (tmp_path / "new").exists()


def test_other_processes_write_nothing(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_a_state_that_a_trainer_gathered_is_written(tmp_path):
    model = adapted()
    state = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    expected = {key: tensor * 2 for key, tensor in lowrank.get_peft_model_state_dict(model).items()}
    assert same_bits(load_file(tmp_path / WEIGHTS), expected)


def test_what_cannot_be_written_is_refused(tmp_path):
    model = adapted()
    with pytest.raises(ConfigError, match="pickle"):
        model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    with pytest.raises(AdapterFileError, match="not a saved adapter"):
        model.save_pretrained(
            tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path)
        )
    assert not (tmp_path / "adapter").exists()


# --- a crash while writing ------------------------------------------------------------------------


def full_disk(tensors, path, metadata=None):
    Path(path).write_bytes(b"half of i")
    raise OSError(errno.ENOSPC, "No space left on device")


def wrong_bits(tensors, path, metadata=None):
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, path, metadata)


def one_lost(tensors, path, metadata=None):
    save_file(dict(list(tensors.items())[1:]), path, metadata)


def other_dtype(tensors, path, metadata=None):
    save_file({key: tensor.float() for key, tensor in tensors.items()}, path, metadata)


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        (full_disk, OSError),
        (wrong_bits, AdapterFileError),
        (one_lost, AdapterFileError),
        (other_dtype, AdapterFileError),
    ],
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_writing_leaves_the_old_files(
    saved, tmp_path, monkeypatch, writer, error, existing
):
    folder, model = saved
    if not existing:
        folder = tmp_path / "new"
        folder.mkdir()
    before = contents(folder)
    monkeypatch.setattr(adapter_file, "save_file", writer)
    with pytest.raises(error):
        randomise(model).save_pretrained(folder)
    assert contents(folder) == before


def test_a_failure_while_writing_the_configuration_leaves_both_old_files(saved, monkeypatch):
    """New tensors beside an old configuration would be another adapter."""
    folder, _ = saved
    before = contents(folder)
    write = Path.write_text

    def full(self, *args, **kwargs):
        if CONFIG in self.name:
            write(self, "{")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        randomise(adapted(lora_alpha=7), seed=4).save_pretrained(folder)
    assert contents(folder) == before


def test_an_adapter_takes_the_place_of_another(saved):
    folder, _ = saved
    model = adapted(r=4, lora_alpha=7, target_modules=["up_proj"])
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(llama(layers=1), folder)
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)


# --- what is refused ------------------------------------------------------------------------------


def test_an_adapter_without_a_fingerprint_loads_with_one_line(saved, caplog):
    folder, model = saved
    lowrank.write_adapter(folder, lowrank.read_adapter(folder)._replace(metadata={}))
    assert set(header(folder)) == {"format"}
    loaded = PeftModel.from_pretrained(llama(layers=1), folder)
    assert len(caplog.records) == 1
    assert "could not be checked" in caplog.text
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)
    caplog.clear()
    PeftModel.from_pretrained(llama(layers=1), folder, check_base=False)
    assert not caplog.records


def test_a_fingerprint_that_fits_says_nothing(saved, caplog):
    PeftModel.from_pretrained(llama(layers=1), saved[0])
    assert not caplog.records


@pytest.mark.parametrize("name", ["with space", 'it\'s "quoted" $HOME `x` \\'])
def test_a_pickle_is_refused_and_the_command_in_the_error_converts_it(tmp_path, name):
    folder, model = tmp_path / name, adapted(modules_to_save=["lm_head"])
    model.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = torch.nn.Parameter(
        tensors["base_model.model.lm_head.weight"]
    )
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    base = llama(layers=1)
    before = bits(base)
    with pytest.raises(AdapterFileError, match="pickle") as error:
        PeftModel.from_pretrained(base, folder)
    assert same_bits(bits(base), before)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert f"{folder} holds a pickle" in str(error.value)
    assert "then load that folder" in str(error.value)
    command = str(error.value).splitlines()[-1]
    assert command.startswith("python -c ")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": path})
    loaded = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)


def cut(data):
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "damage", [cut, lambda data: b"", lambda data: b"\x00" * 100, lambda d: d[:4]]
)
def test_a_broken_safetensors_file(saved, damage):
    folder, _ = saved
    (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
    base = llama(layers=1)
    with pytest.raises(AdapterFileError, match="not a whole safetensors file"):
        PeftModel.from_pretrained(base, folder)
    assert not any("lora" in name for name, _ in base.named_modules())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_metadata_that_is_not_ours(saved):
    folder, _ = saved
    tensors = load_file(folder / WEIGHTS)
    for value in ("{", "[1]", '"text"'):
        save_file(tensors, folder / WEIGHTS, {"format": "pt", "lowrank": value})
        with pytest.raises(AdapterFileError, match="metadata"):
            lowrank.read_adapter(folder)


def test_a_missing_configuration(saved):
    folder, _ = saved
    (folder / CONFIG).unlink()
    with pytest.raises(AdapterFileError, match=rf"no {CONFIG}.*has: README.md, {WEIGHTS}"):
        PeftModel.from_pretrained(llama(layers=1), folder)
    with pytest.raises(OSError):
        PeftModel.from_pretrained(llama(layers=1), folder)


def test_missing_weights_and_folders(saved, tmp_path):
    folder, _ = saved
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match="neither"):
        PeftModel.from_pretrained(llama(layers=1), folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="It has: nothing"):
        PeftModel.from_pretrained(llama(layers=1), tmp_path / "empty")
    with pytest.raises(AdapterFileError, match="no folder here"):
        PeftModel.from_pretrained(llama(layers=1), tmp_path / "not there")
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(llama(layers=1), folder, subfolder="nope")


@pytest.mark.parametrize("text", ["{", "[]", "3", "", '"LORA"'])
def test_a_configuration_that_is_not_a_json_object(saved, text):
    folder, _ = saved
    (folder / CONFIG).write_text(text)
    with pytest.raises(AdapterFileError, match=CONFIG):
        PeftModel.from_pretrained(llama(layers=1), folder)


def change_config(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def test_unknown_keys_of_the_configuration(saved):
    folder, model = saved
    change_config(folder, lora_alfa=3, from_the_future={"x": 1})
    with pytest.raises(UnknownFieldError) as error:
        PeftModel.from_pretrained(llama(layers=1), folder)
    assert "'lora_alfa'. Did you mean 'lora_alpha'" in str(error.value)
    assert "'from_the_future'" in str(error.value)
    assert "ignore_unknown=True" in str(error.value)
    with pytest.warns(UserWarning, match="from_the_future, lora_alfa"):
        loaded = PeftModel.from_pretrained(llama(layers=1), folder, ignore_unknown=True)
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)
    with pytest.warns(UserWarning, match="from_the_future"):
        loaded.load_adapter(folder, "other", ignore_unknown=True)


def test_other_methods_and_features_are_refused(saved):
    folder, _ = saved
    change_config(folder, peft_type="LOHA")
    with pytest.raises(ConfigError, match="LoRA only"):
        PeftModel.from_pretrained(llama(layers=1), folder)
    change_config(folder, peft_type="LORA", megatron_config={"a": 1})
    with pytest.raises(ConfigError, match=r"adapter_config\.json: .*megatron_config"):
        PeftModel.from_pretrained(llama(layers=1), folder)


def test_a_changed_file_is_caught_by_what_it_does_not_fit(saved):
    folder, _ = saved
    change_config(folder, r=4)
    with pytest.raises(AdapterMismatchError, match=r"file \(3, 24\)   model \(4, 24\)"):
        PeftModel.from_pretrained(llama(layers=1), folder)
    change_config(folder, r=3, target_modules=["q_proj"])
    with pytest.raises(AdapterMismatchError, match="2 in the file but not in the model"):
        PeftModel.from_pretrained(llama(layers=1), folder)
    change_config(folder, target_modules=["q_proj", "v_proj"])
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(llama(layers=1, seed=5), folder)


def test_nothing_warns(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(llama(layers=1), saved[0])
