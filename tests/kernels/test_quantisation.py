"""Few bits and back, against the papers' tables and definitions, and against bitsandbytes to the byte."""

import importlib.util

import pytest
import torch

from lowrank.errors import QuantisationError
from lowrank.kernels.quantisation import (
    dequantise,
    dequantise_blocks,
    dequantise_blocks_reference,
    dynamic_map,
    normal_float,
    quantise,
    rounded,
    scales,
    table,
)
from lowrank.quantisation import Quantisation

# Dettmers et al. 2023, Appendix E
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FORMATS = {
    "nf2": Quantisation("nf2", block_size=64),
    "nf4": Quantisation("nf4", block_size=64),
    "nf4 in 128": Quantisation("nf4", block_size=128),
    "nf4 double": Quantisation("nf4", block_size=64, double=True),
    "fp4": Quantisation("fp4", block_size=64),
    "fp4 double": Quantisation("fp4", block_size=64, double=True),
    "int8": Quantisation("int8"),
}
SHAPES = [(7, 30), (64, 64), (1, 5), (1, 1), (33, 65), (7, 96), (300, 257)]
with_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def weight(shape, dtype=torch.float32):
    """Of entries that are typical; the first block and a row are zeros, and so is the end."""
    torch.manual_seed(0)
    W = torch.randn(shape) * 0.05
    if shape[0] > 2:
        W[0], W[2], W[-1] = 0, 0, 0
    return W.to(dtype)


def test_the_four_bit_values_are_qloras():
    assert torch.equal(normal_float(4), torch.tensor(NF4))


def test_the_two_bit_values_are_quantiles_too():
    values = normal_float(2)
    assert len(values) == 4
    assert values[0] == -1
    assert values[1] == 0
    assert values[3] == 1
    normal = torch.distributions.Normal(0.0, 1.0)
    middle = normal.icdf(torch.tensor((0.9677083 + 0.5) / 2)) / normal.icdf(torch.tensor(0.9677083))
    assert values[2] == pytest.approx(middle.item(), rel=1e-5)


def test_the_map_of_the_scales_is_finer_near_zero():
    values = dynamic_map()
    assert len(values) == len(set(values.tolist())) == 256
    assert values.max() == 1
    assert -1 < values.min() < -0.99
    assert (values[:-1] < values[1:]).all()
    positive = values[values > 0]
    assert positive.min() == pytest.approx(5.5e-7)  # the middle of 0.1 and 1, times 10⁻⁶
    assert [((10.0**-k < positive) & (positive < 10.0 ** (1 - k))).sum() for k in range(1, 7)] == [
        *(64, 32, 16, 8, 4, 2)
    ]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_entry_becomes_the_nearest_value_of_its_block(name, shape):
    quantisation, W = FORMATS[name], weight(shape)
    packed = quantise(W, quantisation)
    found = dequantise(packed, quantisation, shape).double()
    assert found.shape == shape
    if name == "int8":
        W = W.half()  # as LLM.int8() has it
        blocks, values = list(W.double()), torch.arange(-127, 128) / 127
    else:
        blocks = W.flatten().double().split(quantisation.block_size)
        values = table(quantisation.format, torch.device("cpu"))
    stored = scales(packed).double()
    true = torch.stack([block.abs().max() for block in blocks])
    if quantisation.double:  # by at most half the widest gap of the map, of the largest of 256
        gap = (dynamic_map()[1:] - dynamic_map()[:-1]).max() / 2
        for some, exact in zip(stored.split(256), true.split(256), strict=True):
            assert (some - exact).abs().max() <= gap * 1.01 * (exact - true.mean()).abs().max()
    else:
        torch.testing.assert_close(stored, true, rtol=1e-6, atol=1e-37)
    flat = found.flatten()
    for block, size, largest in zip(blocks, stored, true, strict=True):
        here, flat = flat[: len(block)], flat[len(block) :]
        took = here / size if size > 1e-30 else here  # of the values
        assert (took[:, None] - values.double()).abs().amin(dim=1).max() < 1e-6
        distances = (block[:, None] - values.double() * largest).abs()
        assert ((block - took * largest).abs() <= distances.amin(dim=1) + 1e-7).all()
    if not quantisation.double:
        assert not found[W.double() == 0].any()


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_twice_is_rounding_once_and_zeros_stay(name):
    quantisation, W = FORMATS[name], weight((9, 40))
    once = rounded(W, quantisation)
    if not quantisation.double:  # whose scales move
        torch.testing.assert_close(rounded(once, quantisation), once, atol=1e-4, rtol=0)
    assert not rounded(torch.zeros(3, 5), quantisation).any()


def test_what_is_stored_is_small():
    packed = quantise(weight((300, 257)), FORMATS["nf4 double"])
    assert packed.codes.dtype == packed.absmax.dtype == torch.uint8
    assert packed.codes.shape == (38550, 1)
    assert packed.absmax.shape == (1205,)
    assert packed.nested_absmax.shape == (5,)
    assert packed.offset.shape == ()


def test_int8_is_a_127th_of_the_rows_largest():
    W = torch.randn(6, 11)
    packed = quantise(W, FORMATS["int8"])
    assert packed.codes.dtype == torch.int8
    assert (packed.codes.abs().amax(dim=1) == 127).all()
    half = W.half().float()
    step = half.abs().amax(dim=1, keepdim=True) / 127
    assert ((rounded(W, FORMATS["int8"]) - half).abs() <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nf4", "nf4 in 128", "fp4"])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 4096)], ids=str)
def test_the_fast_way_back_is_the_plain_one_to_the_bit(name, shape, dtype):
    quantisation = FORMATS[name]
    packed = quantise(weight(shape), quantisation)
    sizes = (quantisation.format, quantisation.block_size, shape, dtype)
    fast = dequantise_blocks(packed.codes, packed.absmax, *sizes)
    assert fast.dtype == dtype
    assert torch.equal(fast, dequantise_blocks_reference(packed.codes, packed.absmax, *sizes))
    assert torch.equal(fast, dequantise(packed, quantisation, shape, dtype))


@pytest.mark.parametrize("name", ["nf4 double", "fp4", "int8"])
def test_on_the_meta_device_only_the_shapes_are_worked_out(name):
    packed = quantise(torch.empty(33, 65, device="meta"), FORMATS[name])
    real = quantise(weight((33, 65)), FORMATS[name])
    for empty, full in zip(packed, real, strict=True):
        assert (empty is None) == (full is None)
        if full is not None:
            assert (empty.shape, empty.dtype) == (full.shape, full.dtype)
    assert dequantise(packed, FORMATS[name], (33, 65)).is_meta


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_has_no_nearest_value_is_refused(value):
    W = weight((5, 7))
    W[3, 1] = value
    with pytest.raises(QuantisationError, match="cannot be quantised"):
        quantise(W, FORMATS["int8"])
    if value != 1e6:
        with pytest.raises(QuantisationError, match="cannot be quantised"):
            quantise(W, FORMATS["nf4 double"])
    with pytest.raises(QuantisationError, match="reads int4 and does not write it"):
        quantise(weight((5, 7)), Quantisation("int4", "gptq", 128))
    with pytest.raises(QuantisationError, match="must be even"):
        quantise(weight((5, 7)), Quantisation("nf4", block_size=33))


# --- against bitsandbytes -------------------------------------------------------------------------


@with_bitsandbytes
def test_the_tables_are_bitsandbytes():
    from bitsandbytes import functional

    assert torch.equal(dynamic_map(), functional.create_dynamic_map())
    for name in ("nf4", "fp4"):
        assert torch.equal(
            table(name, torch.device("cpu")), functional.get_4bit_type(name, device="cpu")
        )


@with_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_byte_is_bitsandbytes(shape, dtype):
    from bitsandbytes import functional

    W = weight(shape, dtype)
    for name, quantisation in FORMATS.items():
        packed = quantise(W, quantisation)
        if name == "nf2":
            continue
        if name == "int8":
            codes, absmax, _ = functional.int8_vectorwise_quant(W.half())
            assert torch.equal(packed.codes, codes)
            assert torch.equal(packed.absmax, absmax)
            continue
        codes, state = functional.quantize_4bit(
            W,
            blocksize=quantisation.block_size,
            quant_type=quantisation.format,
            compress_statistics=quantisation.double,
        )
        assert torch.equal(packed.codes, codes)
        assert torch.equal(packed.absmax, state.absmax)
        absmax = state.absmax
        if quantisation.double:
            assert torch.equal(packed.nested_absmax, state.state2.absmax)
            assert torch.equal(packed.offset, state.offset)
            absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(scales(packed), absmax)
        if shape[1] % quantisation.block_size == 0:  # see `_bitsandbytes_reads`
            theirs = functional.dequantize_4bit(codes, state)
            assert torch.equal(dequantise(packed, quantisation, shape, dtype), theirs)


@with_bitsandbytes
def test_the_scales_agree_where_they_lie_between_two_values():
    """Thousands of them: bitsandbytes' own rounding of a scale is not always to the nearest."""
    from bitsandbytes import functional

    torch.manual_seed(1)
    W = torch.randn(2000, 320) * torch.rand(2000, 1)
    packed = quantise(W, FORMATS["nf4 double"])
    _, state = functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    assert len(packed.absmax) == 10000
    assert torch.equal(packed.absmax, state.absmax)
