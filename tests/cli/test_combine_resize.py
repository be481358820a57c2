"""`lowrank combine` and `lowrank resize` as they are called."""

import json

import pytest
import tiny
import torch
from folders import tensors_of
from safetensors import SafetensorError

from lowrank import LoraConfig, get_peft_model, read_adapter
from lowrank.cli import main


@pytest.fixture
def folder(tmp_path):
    """Two adapters of one base and one of another, DoRA."""
    for i, (name, base_seed, fields) in enumerate(
        [
            ("a", 0, {"r": 3, "target_modules": ["q_proj", "up_proj"]}),
            ("b", 0, {"r": 4, "use_rslora": True, "target_modules": ["q_proj"]}),
            ("other", 7, {"r": 3, "target_modules": ["q_proj"]}),
            ("dora", 0, {"r": 3, "use_dora": True, "target_modules": ["q_proj"]}),
        ]
    ):
        config = LoraConfig(lora_alpha=5, task_type="CAUSAL_LM", **fields)
        model = get_peft_model(tiny.llama(seed=base_seed).float(), config)
        tiny.randomise(model, i + 1).save_pretrained(tmp_path / name)
    return tmp_path


def call(folder, *words):
    names = ("a", "b", "other", "dora", "out", "full")
    return main([str(folder / word) if word in names else word for word in words])


def delta(folder, path="model.layers.1.self_attn.q_proj"):
    adapter = read_adapter(folder)
    config, tensors = adapter.config, adapter.tensors
    A, B = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
    r, ending = A.shape[0], path.rpartition(".")[2]
    assert r == config.rank_pattern.get(ending, config.r)
    alpha = config.alpha_pattern.get(ending, config.lora_alpha)
    return alpha / (r**0.5 if config.use_rslora else r) * B @ A


def test_combine_writes_the_sum_and_says_what_it_costs(folder, capsys):
    words = ["combine", "a", "b", "out", "--weights", "0.7", "-0.3"]
    assert call(folder, *words, "--method", "linear") == 0
    shown = capsys.readouterr().out
    assert "ranks 3 to 7" in shown
    assert "error    none" in shown
    wanted = 0.7 * delta(folder / "a") - 0.3 * delta(folder / "b")
    torch.testing.assert_close(delta(folder / "out"), wanted, rtol=0, atol=1e-6)

    assert call(folder, *words, "--rank", "2", "--overwrite") == 0
    shown = capsys.readouterr().out
    U, S, Vh = torch.linalg.svd(wanted)
    best = U[:, :2] * S[:2] @ Vh[:2]
    torch.testing.assert_close(delta(folder / "out"), best, rtol=0, atol=1e-6)
    rows = [line.split() for line in shown.splitlines() if "proj" in line]
    assert len(rows) == 4
    lost = [float(row[-1].rstrip("%")) for row in rows]
    assert lost == sorted(lost, reverse=True)
    row = next(row for row in rows if row[0].endswith("1.self_attn.q_proj"))
    assert float(row[-1].rstrip("%")) / 100 == pytest.approx(
        (S[2:].norm() / S.norm()).item(), rel=0.05
    )
    assert row[1] == "2"
    assert "at the worst" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if str(folder) not in line)


def test_combine_as_json(folder, capsys):
    words = ["combine", "a", "b", "out", "--weights", "1", "1", "--method", "ties_svd", "--json"]
    assert call(folder, *words, "--density", "0.5", "--rank", "3") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["method"], result["weights"], result["density"]) == ("ties_svd", [1.0, 1.0], 0.5)
    assert result["params"] == sum(t.numel() for t in tensors_of(folder / "out").values())
    assert [row["r"] for row in result["layers"]] == [3] * 4
    assert 0 < result["error"] <= result["layers"][0]["error"] < 1


def test_a_method_on_the_factors_has_no_error_to_show(folder, capsys):
    words = ["combine", "a", "a", "out", "--weights", "1", "1", "--method", "ties"]
    assert call(folder, *words, "--density", "0.5") == 0
    assert "not known" in capsys.readouterr().out


def test_resize(folder, capsys):
    assert call(folder, "resize", "a", "out", "--rank", "2") == 0
    assert "over all layers" in capsys.readouterr().out
    M = delta(folder / "a")
    U, S, Vh = torch.linalg.svd(M)
    torch.testing.assert_close(delta(folder / "out"), U[:, :2] * S[:2] @ Vh[:2], rtol=0, atol=1e-6)
    assert call(folder, "resize", "a", "out", "--energy", "0.9", "--overwrite", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["energy"] == 0.9
    assert all(row["error"] ** 2 <= 0.1 for row in result["layers"])
    assert call(folder, "resize", "dora", "full", "--rank", "5") == 0  # it is smaller already
    assert "error    none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["combine", "a", "b", "out"], "--weights"),
        (["combine", "a", "b", "out", "--weights", "1"], "2 adapters need as many weights; 1"),
        (["combine", "out", "--weights", "1"], "OUT"),
        (
            ["combine", "a", "b", "out", "--weights", "1", "1", "--method", "tie"],
            "Did you mean 'ties'",
        ),
        (["combine", "a", "b", "out", "--weights", "1", "1", "--method", "ties"], "needs density"),
        (
            ["combine", "a", "b", "a", "--weights", "1", "1", "--overwrite"],
            "is read: name another folder",
        ),
        (["combine", "a", "b", "other", "--weights", "1", "1"], "exists. Name another"),
        (["combine", "a", "other", "out", "--weights", "1", "1"], "--any-base"),
        (["combine", "a", "dora", "out", "--weights", "1", "1"], "is DoRA"),
        (["combine", "a", "nothing", "out", "--weights", "1", "1"], "nothing"),
        (["resize", "a", "out"], "one of the arguments --rank --energy is required"),
        (["resize", "a", "out", "--rank", "0"], "at least 1"),
        (["resize", "a", "out", "--energy", "2"], "at most 1"),
    ],
)
def test_what_cannot_be_done_ends_with_2(folder, words, message, capsys):
    assert call(folder, *words) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_any_base_combines_all_the_same(folder):
    assert call(folder, "combine", "a", "other", "out", "--weights", "1", "1", "--any-base") == 0


def test_a_full_disk_leaves_nothing(folder, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("lowrank.adapter_file.save_file", full)
    assert call(folder, "resize", "a", str(folder / "new" / "out"), "--rank", "1") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (folder / "new").exists()
