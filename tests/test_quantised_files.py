"""Weights of quantised bases out of files: what they stand for, by blocks and as a whole."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from lowrank.errors import TensorFileError
from lowrank.kernels.quantisation import rounded
from lowrank.lora import Lora
from lowrank.quantisation import Quantisation
from lowrank.quantised_files import packed_entries, rounded_entry
from lowrank.tensor_files import entries

FORMS = {
    "nf4": Quantisation("nf4", block_size=64),
    "nf4 doubly": Quantisation("nf4", double=True),
    "fp4 doubly": Quantisation("fp4", block_size=128, double=True),
    "int8": Quantisation("int8"),
}
OUT, IN = 77, 131  # 10087 entries: blocks run over the ends of rows, and the last one is short


@pytest.fixture
def held(tmp_path):
    torch.manual_seed(0)
    W = torch.randn(OUT, IN).bfloat16()
    save_file({"w": W, "turned": W.T.contiguous()}, tmp_path / "w.safetensors")
    return W, entries(tmp_path / "w.safetensors")[0]


def by_rows(entry, rows, width):
    numbers = entry.reader()
    height = entry.shape[0]
    parts = [numbers(i * width, min(height, i + rows) * width) for i in range(0, height, rows)]
    return torch.cat(parts).view(height, width)


@pytest.mark.parametrize("form", FORMS)
def test_rounded_when_read(held, form):
    W, stored = held
    truth = rounded(W, FORMS[form])
    entry = rounded_entry(stored["w"], FORMS[form])
    assert (entry.shape, entry.dtype, entry.stored) == ((OUT, IN), "BF16", False)
    for rows in (1, 5, 100):
        assert torch.equal(by_rows(entry, rows, IN), truth)
    assert torch.equal(entry.read(), truth)
    assert torch.equal(entry.entries([0, 4711, 10086]), truth.flatten()[[0, 4711, 10086]])
    turned = rounded_entry(stored["turned"], FORMS[form], transposed=True)
    assert turned.shape == (IN, OUT)
    assert torch.equal(by_rows(turned, 9, OUT), truth.T)


@pytest.mark.parametrize("form", FORMS)
def test_rounded_when_read_without_what_was_taken_out(held, form):
    W, stored = held
    generator = torch.Generator().manual_seed(1)
    A, B = (torch.randn(*shape, generator=generator) for shape in ((3, IN), (OUT, 3)))
    truth = rounded((W.double() - 0.2 * B.double() @ A.double()).float(), FORMS[form])
    entry = rounded_entry(stored["w"], FORMS[form], less=Lora(A, B, 0.2))
    for rows in (1, 5, 100):
        assert torch.equal(by_rows(entry, rows, IN), truth)
    turned = rounded_entry(stored["turned"], FORMS[form], transposed=True, less=Lora(A, B, 0.2))
    assert torch.equal(turned.read(), truth.T)


def packed_by_bitsandbytes(W, form):
    """The tensors of a folder's file, as `save_pretrained` of a bitsandbytes model writes them."""
    functional = pytest.importorskip("bitsandbytes.functional")
    quantisation = FORMS[form]
    if form == "int8":
        codes, rows, _ = functional.int8_vectorwise_quant(W.half())
        truth = codes.double() * rows.double()[:, None] / 127
        return {"w.weight": codes, "w.SCB": rows, "w.weight_format": torch.tensor(0)}, truth
    codes, state = functional.quantize_4bit(
        W,
        blocksize=quantisation.block_size or 64,
        compress_statistics=quantisation.double,
        quant_type=quantisation.format,
    )
    tensors = {f"w.weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    truth = functional.dequantize_4bit(codes, state)
    return {"w.weight": codes, **tensors}, truth


@pytest.mark.parametrize("form", FORMS)
def test_packed_in_the_file(held, tmp_path, form):
    W, _ = held
    tensors, truth = packed_by_bitsandbytes(W, form)
    save_file({**tensors, "norm.weight": torch.ones(3)}, tmp_path / "packed.safetensors")
    found = packed_entries(entries(tmp_path / "packed.safetensors")[0], torch.bfloat16)
    assert found.keys() == {"w.weight", "norm.weight"}
    entry = found["w.weight"]
    assert (entry.shape, entry.dtype, entry.stored) == ((OUT, IN), "BF16", True)
    assert entry.quantisation.rounding[0] == FORMS[form].format
    assert entry.quantisation.double == FORMS[form].double
    assert entry.bytes == OUT * IN * 2
    whole = entry.read()
    assert torch.equal(by_rows(entry, 7, IN), whole)
    assert torch.equal(entry.entries([131, 9999]), whole.flatten()[[131, 9999]])
    if form == "int8":
        torch.testing.assert_close(whole.double(), truth, atol=0, rtol=1e-6)
    else:  # which bitsandbytes gives in W's dtype
        assert torch.equal(whole.bfloat16(), truth)


def test_broken_packing_is_named(held, tmp_path):
    tensors, _ = packed_by_bitsandbytes(held[0], "nf4 doubly")
    state = next(key for key in tensors if "quant_state" in key)
    told = json.loads(bytes(tensors[state].tolist()))

    def refused(match, **changed):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({k: t for k, t in {**tensors, **changed}.items() if t is not None}, file)
        with pytest.raises(TensorFileError, match=match):
            packed_entries(entries(file)[0], torch.float16)

    def text(**values):
        return torch.tensor(list(json.dumps(told | values).encode()), dtype=torch.uint8)

    refused("512 scales share one", **{state: text(nested_blocksize=512)})
    refused("nested_absmax", **{"w.weight.nested_absmax": None})
    refused("is not packed as bitsandbytes packs it", **{state: text(quant_type="nf3")})


def test_the_memory_of_a_block_is_what_is_held(held):
    """Reading rows must not build the matrix: the largest tensor on the way is the scales."""
    _, stored = held
    numbers = rounded_entry(stored["w"], FORMS["nf4 doubly"]).reader()
    assert numbers(IN, 2 * IN).untyped_storage().nbytes() <= 4 * 64 * math.ceil(IN / 64 + 1)
