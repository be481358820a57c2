"""LoRA-GA's factors against the paper's equations, recomputed in float64."""

import pytest
import torch

from lowrank.init.lora_ga import factors, leading_vectors

OUT, IN, R, SCALING, GAMMA = 15, 22, 3, 2.5, 7


def setting(out=OUT, in_=IN, seed=0):
    torch.manual_seed(seed)
    W = torch.randn(out, in_, dtype=torch.float64)
    return W, torch.randn(out, in_, dtype=torch.float64)


CHOSEN = {  # singular vectors (from 0) of A and of B
    "ArBr": ([1, 3, 5], [0, 2, 4]),
    "A2rBr": ([3, 4, 5], [0, 1, 2]),
    "ArB2r": ([0, 1, 2], [3, 4, 5]),
}


def same_up_to_signs(found, want):
    torch.testing.assert_close((found * want).sum(0).abs(), found.norm(dim=0) * want.norm(dim=0))
    torch.testing.assert_close(found.norm(dim=0), want.norm(dim=0))


@pytest.mark.parametrize("direction", list(CHOSEN))
@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit", "weight_svd"])
def test_factors_are_those_of_the_paper(direction, scale):
    W, G = setting()
    A, B = factors(W, G, R, SCALING, direction=direction, scale=scale, stable_gamma=GAMMA)
    U, _, Vh = torch.linalg.svd(G)
    factor = {
        "stable": OUT**0.25 / GAMMA**0.5,  # theorem 3.2
        "gd_scale": 1 / SCALING,
        "unit": 1.0,
        "weight_svd": (torch.linalg.svdvals(W)[:R] / SCALING).sqrt().mean().item(),
    }[scale]
    for_A, for_B = CHOSEN[direction]
    assert A.shape == (R, IN)
    assert B.shape == (OUT, R)
    same_up_to_signs(A.T, factor * Vh[for_A].T)
    same_up_to_signs(B, factor * U[:, for_B])


def test_random_takes_each_vector_once():
    W, G = setting()
    A, B = factors(W, G, R, SCALING, direction="random", scale="unit")
    U, _, Vh = torch.linalg.svd(G)
    for_A = (A @ Vh.T).abs().argmax(1).tolist()
    for_B = (B.T @ U).abs().argmax(1).tolist()
    assert sorted(for_A + for_B) == list(range(2 * R))


def test_the_first_step_is_the_best_approximation_of_the_full_step():
    """Theorem 3.1: with A = V[:r], B = U[r:2r], one step of gradient descent moves W by −η·ζ²·G's best
    approximation of rank 2r: ΔW' − ΔW ∝ B·Bᵀ·G + G·Aᵀ·A at first order."""
    W, G = setting()
    A, B = factors(W, G, R, 1.0, scale="unit")
    step = B @ (B.T @ G) + (G @ A.T) @ A
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = (U[:, : 2 * R] * S[: 2 * R]) @ Vh[: 2 * R]
    torch.testing.assert_close(step, best)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_large_gradients_are_factored_by_iteration_as_well_as_exactly(shape):
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(shape[0], 200)).Q
    V = torch.linalg.qr(torch.randn(shape[1], 200)).Q
    G = U * 0.9 ** torch.arange(200.0) @ V.T
    state = torch.get_rng_state()
    found_U, found_V = leading_vectors(G, 6)
    again, _ = leading_vectors(G, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found_U, again)
    assert ((found_U * U[:, :6]).sum(0).abs() > 0.999).all()
    assert ((found_V.T * V[:, :6]).sum(0).abs() > 0.999).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_weights_give_float32(dtype):
    W, G = setting()
    A, B = factors(W.to(dtype), G.to(dtype), R, SCALING)
    assert A.dtype == B.dtype == torch.float32
