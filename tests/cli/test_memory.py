"""`memory`: what a run holds is counted once, and the measured peak is that of the loop."""

import gc
import mmap

import torch

from chunkft_compile.cli.memory import PeakWatch, live_nbytes, rss_nbytes
from tests.support.allocator import allocator_or_skip

CPU = torch.device("cpu")
MIB = 2**20


def test_live_bytes_count_storages_once_and_leave_the_ignored_out() -> None:
    gc.collect()
    before = live_nbytes(CPU)
    kept = torch.empty(3 * MIB, dtype=torch.uint8)
    view = kept[: 2 * MIB].view(torch.int32)
    ignored = torch.empty(MIB, dtype=torch.uint8)
    elsewhere = torch.empty(MIB, device="meta")
    assert live_nbytes(CPU, ignore=[ignored]) - before == 3 * MIB
    assert (view.device, elsewhere.device.type) == (CPU, "meta")


def test_mapped_memory_does_not_count() -> None:
    mapped = torch.frombuffer(mmap.mmap(-1, MIB), dtype=torch.uint8)
    gc.collect()
    before = live_nbytes(CPU)
    del mapped
    assert live_nbytes(CPU) == before


def test_the_peak_of_the_measured_steps_includes_what_was_there_before() -> None:
    weight = torch.empty(4 * MIB, dtype=torch.uint8)
    kept = []
    gc.collect()
    base = live_nbytes(CPU, ignore=[weight])
    with PeakWatch(CPU, measured_steps=2, ignore=[weight]) as watch:
        for nbytes in (8 * MIB, MIB, 2 * MIB, 8 * MIB):
            torch.empty(nbytes, dtype=torch.uint8)
            kept.append(torch.empty(MIB, dtype=torch.uint8))
            watch.count_step()
    # third step: 1 MiB kept from each of the first two, 2 MiB for a moment; the first and the last are not measured
    assert watch.peak_nbytes == base + 4 * MIB


def test_a_block_that_ends_makes_room() -> None:
    allocator_or_skip()
    older = torch.empty(8 * MIB, dtype=torch.uint8)
    gc.collect()
    base = live_nbytes(CPU)
    with PeakWatch(CPU, measured_steps=1) as watch:
        watch.count_step()
        del older
        torch.empty(2 * MIB, dtype=torch.uint8)
        watch.count_step()
    assert watch.peak_nbytes == base


def test_what_happens_aside_does_not_count() -> None:
    allocator_or_skip()
    kept = []
    gc.collect()
    base = live_nbytes(CPU)
    with PeakWatch(CPU, measured_steps=2) as watch:
        for number, nbytes in enumerate((MIB, 3 * MIB, 2 * MIB)):
            with watch.aside():
                torch.empty(32 * MIB, dtype=torch.uint8)
                kept.append(torch.empty(MIB, dtype=torch.uint8))  # as the state that a step makes, and as memory it is counted
            torch.empty(nbytes, dtype=torch.uint8)
            watch.count_step()
            assert (watch.peak_nbytes is None) == (number < 2)
    assert watch.peak_nbytes == base + (2 + 3) * MIB  # the second step; the third has 3 MiB kept and needs 2 more


def test_nothing_is_measured_unless_asked() -> None:
    with PeakWatch(CPU, measured_steps=0) as watch:
        watch.count_step()
    assert watch.peak_nbytes is None


def test_resident_memory_of_this_process() -> None:
    rss = rss_nbytes()
    assert rss is None or rss > 50 * MIB
