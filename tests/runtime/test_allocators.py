"""The hook counts, caps, adopts older blocks, and can leave."""

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

from chunkft_compile.runtime.allocators import Peak
from tests.support.allocator import Allocator, allocator_or_skip

KIB = 1024


@pytest.fixture
def allocator() -> Iterator[Allocator]:
    hook = allocator_or_skip()
    gc.collect()  # garbage of other tests must not be freed in the middle of this one
    hook.reset()
    yield hook
    hook.cap(None)


def _bytes(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def test_live_and_peak_are_exact(allocator: Allocator) -> None:
    before = allocator.live()
    kept = _bytes(3 * KIB)
    del kept
    kept = _bytes(KIB)
    assert (allocator.live() - before, allocator.peak() - before) == (KIB, 3 * KIB)
    allocator.reset()
    assert allocator.peak() == allocator.live()
    assert kept.nbytes == KIB


def test_other_threads_count(allocator: Allocator) -> None:
    before = allocator.live()
    kept: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: kept.extend(_bytes(KIB) for _ in range(100))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert allocator.live() - before == 400 * KIB
    kept.clear()
    assert allocator.live() == before


def test_the_cap_is_exact_and_can_be_lifted(allocator: Allocator) -> None:
    before = allocator.live()
    allocator.cap(before + KIB)
    exact = _bytes(KIB)
    with pytest.raises(torch.OutOfMemoryError, match=f"{before + KIB} live, 1 more requested"):
        _bytes(1)
    assert (allocator.live(), allocator.peak()) == (before + KIB, before + KIB)
    allocator.cap(None)
    assert _bytes(1).nbytes + exact.nbytes == KIB + 1


def test_blocks_of_another_allocator_do_not_count(allocator: Allocator) -> None:
    before = allocator.live()
    foreign = torch.UntypedStorage(KIB)  # type: ignore[no-untyped-call]
    assert allocator.live() == before
    foreign.resize_(2 * KIB)
    del foreign
    assert allocator.live() == before


def test_a_peak_does_not_notice_the_reset_of_another(allocator: Allocator) -> None:
    before, own = allocator.live(), allocator.guarded
    own.reset()
    _bytes(2 * KIB)
    allocator.reset()
    _bytes(KIB)
    assert (own.nbytes() - before, allocator.peak() - before) == (2 * KIB, KIB)


def test_the_last_peak_is_given_once(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    library = allocator._library
    monkeypatch.setattr(library, "allocator_open_peak", lambda: -1)
    with pytest.raises(RuntimeError, match="no peak left"):
        Peak(library)


def test_removed_it_counts_nothing_but_the_end_of_its_own_blocks(allocator: Allocator) -> None:
    before, counted = allocator.live(), _bytes(KIB)
    assert allocator.remove()
    try:
        assert not allocator.remove()
        other = _bytes(2 * KIB)
        assert allocator.live() - before == KIB
        del counted
        assert allocator.live() == before
    finally:
        assert allocator.install()
    assert not allocator.install()
    del other
    assert allocator.live() == before


def test_an_adopted_block_counts_until_it_is_freed(allocator: Allocator) -> None:
    allocator.remove()
    older = torch.arange(256, dtype=torch.int32)
    allocator.install()
    before = allocator.live()
    allocator.reset()
    assert allocator.adopt([older, older[3:]]) == KIB
    assert (allocator.live() - before, allocator.peak() - before) == (KIB, KIB)
    assert older.sum() == 255 * 128
    older.untyped_storage().resize_(2 * KIB)
    assert allocator.live() - before == 2 * KIB
    assert older.sum() == 255 * 128
    del older
    assert allocator.live() == before


def test_shared_and_foreign_memory_is_not_adopted(allocator: Allocator) -> None:
    foreign = torch.frombuffer(bytearray(KIB), dtype=torch.uint8)
    shared = _bytes(KIB).share_memory_()  # type: ignore[no-untyped-call]
    assert allocator.adopt([foreign, shared, torch.empty(KIB, device="meta"), torch.empty(0)]) == 0
    assert shared.is_shared()
