"""A source is built once and kept; where that is not possible, the reason is told and nothing is left behind."""

import ctypes
import functools
from pathlib import Path

import pytest

from chunkft_compile.runtime import allocators
from chunkft_compile.runtime.native import BuildError, build, load
from tests.support.allocator import allocator_or_skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One function and no torch, so that it compiles at once."""
    allocator_or_skip()  # there is a compiler
    path = tmp_path / "six.cpp"
    path.write_text('extern "C" int six() { return 6; }')
    return path


def test_what_was_built_is_found_until_the_source_changes(source: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    library = load([source], libraries=[], directory=kept)
    (first,) = kept.iterdir()
    made = first.stat().st_mtime_ns
    assert (library.six(), build([source], libraries=[], directory=kept), first.stat().st_mtime_ns) == (6, first, made)
    source.write_text('extern "C" int six() { return 2 * 3; }')
    assert build([source], libraries=[], directory=kept) != first


def test_without_a_directory_it_serves_this_process_only(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library: ctypes.CDLL = load([source], libraries=[], directory=None)
    assert library.six() == 6
    assert list(tmp_path.iterdir()) == [source]


def test_no_compiler_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"six.cpp needs g\+\+"):
        load([source], libraries=[], directory=None)


def test_what_the_compiler_says_is_told(source: Path, tmp_path: Path) -> None:
    source.write_text("no C++")
    with pytest.raises(BuildError, match=r"(?s)could not build .*six.cpp.*error"):
        load([source], libraries=[], directory=tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_directory_that_cannot_be_made_is_said(source: Path) -> None:
    with pytest.raises(BuildError, match="could not be built in"):
        load([source], libraries=[], directory=source / "below a file")


def test_a_file_that_is_no_library_is_said(source: Path, tmp_path: Path) -> None:
    build([source], libraries=[], directory=tmp_path).write_text("nonsense")
    with pytest.raises(BuildError, match="cannot be loaded"):
        load([source], libraries=[], directory=tmp_path)


def test_the_hook_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(*_: object, **__: object) -> ctypes.CDLL:
        tries.append(1)
        raise BuildError("no compiler here")

    monkeypatch.setattr(allocators, "load", fail)
    monkeypatch.setattr(allocators, "_built", functools.cache(allocators._built.__wrapped__))
    for _ in range(2):
        with pytest.raises(BuildError, match="no compiler here"):
            allocators.install()
    assert tries == [1]
