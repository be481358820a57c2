"""EVA on whole models: A against a principal component analysis of all inputs, recomputed in float64."""

import pytest
import tiny
import torch
from models import ConvNet
from torch import nn

from lowrank import LoraConfig
from lowrank.calibration.eva import (
    get_eva_state_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from lowrank.errors import InitDataError
from lowrank.init_config import EvaConfig

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def config(r=3, targets=TARGETS, **options):
    return LoraConfig(
        r=r,
        lora_alpha=5,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=EvaConfig(**options),
    )


def batches(n=3, rows=4, length=13, seed=0, labels=True):
    """Batches with padding on the right and prompts whose labels are masked."""
    torch.manual_seed(seed)
    found = []
    for _ in range(n):
        ids = torch.randint(3, 93, (rows, length))
        mask = torch.ones_like(ids)
        masked = ids.clone()
        for row in range(rows):
            mask[row, length - row :] = 0
            masked[row, : 1 + row] = -100
            masked[row, length - row :] = -100
        batch = {"input_ids": ids, "attention_mask": mask}
        found.append({**batch, "labels": masked} if labels else batch)
    return found


def inputs_of(model, path, data, counts):
    """The rows that the layer meets, (tokens, in), at the positions that `counts` of each batch."""
    rows = []
    module = model.get_submodule(path)
    with torch.no_grad():
        for batch in data:
            keep = counts(batch)
            handle = module.register_forward_hook(
                lambda m, args, y, keep=keep: rows.append(args[0][keep])
            )
            model(**batch)
            handle.remove()
    return torch.cat(rows).double()


def pca(X):
    X = X - X.mean(0)
    _, S, V = torch.linalg.svd(X, full_matrices=False)
    return S, V, S**2 / (X**2).sum()


def counted(batch):
    return batch["attention_mask"].bool() & (batch["labels"] != -100)


def same_directions(found, want):
    cosines = (found.double() * want).sum(1).abs() / found.double().norm(dim=1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-6, atol=0)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_directions_and_ranks_are_those_of_the_inputs(build):
    """One batch again and again: what is seen is that batch, and everything kept fits (2·r·rho ≥ in)."""
    model = build()
    targets = TARGETS if build is tiny.llama else ["c_attn", "c_fc", "c_proj"]
    data = batches(1, rows=9)
    settings = config(r=6, targets=targets, rho=2.0)
    found = get_eva_state_dict(model, data, settings)
    want = {path: pca(inputs_of(model, path, data, counted)) for path in found}
    pairs = [(float(v), path) for path, (_, _, ratio) in want.items() for v in ratio[:12]]
    chosen = sorted(pairs, key=lambda pair: -pair[0])[: 6 * len(found)]
    for path, A in found.items():
        # two layers with one input have equal ratios: which of them gets the last rank is open
        assert abs(len(A) - sum(1 for _, other in chosen if other == path)) <= 1
        same_directions(A, want[path][1][: len(A)])
    assert sum(map(len, found.values())) == 6 * len(found)
    assert len({len(A) for A in found.values()}) > 1


def test_without_redistribution_every_layer_keeps_r():
    found = get_eva_state_dict(tiny.llama(), batches(), config(rho=1.0))
    assert {tuple(A.shape) for A in found.values()} == {(3, 24), (3, 40)}


def test_several_batches_give_the_directions_of_all():
    model = tiny.llama()  # whose inputs, unlike random ones, have leading directions
    model.model.embed_tokens.weight.data *= 0.5 ** torch.arange(24)
    data = batches(4, rows=7)
    found = get_eva_state_dict(model, data, config(r=2, targets=["q_proj"], rho=1.0, tau=0.999))
    for path, A in found.items():
        _, V, _ = pca(inputs_of(model, path, data, counted))
        cosines = (A * V[:2]).sum(1).abs()
        assert cosines.min() > 0.97, path


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, counted),
        ({"use_label_mask": False}, lambda b: b["attention_mask"].bool()),
        ({"label_mask_value": 5}, lambda b: b["attention_mask"].bool() & (b["labels"] != 5)),
    ],
)
def test_padding_and_masked_labels_do_not_count(options, counts):
    model, data = tiny.llama(), batches(1, rows=9)
    found = get_eva_state_dict(model, data, config(r=2, rho=1.0, **options))
    for path, A in found.items():
        same_directions(A, pca(inputs_of(model, path, data, counts))[1][:2])


def test_whitened_directions_are_divided_once_also_where_layers_share_an_input():
    model, data = tiny.llama(), batches(1, rows=9)
    found = get_eva_state_dict(model, data, config(r=2, rho=1.0, whiten=True))
    for path, A in found.items():
        S, V, _ = pca(inputs_of(model, path, data, counted))
        same_directions(A, V[:2])
        seen = 2**0.5 * S[:2]  # the batch was taken in twice
        torch.testing.assert_close(A.norm(dim=1), seen.rsqrt())


def test_layers_with_one_input_are_looked_at_once():
    found = get_eva_state_dict(tiny.llama(), batches(), config(r=2, rho=1.0))
    layer = "model.layers.0.self_attn."
    assert torch.equal(found[f"{layer}q_proj"], found[f"{layer}v_proj"])


def test_rank_pattern_sets_the_budget_and_the_limit():
    settings = config(r=2, rho=1.5)
    settings.rank_pattern = {"down_proj": 6}
    found = get_eva_state_dict(tiny.llama(), batches(1, rows=9), settings)
    assert sum(map(len, found.values())) == 2 * (3 * 2 + 6)
    for path, A in found.items():
        assert len(A) <= (9 if path.endswith("down_proj") else 3)


def test_convolutions_meet_patches():
    torch.manual_seed(0)
    model = ConvNet().double()
    x = torch.randn(4, 3, 11, 9, dtype=torch.float64)
    found = get_eva_state_dict(
        model,
        [x],
        config(r=2, targets=["conv1", "head"], rho=1.0),
        forward_fn=lambda m, batch: m(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    )
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).movedim(1, 2).reshape(-1, 27)
    same_directions(found["conv1"], pca(patches)[1][:2])


def test_a_function_chooses_the_rows_of_one_layer():
    model, data = tiny.llama(), batches(1, rows=9)
    path = "model.layers.1.mlp.down_proj"
    functions = {path: lambda inputs, prepared, name: inputs[0][prepared][:11]}
    found = get_eva_state_dict(model, data, config(r=2, rho=1.0), prepare_layer_inputs_fn=functions)
    assert functions  # not eaten
    X = inputs_of(model, path, data, counted)[:11]
    same_directions(found[path], pca(X)[1][:2])
    other = "model.layers.0.self_attn.o_proj"  # without a function: every position
    X = inputs_of(model, other, data, lambda b: torch.ones_like(b["input_ids"]).bool())
    same_directions(found[other], pca(X)[1][:2])


def test_the_model_is_as_it_was():
    model, data = tiny.llama().train(), batches()
    before, state = tiny.bits(model), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(data, batch_size=None, shuffle=True)
    get_eva_state_dict(model, loader, config())
    assert tiny.same_bits(tiny.bits(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_iterator_that_can_be_read_once_will_do():
    with pytest.warns(UserWarning, match="have not settled to tau=1"):
        found = get_eva_state_dict(tiny.llama(), iter(batches(5)), config(tau=1.0))
    assert sum(map(len, found.values())) == 3 * len(found)


def refusal(data, settings=None, model=None, **arguments):
    with pytest.raises(InitDataError) as error:
        get_eva_state_dict(model or tiny.llama(), data, settings or config(), **arguments)
    return str(error.value)


def test_no_data_and_too_little():
    assert "dataloader is empty" in refusal([])
    few = [{"input_ids": torch.tensor([[1, 5]])}]
    assert "the data span 8 directions for 24 ranks" in refusal(few)
    masked = batches(1)
    masked[0]["labels"][:] = -100
    assert "the data span 0 directions" in refusal(masked)
    assert "needs peft_config" in refusal_without_config()


def refusal_without_config():
    with pytest.raises(InitDataError) as error:
        get_eva_state_dict(tiny.llama(), batches())
    return str(error.value)


def test_a_layer_that_is_never_called():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            return self.a(x)

    data = [{"x": torch.randn(30, 5)}]
    settings = config(targets=["a", "b"])
    assert "no data reached b" in refusal(data, settings, Half())


def test_values_that_are_not_finite():
    model = tiny.llama()
    model.model.embed_tokens.weight.data[7] = torch.nan
    data = [{"input_ids": torch.full((2, 9), 7)}]
    assert "layers.0.self_attn.q_proj is not finite" in refusal(data, model=model)


def test_inputs_whose_padding_cannot_be_known():
    data = [torch.randint(3, 93, (2, 9))]
    assert "not a mapping" in refusal(data)

    def flat(inputs, prepared, name):
        return prepare_layer_inputs_fn_language_modeling(inputs[0].flatten(0, 1), prepared, name)

    text = refusal(batches(), prepare_layer_inputs_fn=flat)
    assert "has an input (52, 24) for a mask (4, 13)" in text
    unknown = {"model.layers.0.mlp.down_prj": flat}
    assert "Did you mean 'model.layers.0.mlp.down_proj'" in refusal(
        batches(), prepare_layer_inputs_fn=unknown
    )


def test_which_positions_count():
    prepare = prepare_model_inputs_fn_language_modeling
    ids = torch.ones(2, 3, dtype=torch.long)
    assert prepare({"pixel_values": torch.rand(2, 3)}, config()) is None
    assert prepare({"input_ids": ids}, config()).all()
    classes = {"input_ids": ids, "labels": torch.tensor([-100, 1])}  # one label for each row
    assert prepare(classes, config()).all()
    x = torch.randn(2, 5)
    assert prepare_layer_inputs_fn_language_modeling((x,), ids.bool(), "pooler") is x
