"""The mathematics of one adapter, against the formulas written out in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank.errors import ShapeError
from lowrank.lora import (
    Lora,
    check_shapes,
    delta_norm,
    delta_weight,
    initial_magnitude,
    merged_weight,
    merged_weight_norm,
    scaling_for,
    weight_change,
)


def example(out=5, in_=7, r=3, scaling=0.7, dora=False, dtype=torch.float32, experts=()):
    W = torch.randn(*experts, out, in_).to(dtype)
    A, B = torch.randn(*experts, r, in_), torch.randn(*experts, out, r)
    m = torch.rand(*experts, out) + 0.5 if dora else None
    return W, Lora(A, B, scaling, m)


def truth(W, lora):
    """W′ by the papers' formulas, in float64."""
    V = W.double() + lora.scaling * lora.B.double() @ lora.A.double()
    if lora.magnitude is None:
        return V
    return lora.magnitude.double()[..., None] * V / (V * V).sum(-1, keepdim=True).sqrt()


def test_scaling_is_alpha_over_r_and_with_rslora_alpha_over_its_root():
    assert scaling_for(12, 3, False) == 4
    assert scaling_for(12, 9, True) == 4
    assert scaling_for(5, 3, True) == pytest.approx(5 / math.sqrt(3), rel=1e-15)


def test_delta_weight_is_scaling_times_B_times_A():
    A = torch.tensor([[1.0, 2, 3], [0, 1, 0]])
    B = torch.tensor([[1.0, 0], [0, 1], [2, -1], [0, 0]])
    expected = torch.tensor([[1.0, 2, 3], [0, 1, 0], [2, 3, 6], [0, 0, 0]]) * 1.5
    assert torch.equal(delta_weight(Lora(A, B, 1.5)), expected)


@pytest.mark.parametrize("experts", [(), (3,)])
@pytest.mark.parametrize("nearly", [1.0, 1e-3, 1e-6])
def test_delta_norm_is_the_norm_of_the_change(experts, nearly):
    """Also of factors that nearly cancel, as those of an adapter less its start do."""
    _, lora = example(scaling=-0.7, experts=experts)
    A = torch.cat([lora.A, lora.A + nearly * torch.randn_like(lora.A)], dim=-2)
    lora = lora._replace(A=A, B=torch.cat([lora.B, -lora.B], dim=-1))
    change = 0.7 * lora.B.double() @ lora.A.double()
    norm, bound = delta_norm(lora)
    assert norm == pytest.approx(change.norm().item(), rel=2e-3)
    assert change.abs().max() <= norm * 1.001
    assert norm <= bound * (1 + 1e-6)
    assert delta_norm(lora._replace(B=torch.zeros_like(lora.B))) == (0.0, 0.0)
    huge = lora._replace(A=lora.A * 2.0**90, B=lora.B * 2.0**90)  # float32 has no such squares
    assert delta_norm(huge)[0] == pytest.approx(change.norm().item() * 2.0**180, rel=2e-3)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("experts", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merged_weight_is_the_exact_one_rounded_once(dtype, experts, dora):
    W, lora = example(dora=dora, dtype=dtype, experts=experts)
    merged, exact = merged_weight(W, lora), truth(W, lora)
    assert merged.dtype == dtype
    assert merged.shape == W.shape
    half_ulp = torch.finfo(dtype).eps / 2 * exact.abs()
    slack = 0 if dtype == torch.float64 else 4e-6  # the float32 sum before the rounding
    assert ((merged.double() - exact).abs() <= half_ulp + slack + 1e-14).all()


def test_merged_weight_is_a_new_tensor():
    W, lora = example()
    before = W.clone()
    merged_weight(W, lora).zero_()
    assert torch.equal(W, before)


def test_low_precision_factors_are_multiplied_in_float32():
    W, lora = example(out=4, in_=6, r=5)
    low = Lora(lora.A.bfloat16(), lora.B.bfloat16(), lora.scaling)
    assert delta_weight(low).dtype == torch.float32
    torch.testing.assert_close(delta_weight(low).double(), truth(W * 0, low), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_weight_change_is_the_merged_weight_minus_W(dora):
    W, lora = example(dora=dora, dtype=torch.float64)
    expected = truth(W, lora) - W
    torch.testing.assert_close(weight_change(W, lora), expected, rtol=1e-6, atol=1e-6)


def test_the_gradient_takes_doras_norm_as_a_constant():
    W, lora = example(dora=True, dtype=torch.float64)
    lora = Lora(
        *(t.double().requires_grad_() for t in (lora.A, lora.B)),
        0.7,
        lora.magnitude.double().requires_grad_(),
    )
    g = torch.randn(5, 7, dtype=torch.float64)
    found = torch.autograd.grad(
        (merged_weight(W, lora) * g).sum(), (lora.A, lora.B, lora.magnitude)
    )
    A, B, m = (t.detach() for t in (lora.A, lora.B, lora.magnitude))
    V = W + 0.7 * B @ A
    norm = V.norm(dim=1, keepdim=True)
    dV = m[:, None] / norm * g  # dL/dV with the norm held
    expected = 0.7 * B.T @ dV, 0.7 * dV @ A.T, (g * V / norm).sum(1)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(
    out=st.integers(1, 9),
    in_=st.integers(1, 9),
    r=st.integers(1, 12),
    scaling=st.floats(-3, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_merged_weight_norm_is_the_norm_of_the_rows(out, in_, r, scaling, dtype):
    torch.manual_seed(out * 100 + in_ * 10 + r)
    W, lora = example(out, in_, r, scaling, dtype=dtype)
    exact = truth(W, lora).norm(dim=-1)
    # the sum of squares can cancel: exact to the size of its terms, not of its result
    terms = W.double().norm(dim=-1) + abs(scaling) * (
        lora.B.double().abs() @ lora.A.double().norm(dim=-1)
    )
    found = merged_weight_norm(W, lora)
    assert found.shape == (out,)
    off = (found.double().square() - exact.square()).abs()
    assert (off <= 1e-5 * terms.square() + 1e-30).all()


def test_merged_weight_norm_passes_no_gradient():
    W, lora = example()
    lora = Lora(lora.A.requires_grad_(), lora.B.requires_grad_(), 2.0)
    assert not merged_weight_norm(W, lora).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_initial_magnitude_makes_dora_start_as_lora(dtype):
    W, lora = example(dtype=dtype)
    m = initial_magnitude(W, lora)
    exact = truth(W, lora)
    torch.testing.assert_close(m.double(), exact.norm(dim=1), rtol=1e-5, atol=0)
    merged = weight_change(W, lora._replace(magnitude=m)).double() + W.double()
    torch.testing.assert_close(merged, exact, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_a_number_in_dora():
    """A zero-initialised layer, as diffusion models have: ‖W + ΔW‖ = 0 and m = 0."""
    W, lora = example(dora=True)
    W[2] = 0
    lora.B[2] = 0
    lora.magnitude[2] = 0
    assert torch.equal(merged_weight(W, lora)[2], torch.zeros(7))
    assert torch.isfinite(merged_weight(W, lora)).all()


@pytest.mark.parametrize(
    ("A", "B"),
    [((3, 6), (5, 3)), ((3, 7), (4, 3)), ((3, 7), (5, 2)), ((7,), (5, 3)), ((2, 3, 7), (2, 5, 3))],
)
def test_factors_of_another_shape_are_refused(A, B):
    lora = Lora(torch.zeros(A), torch.zeros(B), 1.0)
    with pytest.raises(ShapeError, match=r"\(out, in\) = \(5, 7\)"):
        check_shapes(torch.Size((5, 7)), lora)
    with pytest.raises(ShapeError):
        merged_weight(torch.zeros(5, 7), lora)
