"""A reader of a file finds the old one or the new one."""

import os
import stat

import pytest

from lowrank.files import folder_for, replacing, write_text


def test_write_text_is_utf8_and_leaves_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "Übung ✓\n")
    assert (tmp_path / "a.txt").read_bytes() == "Übung ✓\n".encode()
    write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "second"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_until_the_end_the_old_file_is_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename within one file system
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, error, existing):
    path = tmp_path / "file"
    if existing:
        path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert os.listdir(tmp_path) == (["file"] if existing else [])
    assert not existing or path.read_text() == "old"


def test_the_mode_is_the_umasks(tmp_path):
    before = os.umask(0o026)
    try:
        write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert os.umask(before) == before


def test_a_writer_that_renames_a_file_into_place_is_followed(tmp_path):
    """safetensors and others may replace the file that they are given."""
    with replacing(tmp_path / "file") as temporary:
        other = tmp_path / "other"
        other.write_text("new")
        other.replace(temporary)
    assert (tmp_path / "file").read_text() == "new"


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nope" / "file", "x")


def test_a_folder_made_for_what_failed_goes_again(tmp_path):
    (tmp_path / "there").mkdir()
    for new in ("a/b", "there", "there/c"):
        with pytest.raises(OSError, match="full"), folder_for(tmp_path / new):  # noqa: PT012
            assert (tmp_path / new).is_dir()
            raise OSError("full")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]
    with folder_for(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b").is_dir()
