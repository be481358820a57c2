"""The covariances that CorDA's preprocessing collects, recomputed in float64, and its files."""

import pytest
import tiny
import torch
from models import ConvNet
from safetensors.torch import load_file

from lowrank import LoraConfig
from lowrank.calibration.corda import preprocess_corda
from lowrank.errors import InitDataError
from lowrank.init.corda import decompose
from lowrank.init_config import CordaConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(r=3, targets=TARGETS, **options):
    return LoraConfig(
        r=r,
        target_modules=targets,
        init_lora_weights="corda",
        corda_config=CordaConfig(**options),
    )


def run(model):
    def runs():
        model(input_ids=tiny.IDS)
        model(input_ids=tiny.IDS[:2, :5])

    return runs


def covariance(model, path, runs):
    rows = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda m, args, y: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        runs()
    handle.remove()
    X = torch.cat(rows).double()
    return X.T @ X / len(X), len(X)


def prepared(model, **options):
    preprocess_corda(model, config(**options), run(model))
    return {path: m for path, m in model.named_modules() if hasattr(m, "eigens")}


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_components_are_those_of_the_inputs_seen(build, method):
    model = build().train()
    targets = TARGETS if build is tiny.llama else ["c_attn", "c_proj"]
    found = prepared(model, targets=targets, corda_method=method)
    assert len(found) == 6
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()
    for path, module in found.items():
        C, _ = covariance(model, path, run(model))
        W = module.weight.T if build is tiny.gpt2 else module.weight
        want = decompose(W, C, 3, method)
        torch.testing.assert_close(module.eigens.S_WC, want.S_WC, rtol=1e-6, atol=1e-9)
        ours = module.eigens.U_WC * module.eigens.S_WC @ module.eigens.V_WC.T
        theirs = want.U_WC * want.S_WC @ want.V_WC.T
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        assert not hasattr(module, "covariance_matrix")


def test_temporary_fields_stay_if_asked():
    model = tiny.llama()
    for path, module in prepared(model, prune_temporary_fields=False).items():
        C, count = covariance(model, path, run(model))
        torch.testing.assert_close(module.covariance_matrix, C)
        assert module.sample_count == count == 31


def test_float16_costs_precision_only():
    model = tiny.llama(dtype=torch.float32)
    found = prepared(model, use_float16_for_covariance=True, prune_temporary_fields=False)
    for path, module in found.items():
        C, _ = covariance(model, path, run(model))
        assert module.covariance_matrix.dtype == torch.float16
        torch.testing.assert_close(module.covariance_matrix.double(), C, rtol=4e-3, atol=1e-3)


def test_convolutions_are_taken_by_their_patches():
    torch.manual_seed(0)
    model = ConvNet().double()
    x = torch.randn(2, 3, 11, 9, dtype=torch.float64)
    settings = config(targets=["conv1"], prune_temporary_fields=False)
    preprocess_corda(model, settings, lambda: model(x))
    patches = torch.nn.functional.unfold(x, 3, padding=1, stride=2).movedim(1, 2).reshape(-1, 27)
    torch.testing.assert_close(model.conv1.covariance_matrix, patches.T @ patches / len(patches))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_are_written_once_and_read_after_that(tmp_path, suffix):
    files = {
        "cache_file": str(tmp_path / f"new/cache.{suffix}"),
        "covariance_file": str(tmp_path / f"C.{suffix}"),
    }
    model = tiny.llama()
    first = {path: module.eigens for path, module in prepared(model, **files).items()}
    before = {
        name: (tmp_path / name).read_bytes() for name in ("new/cache." + suffix, "C." + suffix)
    }
    for name in files:
        again = tiny.llama()
        preprocess_corda(again, config(**{name: files[name]}))  # without run_model
        for path, eigens in first.items():
            for mine, other in zip(again.get_submodule(path).eigens, eigens, strict=True):
                torch.testing.assert_close(mine, other)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    read = load_file if suffix == "safetensors" else torch.load
    assert len(read(files["covariance_file"])) == len(first)
    with pytest.raises(InitDataError, match=r"another model or configuration.*here \(4,\)"):
        preprocess_corda(tiny.llama(), config(r=4, cache_file=files["cache_file"]))
    more = config(targets=["q_proj", "v_proj"], covariance_file=files["covariance_file"])
    with pytest.raises(InitDataError, match=r"4 missing, model\.layers\.2"):
        preprocess_corda(tiny.llama(layers=4), more)


def test_another_model_can_be_watched():
    model, other = tiny.llama(), tiny.llama(seed=3)
    preprocess_corda(model, config(), run(other), hooked_model=other)
    path = "model.layers.1.mlp.down_proj"
    C, _ = covariance(other, path, run(other))
    want = decompose(model.get_submodule(path).weight, C, 3, "ipm")
    torch.testing.assert_close(model.get_submodule(path).eigens.S_WC, want.S_WC)
    assert not hasattr(other.get_submodule(path), "eigens")


def test_what_is_missing_is_said():
    model = tiny.llama()
    with pytest.raises(InitDataError, match="needs run_model"):
        preprocess_corda(model, config())
    with pytest.raises(InitDataError, match=r"no data reached model.layers.0.self_attn.q_proj, "):
        preprocess_corda(model, config(), lambda: None)
    with pytest.raises(InitDataError, match="needs a LoraConfig with init_lora_weights='corda'"):
        preprocess_corda(model, LoraConfig(target_modules=TARGETS), run(model))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(InitDataError, match=r"layers.1.mlp.down_proj: the covariance .* is zero"):
        preprocess_corda(model, config(), run(model))
    assert not any(hasattr(module, "eigens") for module in model.modules())


def test_an_error_of_the_run_leaves_no_hooks():
    model = tiny.llama().train()

    def fails():
        run(model)()
        raise KeyError("x")

    with pytest.raises(KeyError):
        preprocess_corda(model, config(), fails)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
