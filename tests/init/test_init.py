"""Start values: their distributions, shapes and dtype, and that B·A is zero where it must be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank.init import EMBEDDING_INITS, INITS

OUT, IN, R = 300, 700, 6
RANDOM = [True, False, "gaussian", "orthogonal"]


def no_read():
    raise AssertionError("these do not look at W")


def start(name, r=R, out=OUT, in_=IN, table=INITS):
    return table[name](no_read, (out, in_), r, 2.0)


@pytest.mark.parametrize("table", [INITS, EMBEDDING_INITS], ids=["layers", "embeddings"])
@pytest.mark.parametrize("name", RANDOM, ids=str)
@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_shapes_and_dtype(name, table, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = start(name, table=table)
    finally:
        torch.set_default_dtype(before)
    assert found.A.shape == (R, IN)
    assert found.B.shape == (OUT, R)
    assert found.A.dtype == found.B.dtype == torch.float32
    assert found.A.is_contiguous()
    assert not found.taken_out


def test_true_is_kaimings_uniform_and_zero():
    """Hu et al.'s code: as nn.Linear starts, uniform in ±1/√in."""
    found = start(True)
    bound = 1 / math.sqrt(IN)
    assert found.A.abs().max() <= bound
    assert found.A.abs().max() > 0.99 * bound
    assert found.A.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(found.A.mean()) < 0.05 * bound
    assert not found.B.any()


def test_true_is_drawn_as_nn_linear_draws():
    torch.manual_seed(3)
    linear = nn.Linear(IN, R, bias=False)
    torch.manual_seed(3)
    assert torch.equal(start(True).A, linear.weight)


def test_gaussian_has_deviation_one_over_r():
    found = start("gaussian")
    assert found.A.std() == pytest.approx(1 / R, rel=0.05)
    assert not found.B.any()


def test_false_gives_a_change_that_is_not_zero():
    found = start(False)
    assert found.A.abs().max() <= 1 / math.sqrt(IN)
    assert found.B.abs().max() <= 1 / math.sqrt(R)
    assert (found.B @ found.A).abs().max() > 0


@given(r=st.integers(1, 12).map(lambda i: 2 * i), seed=st.integers(0, 1000))
def test_orthogonal_has_neither_zero_but_their_product(r, seed):
    torch.manual_seed(seed)
    found = start("orthogonal", r=r, out=40, in_=30)
    assert found.A.abs().max() > 0
    assert found.B.abs().max() > 0
    product = found.B.double() @ found.A.double()
    assert product.abs().max() < 1e-5 * found.A.abs().max() * found.B.abs().max() * r
    # every row of B is orthogonal to every column of A, within the rank's r dimensions
    assert torch.linalg.matrix_rank(found.A) == min(r // 2, 30)
    assert torch.linalg.matrix_rank(found.B) == min(r // 2, 40)


def test_orthogonal_has_pefts_size():
    """Entries with deviation 1/10: each a sum over r/2 of normal numbers times orthonormal rows, over 10."""
    found = start("orthogonal", r=64)
    assert found.A.std() == pytest.approx(0.1 * math.sqrt(0.5), rel=0.05)
    assert found.B.std() == pytest.approx(0.1 * math.sqrt(0.5), rel=0.05)


@pytest.mark.parametrize("name", [True, "gaussian"], ids=str)
def test_an_embeddings_table_starts_at_zero(name):
    found = start(name, table=EMBEDDING_INITS)
    assert not found.A.any()
    assert found.B.std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("name", RANDOM, ids=str)
def test_two_draws_differ_and_a_seed_repeats(name):
    torch.manual_seed(1)
    one, other = start(name), start(name)
    torch.manual_seed(1)
    again = start(name)
    assert torch.equal(one.A, again.A)
    assert torch.equal(one.B, again.B)
    assert not torch.equal(one.A, other.A)


@pytest.mark.interop
@pytest.mark.parametrize("name", [True, "gaussian", "orthogonal"])
def test_the_sizes_are_pefts(name):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Embedding(IN, OUT))
    config = peft.LoraConfig(r=R, target_modules=["0", "1"], init_lora_weights=name)
    model = peft.inject_adapter_in_model(config, model)
    linear, embedding = model
    theirs = [(INITS, linear.lora_A["default"].weight, linear.lora_B["default"].weight)]
    if name != "orthogonal":  # which PEFT leaves out for embeddings
        A, B = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
        theirs.append((EMBEDDING_INITS, A, B))
    for table, A, B in theirs:
        found = table[name](no_read, (OUT, IN), R, 2.0)
        assert found.A.std() == pytest.approx(A.std().item(), rel=0.1)
        assert found.B.std() == pytest.approx(B.std().item(), rel=0.1)
