"""Reading the headers of safetensors files, broken ones too."""

import json
import resource

import pytest

from lowrank.errors import TensorFileError
from lowrank.tensor_files import Layout, created, entries

ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1], "the header is broken"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "the header is broken"),
        ({"w": 3}, "the header is broken"),
        ({"w": ROW | {"data_offsets": [0, 12]}}, "it is cut off"),
        ({"w": ROW | {"shape": [3]}}, "'w' is F32 of shape (3,), and has 8 bytes"),
    ],
)
def test_a_broken_header_is_told(tmp_path, header, message):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(TensorFileError) as told:
        entries(path)
    assert message in str(told.value)


def test_a_file_that_does_not_fit_is_told_before_anything_is_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with (
            pytest.raises(TensorFileError, match=r"big needs 3\.00 GB, and \d+\.\d\d GB are free"),
            created(tmp_path / "big", Layout(b"head", {}, 3_000_000_000)),
        ):
            raise AssertionError("the file was made")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_new_file_has_its_head_and_its_size(tmp_path, monkeypatch, system):
    monkeypatch.setattr("lowrank.tensor_files.sys.platform", system)
    with created(tmp_path / "new", Layout(b"head", {}, 5000)):
        pass
    assert (tmp_path / "new").read_bytes() == b"head" + bytes(4996)
