"""Directories appear complete or not at all; leftovers of writers that are gone are removed, those of running ones are not."""

import os
import signal
from pathlib import Path

import pytest

from chunkft_compile.runtime.directories import free_name, new_directory, publish, published, remove, remove_leftovers


def _write(parent: Path, step: int) -> Path:
    with new_directory(parent, step) as hidden:
        (hidden / "file").write_text("full")
        return publish(hidden, step)


def test_names_count_steps_and_repetitions(tmp_path: Path) -> None:
    names = [_write(tmp_path / "a" / "b", step).name for step in (7, 7, 7, 1_234_567)]
    assert names == ["step-000007", "step-000007-2", "step-000007-3", "step-1234567"]
    assert free_name(tmp_path / "a" / "b", 7).name == "step-000007-4"
    (tmp_path / "a" / "b" / "step-12").mkdir()
    (tmp_path / "a" / "b" / "step-000009").write_text("a file")
    assert {path.name for path in published(tmp_path / "a" / "b")} == set(names)
    assert published(tmp_path / "nowhere") == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path, 3) as hidden:
            (hidden / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failing_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*paths: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        _write(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_on_the_disk_before_the_name_and_the_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def note_sync(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def note_rename(old: Path, new: Path) -> None:
        done.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    with new_directory(tmp_path, 3) as hidden:
        (hidden / "a").touch()
        (hidden / "b").touch()
        publish(hidden, 3)
    assert done == ["a", "b", hidden.name, "rename", tmp_path.name]


def test_a_killed_writer_leaves_what_the_next_one_removes(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with new_directory(tmp_path, 5) as hidden:
            (hidden / "file").write_text("half")
            os.write(writing, b"x")
            signal.pause()
        os._exit(1)
    os.read(reading, 1)
    (left,) = tmp_path.iterdir()
    remove_leftovers(tmp_path)
    assert left.exists()  # its writer is at work
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert published(tmp_path) == []
    path = _write(tmp_path, 6)
    assert list(tmp_path.iterdir()) == [path]


def test_a_removal_that_was_broken_off_is_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr("chunkft_compile.runtime.directories.shutil.rmtree", lambda *arguments, **options: None)
        remove(path)
    assert published(tmp_path) == []
    (tmp_path / ".step-notes").mkdir()  # somebody's own
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".step-notes"]
