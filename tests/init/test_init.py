"""Start values: their distributions, shapes and dtype, and that B·A is zero where it must be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank.init import EMBEDDING_INITS, INITS, init_named

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


# --- those that look at W -------------------------------------------------------------------------

SHAPES = [(9, 14), (14, 9), (7, 7)]
EPS = torch.finfo(torch.float32).eps


def weight(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def looked(name, W, r, scaling):
    return init_named(name)(lambda: W, tuple(W.shape), r, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_pissa_is_the_r_largest_singular_triplets(shape, dtype, scaling):
    """Meng et al. 2024, eq. 2–5: A = √S_r·V_rᵀ, B = U_r·√S_r, W_res = U[r:]·S[r:]·V[r:]ᵀ = W − A·B."""
    W, r = weight(shape, dtype), 3
    found = looked("pissa", W, r, scaling)
    assert found.taken_out
    assert found.A.dtype == found.B.dtype == torch.float32
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    residual = U[:, r:] @ torch.diag(S[r:]) @ Vh[r:]
    A, B = found.A.double(), found.B.double()
    torch.testing.assert_close(W.double() - scaling * B @ A, residual, atol=40 * EPS, rtol=0)
    # the singular values shared equally, and nothing but them: signs of the vectors are free
    root = torch.diag(S[:r] / scaling)
    torch.testing.assert_close(A @ A.T, root, atol=40 * EPS, rtol=0)
    torch.testing.assert_close(B.T @ B, root, atol=40 * EPS, rtol=0)
    torch.testing.assert_close((A @ Vh[:r].T).abs(), root.sqrt(), atol=40 * EPS, rtol=0)


def test_pissa_niter_nears_the_exact_one_with_its_iterations():
    """Slowly falling singular values, the hard case: the residual's norm against the best there is."""
    U, V = (torch.linalg.qr(weight((n, 60), seed=n).double()).Q for n in (80, 60))
    S = 0.97 ** torch.arange(60.0, dtype=torch.float64)
    W, r = (U * S) @ V.T, 6
    best = S[r:].norm()
    excess = []
    for name in ("pissa_niter_0", "pissa_niter_2", "pissa_niter_16"):
        found = looked(name, W, r, 2.0)
        assert found.A.dtype == torch.float64
        excess.append(((W - 2.0 * found.B @ found.A).norm() / best - 1).item())
    assert excess[0] > excess[1] > excess[2] > -1e-12
    assert excess[2] < 1e-3


def test_pissa_niter_is_the_same_each_time_and_draws_no_numbers_of_others():
    W = weight((40, 30))
    state = torch.get_rng_state()
    one = looked("pissa_niter_2", W, 4, 1.0)
    torch.manual_seed(9)
    other = looked("pissa_niter_2", W.clone(), 4, 1.0)
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)
    torch.set_rng_state(state)
    looked("pissa_niter_2", W, 4, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_olora_is_the_first_part_of_the_qr_decomposition(shape, dtype):
    """Büyükakyüz 2024, Algorithm 1: B = Q[:, :r] orthonormal, A = R[:r] upper triangular."""
    W, r = weight(shape, dtype), 4
    found = looked("olora", W, r, 2.5)
    assert found.taken_out
    A, B = found.A.double(), found.B.double()
    assert not A.tril(-1).any()
    torch.testing.assert_close(B.T @ B, torch.eye(r).double(), atol=40 * EPS, rtol=0)
    Q, upper = torch.linalg.qr(W.double())
    torch.testing.assert_close(B @ A, Q[:, :r] @ upper[:r], atol=40 * EPS, rtol=0)
    # W's first r columns are nothing but those of B·A
    torch.testing.assert_close((B @ A)[:, :r], W.double()[:, :r], atol=40 * EPS, rtol=0)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora"])
def test_any_rank_up_to_the_full_one(name):
    W = weight((6, 9))
    for r in (1, 6):
        found = looked(name, W, r, 3.0)
        assert found.A.shape == (r, 9)
        assert found.B.shape == (6, r)
        assert found.A.is_contiguous()
    if name != "olora":
        torch.testing.assert_close(3.0 * found.B @ found.A, W, atol=1e-5, rtol=0)
