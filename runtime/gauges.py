"""Live bytes of a device and their peak between two readings, at no cost that a step would notice."""

from typing import NamedTuple, Protocol

import torch

from chunkft_compile.runtime.allocators import Allocator
from chunkft_compile.runtime.chunks import BLOCK_NBYTES


class Reading(NamedTuple):
    """Bytes live now, and the most since the reading before."""

    live_nbytes: int
    peak_nbytes: int


class Gauge(Protocol):
    """Reads one device. All bytes of the process on it count, whatever they belong to. `exact` says that every peak is known."""

    @property
    def exact(self) -> bool:
        """Whether peaks are what they are called, and not only at least that."""
        ...

    def read(self) -> Reading:
        """Live bytes, and their peak since the last call."""
        ...


class CpuGauge:
    """By the allocator hook, exactly, with a peak that nobody else resets."""

    exact = True

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator

    def read(self) -> Reading:
        """See `Gauge.read`."""
        peak = self._allocator.guarded
        reading = Reading(self._allocator.live(), peak.nbytes())
        peak.reset()
        return reading


def has_planned_blocks(device: torch.device) -> bool:
    """Whether an accelerator rounds as plans assume; where it does not, planned and measured changes differ."""
    before = torch.accelerator.memory_allocated(device)
    probe = torch.empty(1, dtype=torch.uint8, device=device)
    return torch.accelerator.memory_allocated(device) - before == BLOCK_NBYTES * probe.numel()


class AcceleratorGauge:
    """By the allocator's own statistics; neither reading nor resetting them waits for the device.

    There is one peak statistic per device, and it is the user's. So unless `exact`, it is not reset: where it rose since the last
    reading it is the peak since then, and where it did not, the peak was no higher than one before, and live bytes are all that is
    known. Bytes are those of whole blocks, which is what a plan for an accelerator counts.
    """

    def __init__(self, device: torch.device, *, exact: bool) -> None:
        self._device, self.exact = device, exact
        self._highest_nbytes = 0

    def read(self) -> Reading:
        """See `Gauge.read`."""
        stats = torch.accelerator.memory_stats(self._device)
        live, highest = (int(stats.get(f"allocated_bytes.all.{what}", 0)) for what in ("current", "peak"))
        peak = highest if self.exact or highest != self._highest_nbytes else live
        if self.exact:
            torch.accelerator.reset_peak_memory_stats(self._device)
        self._highest_nbytes = highest
        return Reading(live, peak)
