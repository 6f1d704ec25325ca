"""What goes wrong on a disk is named, reaches the one who waits, and loses nothing."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkft_compile.runtime.file_store import FileStore
from chunkft_compile.runtime.scratch import PAGE, ScratchFile
from chunkft_compile.runtime.transfers import PIECE_NBYTES
from tests.support.allocator import Allocator

CPU = torch.device("cpu")
ONES = torch.ones(5000)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def _fails(code: int) -> Any:
    def call(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere, does not exist; create it or pass store="):
        FileStore(tmp_path / "nowhere")


def test_a_directory_without_files_is_named() -> None:
    with pytest.raises(OSError, match=r"cannot make the file of the store; pass store=... to keep it elsewhere in /proc: "):
        FileStore(Path("/proc"))


def test_a_full_disk_is_an_error_with_the_directory(store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store.put("a", ONES).wait()
    nbytes = store.nbytes
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _fails(errno.ENOSPC))
        with pytest.raises(
            OSError, match=rf"no room for \d+ more bytes of optimizer state or saved values in {tmp_path}: No space left"
        ) as caught:
            store.put("b", ONES)
        with pytest.raises(OSError, match="no room"):
            store.put("a", torch.zeros(50_000))
    assert caught.value.errno == errno.ENOSPC
    assert store.nbytes == nbytes
    assert torch.equal(store.get(kept, CPU).wait(), ONES)  # what was there is still there
    assert torch.equal(store.put("b", ONES).wait(), ONES)  # and when there is room again, it goes on


@pytest.mark.slow  # a process of its own takes most of ten seconds to load torch on a busy machine
def test_a_full_filesystem(tmp_path: Path) -> None:
    """A small one in memory, mounted for a process of its own."""
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no filesystem can be mounted here")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && {sys.executable} -m tests.runtime.test_file_errors {tmp_path}"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"no room for 401408 more bytes of optimizer state or saved values in {tmp_path}: No space left" in done.stdout


def _fill_filesystem(directory: Path) -> None:
    """What runs in the other process."""
    store = FileStore(directory)
    kept = store.put("a", ONES).wait()
    try:
        store.put("b", torch.ones(100_000))
    except OSError as error:
        print(error)
    assert torch.equal(store.get(kept, CPU).wait(), ONES)


def test_a_limit_on_the_size_of_files(store: FileStore) -> None:
    kept = store.put("a", ONES).wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="no room for") as caught:
            store.put("b", torch.ones(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert torch.equal(store.get(kept, CPU).wait(), ONES)


def test_a_failed_write_keeps_the_source_and_spoils_its_slot_only(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = store.put("other", ONES).wait()
    source = ONES.clone()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", _fails(errno.ENOSPC))
        copy = store.put("a", source)
        for _ in range(2):
            with pytest.raises(OSError, match=rf"cannot write \d+ bytes at \d+ of the store's file in {tmp_path}: No space left"):
                copy.wait()
    assert torch.equal(source, ONES)
    with pytest.raises(OSError, match="cannot write"):  # the slot holds nothing that can be used
        store.get(copy.tensor, CPU).wait()
    with pytest.raises(OSError, match="cannot write"):
        store.put_into(copy.tensor[:10], ONES[:10]).wait()
    with pytest.raises(OSError, match="cannot write"):
        store.synchronize()
    assert torch.equal(store.get(other, CPU).wait(), ONES)
    assert torch.equal(store.get(store.put("a", source).wait(), CPU).wait(), ONES)  # another try makes it good
    store.synchronize()


def test_synchronize_raises_what_nobody_waited_for(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = store.put("a", ONES).wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", _fails(errno.EIO))
        store.get(stand_in, CPU)
        with pytest.raises(OSError, match="cannot read"):
            store.synchronize()
    store.synchronize()
    assert torch.equal(store.get(stand_in, CPU).wait(), ONES)


def test_an_error_keeps_no_tensor(allocator: Allocator, store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = store.put("a", ONES).wait()
    live = allocator.live()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", _fails(errno.EIO))
        for _ in range(2):
            copy = store.get(stand_in, CPU)
            with pytest.raises(OSError, match="cannot read"):
                copy.wait()
        del copy
        assert allocator.live() == live


def test_one_failed_piece_of_several_fails_the_copy(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwritev

    def fail_second(fd: int, views: Any, at: int) -> int:
        if at >= PIECE_NBYTES:
            raise OSError(errno.EIO, "torn")
        return write(fd, views, at)

    monkeypatch.setattr(os, "pwritev", fail_second)
    copy = store.put("a", torch.ones(PIECE_NBYTES // 2))
    with pytest.raises(OSError, match="torn"):
        copy.wait()


def test_a_short_read_is_an_error(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = store.put("a", ONES).wait()
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(OSError, match=r"the store's file ended \d+ bytes early in .*: short read"):
        store.get(stand_in, CPU).wait()


def test_a_short_write_is_an_error(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match=r"20480 bytes of the store's file were not written in .*: short write"):
        store.put("a", ONES).wait()


def test_system_calls_may_do_a_part(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:PAGE]], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: write(fd, [views[0][:PAGE]], at))
    tensor = torch.randn(5000)
    assert torch.equal(store.get(store.put("a", tensor).wait(), CPU).wait(), tensor)


def test_a_file_that_was_cut_is_noticed(store: FileStore) -> None:
    stand_in = store.put("a", torch.ones(50_000)).wait()
    os.ftruncate(store._file._file.fileno(), PAGE)
    for copy in (store.get(stand_in, CPU), store.put("a", ONES)):
        with pytest.raises(OSError, match=r"the store's file has 4096 bytes where \d+ were reserved in .*: changed by someone else"):
            copy.wait()


def test_a_file_that_grows_meanwhile_is_no_changed_one(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = store.put("a", ONES).wait()
    look = os.fstat

    def look_and_grow(fd: int) -> os.stat_result:
        found = look(fd)
        store._file.reserve(found.st_size + PAGE)
        return found

    monkeypatch.setattr(os, "fstat", look_and_grow)
    assert torch.equal(store.get(stand_in, CPU).wait(), ONES)


def _refuse_flag(patch: pytest.MonkeyPatch) -> None:
    control = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> Any:
        if argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(fd, command, argument)

    patch.setattr(fcntl, "fcntl", refuse)


def _refuse_first_write(patch: pytest.MonkeyPatch) -> None:
    write = os.pwritev

    def refuse(fd: int, views: Any, at: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(fd, views, at)

    patch.setattr(os, "pwritev", refuse)


def _map_old_bytes(patch: pytest.MonkeyPatch) -> None:
    mapped = ScratchFile.map
    patch.setattr(ScratchFile, "map", lambda *args: mapped(*args).clone())


@pytest.mark.parametrize("broken", [_refuse_flag, _refuse_first_write, _map_old_bytes])
def test_where_direct_transfers_do_not_work_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    with monkeypatch.context() as patch:
        broken(patch)
        store = FileStore(tmp_path)
    assert not store.direct
    assert not fcntl.fcntl(store._file._file.fileno(), fcntl.F_GETFL) & os.O_DIRECT
    tensor = torch.randn(PIECE_NBYTES // 4 + 3)
    stand_in = store.put("a", tensor).wait()
    assert torch.equal(stand_in, tensor)
    assert torch.equal(store.get(stand_in, CPU).wait(), tensor)


if __name__ == "__main__":
    _fill_filesystem(Path(sys.argv[1]))
