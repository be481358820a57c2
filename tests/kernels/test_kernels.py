"""Each fast path against its plain reference: forward and backward, odd sizes, uninitialised memory full of NaN."""

import pytest
import torch

from lowrank.kernels.dropout_linear import dropout_linear, dropout_linear_reference
from lowrank.kernels.low_rank_add import (
    bfloat16_factors,
    low_rank_add,
    low_rank_add_bfloat16_,
    low_rank_add_reference,
    low_rank_weight,
    low_rank_weight_reference,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(1, 7), (3, 5, 7), (2, 1, 3, 7), (7,)]


@pytest.fixture(autouse=True)
def _memory_full_of_nan():
    """Fresh memory is NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def backward(y: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return list(torch.autograd.grad(y, leaves, weights))


def assert_near(found: torch.Tensor, meant: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    error = (found.double() - meant.double()).norm() / meant.double().norm().clamp_min(1e-30)
    assert error < TOLERANCE[dtype], float(error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 2, 7)], ids=str)
def test_low_rank_add(shape, dtype):
    out, r, scaling = 11, 3, 1.7
    y, h = leaf(*shape[:-1], out, dtype=dtype), leaf(*shape[:-1], r, dtype=dtype)
    B = leaf(out, r, dtype=dtype)
    found = low_rank_add(y, h, B, scaling)
    exact = [t.detach().double().requires_grad_() for t in (y, h, B)]
    meant = low_rank_add_reference(*exact, scaling)
    assert_near(found, meant, dtype)
    for ours, theirs in zip(backward(found, y, h, B), backward(meant, *exact), strict=True):
        assert_near(ours, theirs, dtype)


def test_low_rank_add_leaves_y_alone():
    y = torch.ones(2, 3)
    low_rank_add(y, torch.ones(2, 1), torch.ones(3, 1), 1.0)
    assert torch.equal(y, torch.ones(2, 3))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_linear_has_the_reference_numbers_from_the_same_random_state(shape, p, dtype):
    x, A = leaf(*shape, dtype=dtype), leaf(3, shape[-1], dtype=dtype)
    torch.manual_seed(5)
    found = dropout_linear(x, A, p)
    torch.manual_seed(5)
    meant = dropout_linear_reference(x, A, p)
    torch.manual_seed(5)
    mask = torch.nn.functional.dropout(torch.ones_like(x), p).double()  # 0 or 1 / (1 − p)
    assert torch.equal(found, meant)
    assert_near(found, (x.double() * mask) @ A.double().T, dtype)
    exact_x, exact_A = (t.detach().double().requires_grad_() for t in (x, A))
    truth = backward((exact_x * mask) @ exact_A.T, exact_x, exact_A)
    for ours, theirs in zip(backward(found, x, A), truth, strict=True):
        assert_near(ours, theirs, dtype)


def test_dropout_linear_keeps_a_byte_an_entry_beside_x():
    x, A = leaf(64, 96, dtype=torch.float32), leaf(4, 96, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout_linear(x, A, 0.1)
    own = {x.data_ptr(), A.data_ptr()}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) == x.numel()


def test_dropout_linear_under_autocast_computes_in_the_lower_dtype():
    x, A = leaf(4, 6, dtype=torch.float32), leaf(2, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        h = dropout_linear(x, A, 0.5)
    assert h.dtype == torch.bfloat16
    grads = backward(h, x, A)
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("experts", [(), (3,)], ids=str)
def test_low_rank_weight(experts, transposed, dtype):
    """A and B in float32 on a weight of another dtype, whose order in memory the result has."""
    narrow = dtype if dtype == torch.float64 else torch.float32
    W = leaf(*experts, *((7, 11) if transposed else (11, 7)), dtype=dtype)
    A, B = leaf(*experts, 2, 7, dtype=narrow), leaf(*experts, 11, 2, dtype=narrow)
    found = low_rank_weight(W.mT if transposed else W, A, B)
    assert (found.mT if transposed else found).is_contiguous()
    exact = [t.detach().double().requires_grad_() for t in (W, A, B)]
    meant = low_rank_weight_reference(exact[0].mT if transposed else exact[0], *exact[1:])
    assert_near(found, meant, dtype)
    for ours, theirs in zip(backward(found, W, A, B), backward(meant, *exact), strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < TOLERANCE[dtype]
    with torch.autocast("cpu", torch.bfloat16):
        assert low_rank_weight(W.mT if transposed else W, A, B).dtype == dtype


def test_a_matrix_is_rounded_once():
    """A and B as they are, and not as bfloat16 has them."""
    W = leaf(11, 7, dtype=torch.bfloat16)
    A, B = leaf(2, 7, dtype=torch.float32), leaf(11, 2, dtype=torch.float32)
    meant = W.double() + B.double() @ A.double()
    assert torch.equal(low_rank_weight(W, A, B), meant.bfloat16())
    g = torch.randn(11, 7).bfloat16()
    low_rank_weight(W, A, B).backward(g)
    exact = B.detach().double().mT @ g.double(), g.double() @ A.detach().double().mT
    for found, gradient in zip((A.grad, B.grad), exact, strict=True):
        assert (found.double() - gradient).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize(("out", "in_"), [(1, 5), (3, 7), (513, 70), (64, 1)])
@pytest.mark.parametrize("r", [1, 3, 16])
def test_low_rank_add_bfloat16_(out, in_, r):
    """As near to float64 as bfloat16's own spacing allows, but for 2⁻¹⁶ of the products."""
    A, B = torch.randn(r, in_), torch.randn(out, r) * 0.003
    W = (torch.randn(out, in_) * 0.02).bfloat16()
    exact = W.double() + B.double() @ A.double()
    found = low_rank_add_bfloat16_(W.clone(), *bfloat16_factors(A, B))
    assert found.dtype == torch.bfloat16
    excess = (found.double() - exact).abs() - (exact.bfloat16().double() - exact).abs()
    assert excess.max() <= 2**-16 * (B.abs().double() @ A.abs().double()).max()


def test_low_rank_add_bfloat16_tells_what_is_not_finite():
    A, B = torch.randn(2, 5), torch.randn(3, 2)
    B[1, 0] = 3.4e38  # more than bfloat16 holds
    found = low_rank_add_bfloat16_(torch.zeros(3, 5).bfloat16(), *bfloat16_factors(A, B))
    assert not found[1].isfinite().any()
    assert found[0].isfinite().all()
