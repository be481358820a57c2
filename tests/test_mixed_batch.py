"""Rows of one batch through different adapters: each row as if its adapter were alone, in any order."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from lowrank import LoraConfig, get_peft_model, rows
from lowrank.errors import RowsError

NAMES = ["a", "b", "__base__", "wide", "dora", "biased", "a", "b", "b"]


class Every(nn.Module):
    """Every kind of layer that a mixed batch can go through, one after another."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.mix = nn.Conv1d(6, 10, 3, padding=2, dilation=2, groups=2)
        self.up = nn.Linear(10, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.up(x)))


def adapted() -> nn.Module:
    """Six adapters of different ranks, alphas and methods on the model above, in float64."""
    torch.manual_seed(0)
    targets = ["embed", "mix", "up", "head"]
    some = {"target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(Every().double(), LoraConfig(r=4, lora_alpha=6, **some), "a")
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=3, use_rslora=True, **some))
    model.add_adapter("wide", LoraConfig(r=5, lora_alpha=2, **some))
    model.add_adapter("dora", LoraConfig(r=3, use_dora=True, **some))
    biased = LoraConfig(
        r=2,
        lora_bias=True,
        init_lora_weights=False,
        target_modules=["up"],
        modules_to_save=["embed"],
    )
    with pytest.raises(ValueError, match="already"):  # the embedding has adapters: not saved whole
        model.add_adapter("biased", biased)
    model.add_adapter(
        "biased", LoraConfig(r=2, lora_bias=True, init_lora_weights=False, target_modules=["up"])
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise
    return model.eval()


def alone(model: nn.Module, name: str, ids: torch.Tensor) -> torch.Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(ids)
    model.set_adapter(name)
    return model(ids)


def test_each_row_is_as_if_its_adapter_were_alone():
    model, ids = adapted(), torch.randint(17, (len(NAMES), 5))
    with torch.no_grad():
        found = model(ids, adapter_names=NAMES)
        for i, name in enumerate(NAMES):
            torch.testing.assert_close(found[i], alone(model, name, ids[i : i + 1])[0])
        base = alone(model, "__base__", ids)
    moved = (found - base).abs().amax(dim=(1, 2))
    assert [bool(m > 1e-3) for m in moved] == [name != "__base__" for name in NAMES]


def test_linear_rows_against_the_merged_weight_in_float64():
    layer = adapted().base_model.model.up
    x = torch.randn(len(NAMES), 5, 10, dtype=torch.float64)
    with torch.no_grad(), layer.routing.route(NAMES):
        found = layer(x)
    W, b = layer.base_layer.weight, layer.base_layer.bias
    for i, name in enumerate(NAMES):
        if name == "__base__":
            truth = F.linear(x[i], W, b)
        else:
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            V = W + layer.scaling[name] * B @ A
            bias = b
            if name == "dora":
                m = layer.lora_magnitude_vector[name].weight
                V = m[:, None] * V / V.norm(dim=1, keepdim=True)
            if name == "biased":
                bias = b + layer.scaling[name] * layer.lora_B[name].bias
            truth = F.linear(x[i], V, bias)
        torch.testing.assert_close(found[i], truth)


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"] * 3,  # equally many rows each, not next to each other
        ["a", "a", "a", "b", "b", "b"],  # next to each other
        ["a", "b", "b", "b", "b", "b"],  # unequally many
        ["b", "__base__", "a", "__base__", "wide", "a"],
        ["__base__"] * 6,
    ],
    ids=" ".join,
)
def test_how_the_rows_fall_to_the_adapters_does_not_matter(names):
    model, ids = adapted(), torch.randint(17, (6, 5))
    with torch.no_grad():
        found = model(ids, adapter_names=names)
        order = torch.tensor([3, 1, 5, 0, 4, 2])
        again = model(ids[order], adapter_names=[names[i] for i in order])
        torch.testing.assert_close(again, found[order])
        for i, name in enumerate(names):
            torch.testing.assert_close(found[i], alone(model, name, ids[i : i + 1])[0])


def test_several_adapters_get_the_gradients_of_their_own_rows():
    model, ids = adapted(), torch.randint(17, (6, 5))
    names = ["a", "b", "a", "dora", "b", "__base__"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.set_requires_grad(["a", "b", "dora"])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    weights = torch.randn(6, 5, 5, dtype=torch.float64)
    (model(ids, adapter_names=names) * weights).sum().backward()
    found = {n: p.grad.clone() for n, p in trained.items()}
    for name in ["a", "b", "dora"]:
        model.zero_grad()
        mine = [i for i, other in enumerate(names) if other == name]
        (alone(model, name, ids[mine]) * weights[mine]).sum().backward()
        own = {n: p.grad for n, p in trained.items() if f".{name}" in n}
        assert own
        for key, gradient in own.items():
            torch.testing.assert_close(found[key], gradient)


def test_a_saved_module_runs_each_rows_own_copy():
    torch.manual_seed(0)
    plain = {"target_modules": ["up"], "init_lora_weights": False}
    model = get_peft_model(Every().double(), LoraConfig(modules_to_save=["head"], **plain), "a")
    model.add_adapter("b", LoraConfig(**plain))
    model.base_model.model.head.modules_to_save["a"].weight.data += 0.5
    names, ids = ["a", "b", "__base__", "a"], torch.randint(17, (4, 5))
    model.eval()
    with torch.no_grad():
        found = model(ids, adapter_names=names)
        for i, name in enumerate(names):
            torch.testing.assert_close(found[i], alone(model, name, ids[i : i + 1])[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_each_row_its_adapters_answer(beams):
    some = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, **some), "a")
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=16, **some))
    model.eval()
    names = ["b", "a", "__base__", "b"]
    ids = torch.randint(3, 40, (4, 6))
    how = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=names, **how)
    for i, name in enumerate(names):
        row = {
            "inputs": ids[i : i + 1],
            "attention_mask": torch.ones(1, 6, dtype=torch.long),
            **how,
        }
        if name == "__base__":
            with model.disable_adapter():
                truth = model.generate(**row)
        else:
            model.set_adapter(name)
            truth = model.generate(**row)
        assert found[i][: truth.shape[1]].tolist() == truth[0].tolist()


def test_nothing_is_left_switched_after_an_error():
    model, ids = adapted(), torch.randint(17, (2, 5))
    model.set_adapter("a")
    before = model(ids)
    with pytest.raises(IndexError), rows(model, ["b", "__base__"]):
        model.base_model(ids + 17)  # no such rows in the embedding
    torch.testing.assert_close(model(ids), before, rtol=0, atol=0)
    with pytest.raises(RowsError):
        model(ids, adapter_names=["a", "nobody"])
    torch.testing.assert_close(model(ids), before, rtol=0, atol=0)


def test_a_change_between_two_batches_is_seen():
    """What was stacked for one routing is not used for the next."""
    model, ids = adapted(), torch.randint(17, (2, 5))
    with torch.no_grad():
        first = model(ids, adapter_names=["a", "b"])
        model.base_model.model.up.lora_B["b"].weight.mul_(2)
        second = model(ids, adapter_names=["a", "b"])
    torch.testing.assert_close(second[0], first[0], rtol=0, atol=0)
    assert (second[1] - first[1]).abs().max() > 1e-3


def test_what_cannot_be_mixed_is_refused():
    model, ids = adapted(), torch.randint(17, (2, 5))
    with pytest.raises(RowsError, match=r"'nobdy'.*there are: a, b, wide, dora, biased"):
        model(ids, adapter_names=["a", "nobdy"])
    with pytest.raises(RowsError, match="1 names for a batch of 2 rows"):
        model(ids, adapter_names=["a"])
    with model.disable_adapter(), pytest.raises(RowsError, match="enable_adapter_layers"):
        model(ids, adapter_names=["a", "b"])
    model.merge_adapter(["a"])
    with pytest.raises(RowsError, match="unmerge_adapter"):
        model(ids, adapter_names=["a", "b"])
    model.unmerge_adapter()
    with rows(model, ["a", "b"]), pytest.raises(RowsError, match="does not divide"):
        model.base_model.model.up(torch.randn(3, 10, dtype=torch.float64))


def by_hand(layer, change, query, key, mask, padding):
    """Multi-head attention of one row in float64, (positions, width), with `change` in its projections."""
    W, heads = layer.in_proj_weight.double() + change[0], layer.num_heads
    parts = (query, key, key)
    q, k, v = (
        (x.double() @ w.T + b).view(len(x), heads, -1).transpose(0, 1)
        for x, w, b in zip(parts, W.chunk(3), layer.in_proj_bias.double().chunk(3), strict=True)
    )
    scores = q @ k.mT / q.shape[-1] ** 0.5 + mask
    p = scores.masked_fill(padding, -torch.inf).softmax(-1)  # (heads, positions, keys)
    out = layer.out_proj
    W = out.get_parameter("base_layer.weight" if hasattr(out, "base_layer") else "weight")
    bias = out.base_layer.bias if hasattr(out, "base_layer") else out.bias
    y = (p @ v).transpose(0, 1).flatten(1)
    return y @ (W.double() + change[1]).T + bias.double(), p


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_attention_knows_where_its_rows_are(batch_first, average):
    torch.manual_seed(0)
    base = nn.MultiheadAttention(6, 2, batch_first=batch_first, dtype=torch.float64)
    nn.init.normal_(base.in_proj_bias)
    nn.init.normal_(base.out_proj.bias)
    fields = {"init_lora_weights": False}
    model = get_peft_model(
        nn.Sequential(base), LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **fields), "a"
    )
    both = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "0.out_proj"], **fields)
    model.add_adapter("b", both)
    model.add_adapter("out", LoraConfig(r=1, target_modules=["0.out_proj"], **fields))
    layer = model.base_model.model[0]
    names = ["b", "a", "__base__", "out", "b"]
    query, key = torch.randn(5, 4, 6).double(), torch.randn(5, 3, 6).double()
    mask = torch.randn(5, 2, 4, 3).double()  # one for each head of each row
    padding = torch.zeros(5, 3, dtype=torch.bool)
    padding[1, 2] = padding[4, 0] = True

    def call(order):
        turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
        with rows(model, [names[i] for i in order]):
            y, p = layer(
                turn(query[order]),
                turn(key[order]),
                turn(key[order]),
                attn_mask=mask[order].flatten(0, 1),
                key_padding_mask=padding[order].double() * -1e9,
                average_attn_weights=average,
            )
        return turn(y), p

    truth = []
    for i, name in enumerate(names):
        change = [
            (one.scaling[name] * one.lora_B[name].weight @ one.lora_A[name].weight).detach()
            if name in one.r
            else 0
            for one in (layer, layer.get_base_layer().out_proj)
        ]
        truth.append(by_hand(layer.get_base_layer(), change, query[i], key[i], mask[i], padding[i]))
    for order in ([0, 1, 2, 3, 4], [3, 4, 0, 2, 1]):
        y, p = call(order)
        for i, row in enumerate(order):
            torch.testing.assert_close(y[i], truth[row][0])
            weights = truth[row][1]
            torch.testing.assert_close(p[i], weights.mean(0) if average else weights)
    before = layer(query, query, query)[0]
    with pytest.raises(RowsError, match="does not divide"), rows(model, ["a", "b"]):
        layer(query[:, :3], query[:, :3], query[:, :3])
    with pytest.raises(RowsError, match="is no batch"), rows(model, ["a", "b"]):
        layer(query[0], query[0], query[0])
    torch.testing.assert_close(layer(query, query, query)[0], before, rtol=0, atol=0)


def test_a_projection_that_is_adapted_alone_cannot_tell():
    """Its module takes the weight once, for all rows; only that module knows where they are."""
    model = get_peft_model(
        nn.Sequential(nn.MultiheadAttention(8, 2)), LoraConfig(target_modules=["out_proj"]), "a"
    )
    x, layer = torch.randn(3, 2, 8), model.base_model.model[0]
    with rows(model, ["a", "__base__"]), pytest.raises(RowsError, match="for all rows at once"):
        layer(x, x, x)
    with rows(model, ["a", "a"]):  # one weight will do
        found = layer(x, x, x)[0]
    assert torch.equal(found, layer(x, x, x)[0])
