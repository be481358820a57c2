"""Few bits and back, against the papers' tables and definitions."""

import pytest
import torch

from lowrank.kernels.quantisation import (
    dequantise_normal_float,
    normal_float,
    quantise_int8,
    quantise_normal_float,
    rounded,
)

# Dettmers et al. 2023, Appendix E
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def test_the_four_bit_values_are_qloras():
    assert (normal_float(4) - torch.tensor(NF4)).abs().max() < 2e-7


def test_the_two_bit_values_are_quantiles_too():
    values = normal_float(2)
    assert len(values) == 4
    assert values[0] == -1
    assert values[1] == 0
    assert values[3] == 1
    normal = torch.distributions.Normal(0.0, 1.0)
    middle = normal.icdf(torch.tensor((0.9677083 + 0.5) / 2)) / normal.icdf(torch.tensor(0.9677083))
    assert values[2] == pytest.approx(middle.item(), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(7, 30), (64, 64), (1, 5)], ids=str)
def test_each_entry_becomes_the_nearest_value_of_its_block(bits, shape):
    torch.manual_seed(0)
    W = torch.randn(shape)
    found = rounded(W, bits).flatten()
    flat, values = W.flatten().double(), normal_float(bits).double()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        levels = values * block.abs().max()
        nearest = levels[(block[:, None] - levels).abs().argmin(dim=1)]
        torch.testing.assert_close(found[start : start + 64].double(), nearest, atol=1e-6, rtol=0)


def test_rounding_twice_is_rounding_once_and_zeros_stay():
    W = torch.randn(9, 40)
    W[3] = 0
    for bits in (2, 4, 8):
        once = rounded(W, bits)
        assert not once[3].any() or bits != 8
        torch.testing.assert_close(rounded(once, bits), once, atol=1e-6, rtol=0)
    assert not rounded(torch.zeros(3, 5), 4).any()


def test_what_is_stored_is_small():
    stored = quantise_normal_float(torch.randn(10, 33))
    assert stored.codes.dtype == torch.uint8
    assert stored.codes.max() < 16
    assert stored.scales.shape == (6,)
    assert dequantise_normal_float(stored, (10, 33)).shape == (10, 33)


def test_int8_is_a_127th_of_the_rows_largest():
    W = torch.randn(6, 11)
    stored = quantise_int8(W)
    assert stored.codes.dtype == torch.int8
    assert (stored.codes.abs().amax(dim=1) == 127).all()
    step = W.abs().amax(dim=1, keepdim=True) / 127
    assert ((rounded(W, 8) - W).abs() <= step / 2 * (1 + 1e-5)).all()
