"""What a run really takes, for the live line and the report."""

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

import torch
from torch import nn

from chunkft_compile.runtime.allocators import Allocator, install
from chunkft_compile.runtime.meter import PeakMeter
from chunkft_compile.runtime.native import BuildError

_STATM = Path("/proc/self/statm")


def rss_nbytes() -> int | None:
    """Resident memory of this process, where the system tells: everything, with libraries and files that are mapped."""
    if not _STATM.exists():
        return None
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_nbytes(device: torch.device, *, ignore: Iterable[torch.Tensor] = ()) -> int:
    """Bytes on `device` of every storage made by the allocator that some tensor refers to, without `ignore`.

    Mapped files (the store of optimizer state, and of weights that are away) do not count. Slow (it visits every Python object) and right
    between steps only: inside one, autograd holds tensors that Python cannot see.
    """
    skipped = {tensor.untyped_storage().data_ptr() for tensor in ignore}
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        # type(), because isinstance() asks lazy module proxies for their class and makes them import things; exactly these two,
        # because subclasses are fake (no memory) or made of plain tensors, which are counted themselves
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout is torch.strided and thing.device.type == device.type:
            storage = thing.untyped_storage()
            with suppress(RuntimeError):  # what tracing leaves behind can look plain and have no memory
                pointer = storage.data_ptr()
                if storage.resizable() and pointer not in skipped:  # foreign memory cannot be resized
                    found[pointer] = storage.nbytes()
    return sum(found.values())


class _HookMeter:
    """As `PeakMeter` by the hook, but the engine may measure inside: it has a peak of its own, and takes no lock."""

    peak_nbytes: int

    def __init__(self, hook: Allocator) -> None:
        self._hook = hook

    def __enter__(self) -> Self:
        self._hook.reset()
        self._entry_nbytes = self._hook.live()
        return self

    def __exit__(self, *exception: object) -> None:
        self.peak_nbytes = self._hook.peak() - self._entry_nbytes


def _cpu_meter() -> _HookMeter | PeakMeter:
    try:
        return _HookMeter(install())
    except BuildError:
        return PeakMeter("cpu")


class PeakWatch:
    """Context manager around a training loop that calls `count_step()`: the most device memory any step used, None until known.

    An accelerator counts by itself, in every step. On the CPU `measured_steps` steps are measured, from the second one on: by the
    allocator hook, or where that cannot be built under torch's profiler. That does not see the end of older blocks, so what it finds
    is an upper bound; and in the first step the engine itself measures the optimizer, and measurements cannot overlap.
    Tensors in `ignore` (the data set) are not what a budget covers.
    """

    def __init__(self, device: torch.device, *, measured_steps: int, ignore: Iterable[torch.Tensor] = ()) -> None:
        self.peak_nbytes: int | None = None
        self._device = device
        self._ignore = tuple(ignore)
        self._measured_steps = measured_steps if device.type == "cpu" else 0
        self._steps = 0
        self._session = ExitStack()
        self._meter: _HookMeter | PeakMeter | None = None
        self._before_nbytes = self._most_nbytes = 0

    def __enter__(self) -> Self:
        if self._device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        self._session.close()

    def count_step(self) -> None:
        """One step is over."""
        self._steps += 1
        if self._device.type != "cpu":
            self._note(torch.accelerator.max_memory_allocated(self._device))
        elif self._measured_steps and self._steps == 1:
            # One session over all steps: the profiler does not report the end of a block that an earlier session saw allocated.
            self._begin()
        elif self._measured_steps and self._steps == 1 + self._measured_steps:
            self._end()
            self.peak_nbytes = self._most_nbytes

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside belongs to no step, and does not count."""
        measuring = self._meter is not None
        if measuring:
            self._end()
        yield
        if self._device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self._device)
        elif measuring:
            self._begin()

    def _begin(self) -> None:
        self._before_nbytes = live_nbytes(self._device, ignore=self._ignore)
        self._meter = _cpu_meter()
        self._session.enter_context(self._meter)

    def _end(self) -> None:
        assert self._meter is not None, "measuring began"
        self._session.close()
        self._most_nbytes = max(self._most_nbytes, self._before_nbytes + self._meter.peak_nbytes)
        self._meter = None

    def _note(self, nbytes: int) -> None:
        self.peak_nbytes = max(nbytes, self.peak_nbytes or 0)
