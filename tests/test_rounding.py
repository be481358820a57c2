"""`rounded_for_inputs`: neighbours only, and less error in the outputs than the nearest values have."""

import pytest
import torch

from lowrank.rounding import rounded_for_inputs


def typical(rows, width, seed):
    """Inputs as layers get them: a mean, a few strong directions, noise. float64."""
    shared = torch.Generator().manual_seed(0)
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(width, generator=shared, dtype=torch.float64)
    strong = torch.randn(6, width, generator=shared, dtype=torch.float64)
    weights = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return mean + weights @ strong + 0.3 * noise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 37, 150])
def test_every_entry_is_a_neighbour_and_the_outputs_gain(dtype, width):
    exact = torch.randn(21, width, dtype=torch.float64) * 0.02
    exact[3] = exact[3].to(dtype).double()  # nothing to choose
    X, held_out = typical(400, width, 1), typical(300, width, 2)
    found = rounded_for_inputs(exact.float(), (X.T @ X / len(X)).float(), dtype)
    assert found.dtype == dtype
    exact = exact.float().double()
    nearest = exact.to(dtype).double()
    off = (found.double() - exact).abs()
    towards = torch.where(nearest > exact, -torch.inf, torch.inf).to(dtype)
    other = torch.nextafter(exact.to(dtype), towards).double()
    assert ((found.double() == nearest) | (found.double() == other)).all()
    assert (off <= (other - nearest).abs()).all()
    assert torch.equal(found[3].double(), exact[3])

    def lost(M):
        return ((M.double() - exact) @ held_out.T).norm()

    if width > 1:
        assert lost(found) < 0.6 * lost(nearest)
        assert off.norm() > (nearest - exact).norm()  # entry by entry it is worse
    E = found.double() - exact
    C = X.T @ X / len(X)
    better = 0  # no single entry can be changed for the better, but for the damping and float32
    for j in range(width):
        step = torch.where(found.double() == nearest, other - nearest, nearest - other)[:, j]
        gain = 2 * step * (E @ C[:, j]) + step.square() * C[j, j]
        better += int((gain < -1e-2 * step.square() * C.diagonal().mean() - 1e-9).sum())
    assert better <= 0.05 * exact.numel()


def test_what_has_no_neighbour_stays():
    """The largest value's neighbour is infinite."""
    top = torch.finfo(torch.float16).max
    exact = torch.tensor([[top - 1.0, 1.0 + 1e-5]])
    found = rounded_for_inputs(exact, torch.ones(2, 2), torch.float16)
    assert found.isfinite().all()
