"""A file store gives back what it was given, keeps it out of the budgeted memory, and counts what it moves."""

import ctypes
import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkft_compile.runtime.file_store import FileStore
from chunkft_compile.runtime.store import Traffic
from chunkft_compile.runtime.transfers import PIECE_NBYTES
from tests.support.allocator import Allocator, allocator_or_skip

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def _put(store: FileStore, slot: object, tensor: torch.Tensor) -> torch.Tensor:
    return store.put(slot, tensor).wait()


def _get(store: FileStore, stand_in: torch.Tensor) -> torch.Tensor:
    return store.get(stand_in, CPU).wait()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]),
    st.booleans(),
)
def test_round_trip(store: FileStore, shape: list[int], dtype: torch.dtype, transposed: bool) -> None:
    tensor = (torch.randn(shape) * 50).to(dtype)
    if transposed and shape:
        tensor = tensor.permute(*reversed(range(tensor.dim())))
    stand_in = _put(store, (*shape, dtype, transposed), tensor)
    assert torch.equal(stand_in, tensor)
    got = _get(store, stand_in)
    assert torch.equal(got, tensor)
    assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
    assert got.untyped_storage().data_ptr() != stand_in.untyped_storage().data_ptr()


@pytest.mark.parametrize("nbytes", [PIECE_NBYTES - 1, PIECE_NBYTES, PIECE_NBYTES + 1, 3 * PIECE_NBYTES + 5000])
def test_a_copy_of_several_pieces(store: FileStore, nbytes: int) -> None:
    tensor = torch.randint(256, (nbytes,), dtype=torch.uint8)
    stand_in = _put(store, "a", tensor)
    assert torch.equal(stand_in, tensor)
    assert torch.equal(_get(store, stand_in), tensor)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_part_is_read_and_overwritten(store: FileStore, data: st.DataObject) -> None:
    """Started without waiting in between: copies of one slot happen in order."""
    size = data.draw(st.sampled_from([9000, PIECE_NBYTES + 3 * 4096 + 7]))
    expected = torch.randint(256, (size,), dtype=torch.uint8)
    stand_in = store.put("a", expected).tensor
    reads = []
    for number in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, size))
        stop = min(size, start + data.draw(st.integers(0, 9000)))
        if data.draw(st.booleans()):
            expected = expected.clone()
            expected[start:stop] = number
            store.put_into(stand_in[start:stop], expected[start:stop])
        else:
            reads.append((store.get(stand_in[start:stop], CPU), expected[start:stop]))
    for copy, part in reads:
        assert torch.equal(copy.wait(), part)
    store.synchronize()
    assert torch.equal(stand_in, expected)


def test_rows_go_back_and_the_others_stay(store: FileStore) -> None:
    weight = torch.randn(10, 300)
    stand_in = _put(store, "weight", weight)
    rows = torch.randn(3, 300)
    store.put_into(stand_in[2:5], rows).wait()
    weight[2:5] = rows
    assert torch.equal(stand_in, weight)
    target = torch.zeros(3, 300)
    assert store.get_into(stand_in[4:7], target).wait() is target
    assert torch.equal(target, weight[4:7])


def test_a_slot_is_used_again(store: FileStore) -> None:
    first = _put(store, "a", torch.ones(2000))
    nbytes = store.nbytes
    assert _put(store, "a", torch.full((2000,), 2.0)).data_ptr() == first.data_ptr()
    assert store.nbytes == nbytes >= 8000
    assert torch.equal(_get(store, first), torch.full((2000,), 2.0))
    _put(store, "b", torch.ones(2000))
    assert store.nbytes == 2 * nbytes


def test_slots_do_not_overlap(store: FileStore) -> None:
    kept = [store.put(i, torch.full((1500 + i,), float(i))) for i in range(8)]
    for i, copy in enumerate(kept):
        assert torch.equal(_get(store, copy.wait()), torch.full((1500 + i,), float(i)))


def test_a_larger_tensor_moves_and_leaves_its_place_to_others(store: FileStore) -> None:
    _put(store, "a", torch.ones(1000))
    assert torch.equal(_get(store, _put(store, "a", torch.zeros(20_000))), torch.zeros(20_000))
    nbytes = store.nbytes
    _put(store, "b", torch.ones(1000))
    assert store.nbytes == nbytes


def test_a_dropped_slot_gives_its_place_back(store: FileStore) -> None:
    stand_in = _put(store, "a", torch.ones(1000))
    nbytes = store.nbytes
    store.drop("a")
    store.drop("a")
    with pytest.raises(ValueError, match=r"no contiguous part of what this store keeps; pass what a put\(\) gave"):
        store.get(stand_in, CPU)
    assert torch.equal(_put(store, "b", torch.zeros(1000)), torch.zeros(1000))
    assert store.nbytes == nbytes


def test_strangers_are_refused(store: FileStore) -> None:
    stand_in = _put(store, "a", torch.ones(4, 6))
    for stranger in (torch.ones(4, 6), stand_in.t(), stand_in[:, :2]):
        with pytest.raises(ValueError, match="no contiguous part of what this store keeps"):
            store.get(stranger, CPU)
    with pytest.raises(ValueError, match=r"96 bytes in the store does not match a tensor of 100 bytes"):
        store.put_into(stand_in, torch.ones(25))
    with pytest.raises(ValueError, match=r"the target of a copy of shape \(4, 6\) and strides \(1, 4\) is not contiguous"):
        store.get_into(stand_in, torch.ones(6, 4).t())
    with pytest.raises(ValueError, match="this store copies for cpu, and was given a tensor on meta; open it for that device"):
        store.put("b", torch.ones(3, device="meta"))


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
    stand_ins = [_put(store, i, tensor) for i in range(8)]
    assert allocator.live() == live
    assert _resident_nbytes() - resident < 8 * MIB
    allocator.reset()
    for stand_in in stand_ins:
        assert torch.equal(_get(store, stand_in), tensor)
    assert allocator.peak() - live <= 8 * MIB + MIB  # one copy at a time, and what `equal` needs
    assert _resident_nbytes() - resident < 24 * MIB
    assert store.nbytes == 64 * MIB


def _cached_pages(mapped: torch.Tensor) -> int:
    """Pages of a mapped file in the page cache."""
    pages = -(-mapped.numel() * mapped.element_size() // 4096)
    flags = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(pages * 4096), flags) == 0
    return sum(flag & 1 for flag in flags)


def test_the_page_cache_stays_empty(store: FileStore) -> None:
    if not store.direct:
        pytest.skip("this filesystem takes no direct transfers")
    stand_in = _put(store, "a", torch.ones(MIB))
    _get(store, stand_in)
    assert _cached_pages(stand_in) == 0


def test_a_stand_in_follows_its_slot(store: FileStore) -> None:
    """Mapped pages that were looked at show what direct transfers write later, and changes by the mapping are read."""
    stand_in = _put(store, "a", torch.zeros(MIB))
    for number in range(1, 20):
        assert bool((stand_in == number - 1).all())
        _put(store, "a", torch.full((MIB,), float(number)))
    stand_in[1000] = -1.0
    assert _get(store, stand_in)[1000].item() == -1.0


def test_memory_is_free_as_soon_as_a_copy_was_waited_for(allocator: Allocator, store: FileStore) -> None:
    """No worker holds a tensor any longer."""
    live = allocator.live()
    for _ in range(300):
        copy = store.put("a", torch.ones(3000))
        stand_in = copy.wait()
        assert allocator.live() == live
        target = _get(store, stand_in)
        assert allocator.live() == live + 12_000
        del target
        assert allocator.live() == live


def test_a_copy_nobody_waits_for_goes_on(allocator: Allocator, store: FileStore) -> None:
    live = allocator.live()
    stand_in = store.put("a", torch.ones(3000)).tensor
    store.get(stand_in, CPU)
    store.synchronize()
    assert torch.equal(stand_in, torch.ones(3000))
    assert allocator.live() == live


def test_the_file_has_no_name(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    _put(store, "a", torch.ones(4))
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_gone_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    store = FileStore(tmp_path)
    file = weakref.ref(store._file)
    _get(store, _put(store, "a", torch.ones(4)))
    workers = set(threading.enumerate()) - before
    assert workers
    del store
    gc.collect()
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
    assert file() is None


def test_it_counts_what_it_moves(store: FileStore) -> None:
    start = store.traffic
    stand_in = _put(store, "a", torch.ones(MIB))
    _get(store, stand_in[:1000])
    moved = store.traffic - start
    assert (moved.written_nbytes, moved.read_nbytes) == (4 * MIB, 4000)
    assert moved.writing_us > 0
    assert moved.reading_us > 0


def test_the_share_that_is_hidden() -> None:
    assert Traffic(reading_us=60, writing_us=40, waiting_us=15).hidden == 0.75
    assert Traffic(reading_us=60, writing_us=40, waiting_us=90).hidden == 0
    assert Traffic().hidden == 1
