"""The incremental SVD against a full one in float64, and how ranks are shared out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank.init.eva import IncrementalSVD, directions, redistribute, similarity


def rows(n, width, seed=0, dtype=torch.float64, rank=None, decay=0.8):
    """Correlated rows with a mean far from zero, whose variances fall by `decay` from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    k = rank or width
    Q = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    scales = decay ** torch.arange(k, dtype=torch.float64)
    X = torch.randn(n, k, generator=generator, dtype=torch.float64) * scales @ Q[:k]
    return (X + 3 * torch.randn(width, generator=generator, dtype=torch.float64)).to(dtype)


def pca(X):
    """(S, V, ratio) of all rows at once, in float64."""
    X = X.double() - X.double().mean(0)
    _, S, V = torch.linalg.svd(X, full_matrices=False)
    return S, V, S**2 / (X**2).sum()


def fed(X, components, sizes):
    svd = IncrementalSVD(X.shape[1], components)
    for part in X.split(sizes):
        svd.update(part)
    return svd


@given(
    width=st.integers(2, 23),
    components=st.integers(1, 9),
    batch=st.integers(1, 40),
    n=st.integers(2, 150),
)
def test_nothing_is_lost_when_what_is_kept_spans_the_rows(width, components, batch, n):
    X = rows(n, width, rank=min(components, width))
    svd = fed(X, components, batch)
    S, V, ratio = pca(X)
    k = min(components, width, n - 1)
    if k == 0 or svd.rank < 1:
        return
    assert svd.rows == n
    torch.testing.assert_close(svd.mean, X.mean(0))
    torch.testing.assert_close(svd.S[:k], S[:k], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(svd.explained_variance_ratio[:k], ratio[:k], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(  # signs aside, and the last ones may be degenerate
        svd.V[:1].abs(), V[:1].abs(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [17, 300, 2000])
def test_the_wanted_components_are_those_of_all_rows(dtype, batch):
    X = rows(2000, 37, dtype=dtype)
    svd = fed(X, 5, batch)
    S, V, ratio = pca(X)
    tolerance = 2e-4 if batch == 17 else 1e-4
    assert similarity(svd.V[:5].double(), V[:5]).min() > 1 - tolerance
    torch.testing.assert_close(svd.S[:5].double(), S[:5], rtol=1e-3, atol=0)
    torch.testing.assert_close(svd.explained_variance_ratio, ratio[:5], rtol=2e-3, atol=0)
    assert svd.V.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_memory_is_bounded_by_the_components_not_the_rows():
    svd = fed(rows(3000, 50), 4, 1000)
    assert svd.V.shape == (8, 50)
    assert svd.S.shape == (8,)


def test_signs_do_not_depend_on_the_batches():
    X = rows(400, 11)
    one, other = fed(X, 4, 100).V[:4], fed(X, 4, 57).V[:4]
    assert ((one * other).sum(1) > 0.99).all()
    assert (one.gather(1, one.abs().argmax(1, keepdim=True)) > 0).all()


def test_rows_that_span_less_give_fewer_components():
    svd = fed(rows(60, 12, rank=3), 6, 20)
    assert svd.rank == 3
    assert len(svd.explained_variance_ratio) == 3
    assert svd.explained_variance_ratio.sum() == pytest.approx(1)
    constant = fed(torch.ones(9, 4), 2, 3)
    assert constant.rank == len(constant.explained_variance_ratio) == 0


def test_similarity_ignores_signs_and_counts_new_rows_as_different():
    V = torch.eye(3)[:2]
    assert similarity(-V, V).tolist() == [1, 1]
    assert similarity(V, V[:1]).tolist() == [1, 0]


def test_directions_are_whitened_over_the_root_of_the_singular_value():
    svd = fed(rows(100, 7), 3, 40)
    plain, white = directions(svd, 2, False), directions(svd, 2, True)
    torch.testing.assert_close(plain, svd.V[:2])
    torch.testing.assert_close(white * svd.S[:2, None].sqrt(), svd.V[:2])
    assert plain.data_ptr() != svd.V.data_ptr()


def test_ranks_go_to_what_explains_most():
    ratios = {
        "a": torch.tensor([0.5, 0.2, 0.1, 0.05]),
        "b": torch.tensor([0.9, 0.04]),
        "c": torch.tensor([0.03, 0.02]),
    }
    assert redistribute(ratios, 5) == {"a": 4, "b": 1, "c": 0}
    assert redistribute(ratios, 7) == {"a": 4, "b": 2, "c": 1}
    assert redistribute(ratios, 99) == {"a": 4, "b": 2, "c": 2}
    assert redistribute({}, 3) == {}


@given(
    seed=st.integers(0, 99),
    layers=st.integers(1, 8),
    r=st.integers(1, 9),
    rho=st.floats(1, 4),
)
def test_the_budget_is_kept(seed, layers, r, rho):
    torch.manual_seed(seed)
    most = round(r * rho)
    ratios = {str(i): torch.rand(most).sort(descending=True).values for i in range(layers)}
    ranks = redistribute(ratios, layers * r)
    assert sum(ranks.values()) == layers * r
    assert max(ranks.values()) <= most
    chosen = [float(v) for n, values in ratios.items() for v in values[: ranks[n]]]
    left = [float(v) for n, values in ratios.items() for v in values[ranks[n] :]]
    assert min(chosen, default=1) >= max(left, default=0)


def test_equal_inputs_get_equal_ranks_as_far_as_the_budget_allows():
    values = torch.tensor([0.5, 0.3, 0.2])
    assert redistribute({"q": values, "k": values, "v": values}, 7) == {"q": 3, "k": 2, "v": 2}
