"""Stores give back what they were given, keep it out of the budgeted memory, and say so when there is no room."""

import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkft_compile.planner.problem import Placement
from chunkft_compile.runtime.store import FileStore, HostStore, Store, measure_link, open_store
from tests.support.allocator import allocator_or_skip

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(params=["file", "host"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return FileStore(tmp_path) if request.param == "file" else HostStore()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 9), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]),
    st.booleans(),
)
def test_round_trip(store: Store, shape: list[int], dtype: torch.dtype, transposed: bool) -> None:
    tensor = (torch.randn(shape) * 50).to(dtype)
    if transposed and shape:
        tensor = tensor.permute(*reversed(range(tensor.dim())))
    stand_in = store.put((*shape, dtype, transposed), tensor)
    assert torch.equal(stand_in, tensor)
    got = store.get(stand_in, CPU)
    assert torch.equal(got, tensor)
    assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
    assert got.untyped_storage().data_ptr() != stand_in.untyped_storage().data_ptr()


def test_a_slot_is_used_again(store: Store) -> None:
    first = store.put("a", torch.ones(2000))
    nbytes = store.nbytes
    assert store.put("a", torch.full((2000,), 2.0)).data_ptr() == first.data_ptr()
    assert store.nbytes == nbytes >= 8000
    assert torch.equal(store.get(first, CPU), torch.full((2000,), 2.0))
    store.put("b", torch.ones(2000))
    assert store.nbytes == 2 * nbytes


def test_slots_do_not_overlap(store: Store) -> None:
    kept = [store.put(i, torch.full((1500 + i,), float(i))) for i in range(8)]
    for i, stand_in in enumerate(kept):
        assert torch.equal(store.get(stand_in, CPU), torch.full((1500 + i,), float(i)))


def test_another_shape_gets_another_place(store: Store) -> None:
    store.put("a", torch.ones(10))
    assert torch.equal(store.get(store.put("a", torch.zeros(20_000)), CPU), torch.zeros(20_000))


def _resident_nbytes() -> int:
    """Resident pages of mapped files, on disk or in a tmpfs. Not all of RSS: malloc keeps what earlier tests freed."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssFile", "RssShmem"))


def test_a_file_takes_no_memory(tmp_path: Path) -> None:
    allocator = allocator_or_skip()
    store = FileStore(tmp_path)
    tensor = torch.randn(8 * MIB // 4)
    gc.collect()
    live, resident = allocator.live(), _resident_nbytes()
    stand_ins = [store.put(i, tensor) for i in range(8)]
    assert allocator.live() == live
    assert _resident_nbytes() - resident < 8 * MIB
    allocator.reset()
    for stand_in in stand_ins:
        assert torch.equal(store.get(stand_in, CPU), tensor)
    assert allocator.peak() - live <= 8 * MIB + MIB  # one copy at a time, and what `equal` needs
    assert _resident_nbytes() - resident < 24 * MIB
    assert store.nbytes == 64 * MIB


def test_the_file_has_no_name(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a", torch.ones(4))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere, does not exist; create it or pass store="):
        FileStore(tmp_path / "nowhere")


def test_a_full_disk_is_an_error_with_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    kept = store.put("a", torch.ones(4))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=rf"no room for \d+ more bytes of optimizer state in {tmp_path}: No space left") as caught:
        store.put("b", torch.ones(4))
    assert caught.value.errno == errno.ENOSPC
    assert torch.equal(store.get(kept, CPU), torch.ones(4))  # what was there is still there


def test_a_cpu_gets_a_file_and_an_accelerator_the_host(tmp_path: Path) -> None:
    assert isinstance(open_store(CPU, tmp_path), FileStore)
    assert isinstance(open_store(CPU, None), FileStore)
    assert isinstance(open_store(torch.device("cuda"), None), HostStore)


def test_speed_is_measured(tmp_path: Path) -> None:
    link = measure_link(CPU, tmp_path)
    assert link.placement is Placement.DISK
    assert 10**6 < link.read_bytes_per_s < 10**12
    assert 10**6 < link.write_bytes_per_s < 10**12
    assert not link.overlaps
