"""Files appear whole or not at all, and nothing else changes."""

import errno
import os
import stat
from pathlib import Path

import pytest

from chunkft_compile.writing import check_target, write_whole


def test_text_and_bytes_take_the_place_of_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "größer")
    assert file.read_bytes() == "größer".encode()
    write_whole(str(file), b"\x80\x04")
    assert file.read_bytes() == b"\x80\x04"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "another name")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_name_in_an_error_is_that_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/none/file'"):
        write_whole(tmp_path / "none" / "file", "new")


def test_a_link_keeps_leading_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    write_whole(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_a_pipe_is_written_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_cannot_be_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    check_target(file, "-o")
    with pytest.raises(ValueError, match=f"-o {tmp_path} cannot be written: .* is a directory"):
        check_target(tmp_path, "-o")
    with pytest.raises(ValueError, match=f"--json {file}/x cannot be written: {file} is not a directory"):
        check_target(file / "x", "--json")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(ValueError, match=r"cannot be written: .*permission"):
        check_target(file, "-o")
