"""diffusers and sentence-transformers, unmodified: the same program under the installed PEFT and under lowrank."""

import os
import shlex
from pathlib import Path

import programs
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
# diffusers' examples/dreambooth/train_dreambooth_lora.py, which its package does not contain
SCRIPT = os.environ.get("LOWRANK_DREAMBOOTH_SCRIPT", "")
LIBRARIES = ("peft", "lowrank")
AS_PEFT = """
import os, runpy, sys
import lowrank.compat
sys.argv, sys.path[0] = sys.argv[1:], os.path.dirname(sys.argv[1])
lowrank.compat.install(override=True)  # after that: it puts its folder first
import peft
assert peft.LoraConfig.__module__.startswith("lowrank"), peft.__file__
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def python(library: str, folder: Path, *arguments: object) -> None:
    """Runs a program in which `import peft` is answered by `library`."""
    way = ["-c", AS_PEFT] if library == "lowrank" else []
    done = programs.run(["python", *way, *map(str, arguments)], folder)
    assert done.returncode == 0, done.stderr[-3000:]


def results(program: str, folder: Path, *arguments: str) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for library in LIBRARIES:
        python(library, folder, HERE / program, *arguments, folder / library)
        found[library] = torch.load(folder / library / "found.pt")
    return found


def assert_same(found: dict[str, dict[str, torch.Tensor]], limit: float = 2e-5) -> None:
    theirs, ours = found["peft"], found["lowrank"]
    assert theirs.keys() == ours.keys()
    differences = {key: float((ours[key] - theirs[key]).abs().max()) for key in theirs}
    assert {key: d for key, d in differences.items() if d > limit} == {}


def assert_distinct(outputs: dict[str, torch.Tensor], *names: str) -> None:
    """No two of them are the same: what is compared is not nothing."""
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.allclose(outputs[one], outputs[other], atol=1e-3), (one, other)


@pytest.mark.interop
@pytest.mark.parametrize(
    "kind", ["sd", *(pytest.param(k, marks=pytest.mark.slow) for k in ("sdxl", "flux"))]
)
def test_diffusers_pipelines(kind: str, tmp_path: Path) -> None:
    found = results("diffusion.py", tmp_path, kind)
    assert_same(found)
    ours = found["lowrank"]
    assert_distinct(ours, "base", "loaded", "second", "both", "half", "fused")
    for state in ("disabled", "unloaded"):
        torch.testing.assert_close(ours[state], ours["base"], atol=2e-5, rtol=0)
    for state in ("whole again", "enabled"):
        torch.testing.assert_close(ours[state], ours["loaded"], atol=2e-5, rtol=0)
    alone = f"saved {'transformer' if kind == 'flux' else 'unet'} alone"
    torch.testing.assert_close(ours[alone], ours[f"{alone}, reloaded"], atol=2e-5, rtol=0)
    assert_distinct(ours, "base", alone)


@pytest.mark.slow
@pytest.mark.interop
@pytest.mark.parametrize("library", LIBRARIES)
def test_diffusers_hotswap_and_layerwise_casting(library: str, tmp_path: Path) -> None:
    python(library, tmp_path, HERE / "swapping.py", tmp_path / library)
    found = torch.load(tmp_path / library / "found.pt")
    assert_distinct(found, "first", "second", "half", "unloaded")
    assert found["compiled again"] == 0
    for same, as_loaded in (
        ("first, compiled", "first"),
        ("first again", "first"),
        ("second, compiled", "second, loaded"),
        ("second", "second, loaded"),
    ):
        torch.testing.assert_close(found[same], found[as_loaded], atol=2e-5, rtol=0)
    # in 8 bits the base is rounded, and the adapter acts as before
    off = {k: float((found[k] - found["in bfloat16"]).abs().mean()) for k in found if "cast" in k}
    assert off["loaded, then cast"] < 0.3 * off["cast"]
    assert torch.equal(found["loaded, then cast, again"], found["loaded, then cast"])
    if library == "lowrank":
        assert torch.equal(found["cast, then loaded"], found["loaded, then cast"])
        assert torch.equal(found["cast, then loaded, again"], found["loaded, then cast"])


@pytest.mark.interop
def test_sentence_transformers(tmp_path: Path) -> None:
    found = results("sentences.py", tmp_path)
    assert_same(found)
    ours = found["lowrank"]
    assert_distinct(ours, "base", "adapted", "trained")
    for state in ("disabled", "deleted"):
        assert torch.equal(ours[state], ours["base"])
    for state in ("loaded", "load_adapter"):
        torch.testing.assert_close(ours[state], ours["trained"])
    torch.testing.assert_close(ours["cross loaded"], ours["cross adapted"])
    assert_distinct(ours, "cross base", "cross adapted")


@pytest.mark.slow
@pytest.mark.interop
@pytest.mark.skipif(
    not SCRIPT,
    reason="LOWRANK_DREAMBOOTH_SCRIPT names no copy of diffusers' examples/dreambooth/train_dreambooth_lora.py",
)
@pytest.mark.parametrize("text_encoder", [False, True], ids=["unet", "unet and text encoder"])
def test_the_dreambooth_script(text_encoder: bool, tmp_path: Path) -> None:
    """Trains, checkpoints, resumes and saves under both libraries; their starts are not the same random numbers."""
    make = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import diffusers, diffusion, numpy
from PIL import Image
diffusion.sd(diffusers.DDPMScheduler).save_pretrained({str(tmp_path / "sd")!r})
Image.fromarray((numpy.arange(768).reshape(16, 16, 3) % 255).astype("uint8")).save(
    {str(tmp_path / "images" / "one.png")!r})
"""
    (tmp_path / "images").mkdir()
    python("peft", tmp_path, "-c", make)
    options = shlex.split(
        f"--pretrained_model_name_or_path {tmp_path}/sd --instance_data_dir {tmp_path}/images "
        "--instance_prompt 'a small red house' --resolution 16 --train_batch_size 1 --seed 3 "
        "--checkpointing_steps 2 --learning_rate 1e-2 --lr_warmup_steps 0"
    )
    options += ["--train_text_encoder"] * text_encoder
    saved = {}
    for library in LIBRARIES:
        out = tmp_path / library
        run = [HERE / "with_stand_ins.py", SCRIPT, *options, "--output_dir", out]
        python(library, tmp_path, *run, "--max_train_steps", 4)
        whole = load_file(out / "pytorch_lora_weights.safetensors")
        python(
            library, tmp_path, *run, "--max_train_steps", 6, "--resume_from_checkpoint", "latest"
        )
        assert (out / "checkpoint-6").is_dir()
        resumed = load_file(out / "pytorch_lora_weights.safetensors")
        assert all(tensor.any() for tensor in whole.values())  # B, too, has left zero
        assert all(not torch.equal(whole[key], resumed[key]) for key in whole)
        assert all((resumed[key] - whole[key]).abs().max() < 0.2 for key in whole)  # no new start
        saved[library] = {key: tensor.shape for key, tensor in resumed.items()}
    assert saved["lowrank"] == saved["peft"]
    assert any("text_encoder" in key for key in saved["lowrank"]) == text_encoder
