"""Stores: W is seen as (out, in), written without touching what was there, and put back bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from lowrank.bases import stores

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def module(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(shape).to(dtype), requires_grad=False)
    return holder


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


# how, the stored shape, and where W[o, i] is in it
LAYOUTS = [
    (stores.as_is, (5, 7), lambda p, o, i: p[o, i]),
    (stores.transposed, (7, 5), lambda p, o, i: p[i, o]),
    (stores.flattened, (5, 7), lambda p, o, i: p[o, i]),
    (stores.flattened, (5, 3, 2), lambda p, o, i: p[o, i // 2, i % 2]),
    (stores.flattened, (5, 2, 3, 4), lambda p, o, i: p[o, i // 12, i // 4 % 3, i % 4]),
]


@pytest.mark.parametrize(("hold", "shape", "entry"), LAYOUTS)
def test_W_is_out_by_in_whatever_is_stored(hold, shape, entry):
    holder = module(*shape)
    W = hold(holder, "weight").read()
    assert W.ndim == 2
    assert W.shape[0] == 5
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            assert W[o, i] == entry(holder.weight, o, i)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hold", "shape", "entry"), LAYOUTS)
def test_what_is_written_is_read_back_rounded_once(hold, shape, entry, dtype):
    holder = module(*shape, dtype=dtype)
    store = hold(holder, "weight")
    W = torch.randn(store.read().shape, dtype=torch.float64)
    store.write(W)
    assert torch.equal(store.read(), W.to(dtype))
    assert holder.weight.shape == shape
    assert holder.weight.dtype == dtype
    assert holder.weight.is_contiguous()
    assert isinstance(holder.weight, nn.Parameter)
    assert torch.equal(store.shaped(W).to(dtype), holder.weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hold", "shape", "entry"), LAYOUTS)
def test_restore_brings_every_bit_back(hold, shape, entry, dtype):
    holder = module(*shape, dtype=dtype)
    with torch.no_grad():
        flat = holder.weight.view(-1)
        flat[0], flat[1], flat[2], flat[3] = float("nan"), float("inf"), -0.0, 1e-45
    store, before, parameter = hold(holder, "weight"), bits(holder.weight), holder.weight
    saved, W = store.snapshot(), store.read().clone()
    store.write(torch.randn(store.read().shape))
    store.write(torch.randn(store.read().shape))
    assert bits(parameter) == before  # what the snapshot holds is left alone
    assert bits(store.read_snapshot(saved)) == bits(W)
    store.restore(saved)
    assert holder.weight is parameter
    assert bits(holder.weight) == before


def test_a_tied_parameter_is_not_changed_behind_the_others_back():
    one, other = module(5, 7), module(5, 7)
    other.weight = one.weight
    before = bits(one.weight)
    store = stores.as_is(one, "weight")
    saved = store.snapshot()
    store.write(torch.zeros(5, 7))
    assert bits(other.weight) == before
    store.restore(saved)
    assert one.weight is other.weight


@pytest.mark.parametrize("trained", [False, True])
def test_what_is_written_is_trained_as_the_old_one_was(trained):
    holder = module(5, 7)
    holder.weight.requires_grad_(trained)
    stores.as_is(holder, "weight").write(torch.zeros(5, 7, requires_grad=True))
    assert holder.weight.requires_grad == trained
    assert holder.weight.is_leaf


def test_another_name_of_the_weight():
    attention = nn.MultiheadAttention(6, 2)
    store = stores.as_is(attention, "in_proj_weight")
    assert store.read().shape == (18, 6)
    store.write(torch.ones(18, 6))
    assert torch.equal(attention.in_proj_weight, torch.ones(18, 6))
    assert "in_proj_weight" in dict(attention.named_parameters())
