"""The hook counts, caps and forgives blocks it never handed out."""

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

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
