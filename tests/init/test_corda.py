"""CorDA's components against the paper's equations, recomputed in float64."""

import pytest
import torch

from lowrank.errors import InitDataError
from lowrank.init.corda import decompose, factors, invertible

OUT, IN, R, SCALING = 9, 13, 4, 2.5


def setting(out=OUT, in_=IN, n=200, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    W = torch.randn(out, in_, dtype=torch.float64)
    X = (
        torch.randn(in_, n, dtype=torch.float64)
        * torch.linspace(0.5, 2, in_, dtype=torch.float64)[:, None]
    )
    return W.to(dtype), X


def by_the_paper(W, C):
    U, S, Vh = torch.linalg.svd(W.double() @ C)
    return U, S, Vh @ torch.linalg.inv(C)


@pytest.mark.parametrize(("out", "in_"), [(OUT, IN), (IN, OUT)])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_components_are_those_of_the_paper(method, out, in_):
    W, X = setting(out, in_)
    C = X @ X.T
    A, B = factors(decompose(W, C, R, method), SCALING)
    U, S, V = by_the_paper(W, C)
    k = min(out, in_)
    chosen = range(R) if method == "ipm" else range(k - R, k)
    want = sum(S[i] * torch.outer(U[:, i], V[i]) for i in chosen)
    assert A.shape == (R, in_)
    assert B.shape == (out, R)
    torch.testing.assert_close(SCALING * B @ A, want, rtol=1e-8, atol=1e-10)
    # B = U√S and A = √S·Vᵀ·C⁻¹, for the C of mean diagonal 1
    unit = C.diagonal().mean()
    for row, i in enumerate(chosen):
        root = (S[i] / unit / SCALING).sqrt()
        torch.testing.assert_close(B[:, row].norm(), root, rtol=1e-8, atol=0)
        torch.testing.assert_close(A[row].norm(), root * V[i].norm() * unit, rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_the_rest_is_the_best_or_least_needed_approximation_of_the_outputs(method):
    """‖(W − component)·C‖ is what is left of W·C's singular values: Eckart–Young on W·C."""
    W, X = setting()
    C = X @ X.T
    A, B = factors(decompose(W, C, R, method), SCALING)
    S = torch.linalg.svdvals(W @ C)
    left = S[R:] if method == "ipm" else S[:-R]
    error = torch.linalg.norm((W - SCALING * B @ A) @ C)
    assert error == pytest.approx(left.square().sum().sqrt().item(), rel=1e-8)


def test_the_factor_of_the_covariance_changes_nothing():
    W, X = setting()
    C = X @ X.T
    one, other = (factors(decompose(W, c, R, "ipm"), SCALING) for c in (C, 1e-7 * C))
    torch.testing.assert_close(one[0].abs(), other[0].abs())
    torch.testing.assert_close(one[1].abs(), other[1].abs())


def test_with_white_inputs_it_is_pissa():
    W, _ = setting()
    A, B = factors(decompose(W, 3 * torch.eye(IN), R, "ipm"), 1.0)
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(B @ A, (U[:, :R] * S[:R]) @ Vh[:R])
    torch.testing.assert_close(A.norm(dim=1), S[:R].sqrt())
    torch.testing.assert_close(B.norm(dim=0), S[:R].sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_weights_give_float32(dtype):
    W, X = setting(dtype=dtype)
    C = X @ X.T
    eigens = decompose(W, C.float(), R, "kpm")
    assert {t.dtype for t in eigens} == {torch.float32}
    A, B = factors(eigens, SCALING)
    U, S, V = by_the_paper(W, C)
    want = (U[:, OUT - R : OUT] * S[OUT - R :]) @ V[OUT - R : OUT]
    torch.testing.assert_close((SCALING * B @ A).double(), want, rtol=1e-3, atol=1e-4)


def test_an_invertible_covariance_is_left_as_it_is():
    _, X = setting()
    C = X @ X.T
    found = invertible(C)
    torch.testing.assert_close(found, C / C.diagonal().mean())


def test_a_singular_covariance_gets_the_first_ridge_that_suffices():
    _, X = setting(n=5)  # rank 5 of 13
    C = X @ X.T
    found = invertible(C)
    unit = C / C.diagonal().mean()
    ridge = (found - unit).diagonal()
    torch.testing.assert_close(ridge, torch.full_like(ridge, 0.01))
    assert torch.dist(found.float() @ found.float().inverse(), torch.eye(IN)) < 0.05
    W, _ = setting()
    A, B = factors(decompose(W, C, R, "kpm"), SCALING)
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()


@pytest.mark.parametrize("C", [torch.zeros(3, 3), torch.full((3, 3), torch.nan)])
def test_no_covariance_at_all_is_an_error(C):
    with pytest.raises(InitDataError, match="zero or not finite"):
        invertible(C)
