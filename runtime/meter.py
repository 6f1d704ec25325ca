"""How much memory and time something really takes, on any device.

Memory is allocator bytes: what tensors and the temporaries inside operators occupy, on the CPU to the byte. Accelerators keep
such statistics themselves (rounded up to their block size). The CPU allocator keeps none: the hook of `allocators` does, and where
that cannot be built, torch's profiler is told of every allocation that is made on its own thread.

NOTE [threads of operators]
Some operators allocate on the threads they share their work with: of the backward of attention each takes a row of sums
(`_scaled_dot_product_flash_attention_for_cpu_backward`, 256 bytes a thread, torch 2.13). The hook counts those; the profiler does not see
them, so without a compiler a plan for several threads can be some hundred bytes low. On a busy machine one thread may be done before the
next begins, and then their rows are not there together: where there are several threads, the most of some runs counts.

NOTE [one measurement at a time]
Starting a second profiler on one thread silently ends the first, and two at once on two threads crash the process (torch 2.13).
The peak statistic of the hook, and that of an accelerator, is one, so a second reader would reset the first one's. Hence the lock
below, for all, and the refusal to start under somebody else's profiler.

NOTE [frees of older blocks]
The profiler knows the size of a block only if it watched the allocation. The free of an older block is not reported at all, or, if
an older session saw another block at the same address, with the size of that one. So frees are matched by address, and those of
blocks that were not allocated under this profiler are left out: on the CPU they make no room.
"""

import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _EventType
from torch.autograd import profiler

from chunkft_compile.runtime.allocators import Allocator, install
from chunkft_compile.runtime.garbage import uncollected
from chunkft_compile.runtime.native import BuildError

_SPAN = "chunkft_compile.measure_calls"
_TIMED_RUNS = 2
_THREADED_RUNS = 4  # for memory, see NOTE [threads of operators]
_measuring = threading.Lock()


@dataclass(frozen=True, slots=True)
class CallCost:
    """What one call takes, relative to the moment it starts: `peak_nbytes - end_nbytes` are its temporaries if it frees nothing older."""

    peak_nbytes: int
    end_nbytes: int
    seconds: float


class PeakMeter:
    """Context manager: the most bytes allocated on `device` above those live at entry.

    After the block, `peak_nbytes` is that maximum (never below 0) and `end_nbytes` is live at exit minus live at entry.

    Everything counts, on all threads, and frees of older blocks make room. numpy, shared memory and mapped files are not allocator memory.
    An accelerator is synchronised at both ends and its peak statistics are reset.
    A CPU without a compiler: both figures are upper bounds if something older is freed inside, because such frees are not seen, and neither
    are other threads: enter and leave on one.
    Meters do not nest and do not run under a torch profiler: both raise RuntimeError.
    """

    peak_nbytes: int
    end_nbytes: int

    def __init__(self, device: torch.device | str) -> None:
        self._device = _measurable(device)

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            opening.enter_context(_alone())
            self._statistics = _statistics_of(self._device)
            if self._statistics is None:
                self._record = opening.enter_context(_recording())
            else:
                self._entry_nbytes = self._statistics.reset()
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._open:
            if self._statistics is not None:
                self.peak_nbytes, self.end_nbytes = self._statistics.extent(self._entry_nbytes)
        if self._statistics is None:
            self.peak_nbytes, self.end_nbytes = _extent([change.nbytes for change in self._record.changes])


def measure_calls(calls: Sequence[Callable[[], object]], device: torch.device | str) -> list[CallCost]:
    """Memory and wall seconds of each call, in order. Each runs to warm up, for memory (more often on several threads), and for time.

    Calls must be repeatable. What they return counts in `end_nbytes` and is dropped before the next one starts. `seconds` is the
    better of two further runs. The limits of `PeakMeter` apply; the cyclic garbage collector is off while measuring, for it
    would free older tensors in the middle of a call and take time there, and random generators are put back afterwards.
    """
    device = _measurable(device)
    with _alone(), uncollected(), _same_randomness(device):
        for call in calls:
            call()
        statistics = _statistics_of(device)
        if statistics is None:
            extents = _profiled_extents(calls)
        else:
            several = device.type == "cpu" and torch.get_num_threads() > 1
            runs = [[_extent_of(call, statistics) for call in calls] for _ in range(_THREADED_RUNS if several else 1)]
            extents = [max(extents) for extents in zip(*runs, strict=True)]
        seconds = [min(_timed(call, device) for _ in range(_TIMED_RUNS)) for call in calls]
    return [CallCost(peak, end, s) for (peak, end), s in zip(extents, seconds, strict=True)]


@contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    """Measured calls may draw random numbers (dropout); the program around them must not notice."""
    on_device: Any = None if device.type == "cpu" else torch.get_device_module(device.type)
    state = torch.get_rng_state()
    device_state = on_device.get_rng_state(device) if hasattr(on_device, "get_rng_state") else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if device_state is not None:
            on_device.set_rng_state(device_state, device)


class _Change(NamedTuple):
    """A block was allocated (`nbytes` > 0) or freed (< 0)."""

    time_ns: int
    address: int
    nbytes: int


@dataclass(slots=True)
class _Record:
    """What the profiler saw, in order and on its own clock: changes of memory, and begin and end of each call."""

    changes: list[_Change] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)


@contextmanager
def _recording() -> Iterator[_Record]:
    """Profile the block; the record is filled when it ends."""
    record = _Record()
    with ExitStack() as running:
        with _muted_kineto():
            session = running.enter_context(profiler.profile(profile_memory=True))
        yield record
        undisturbed = _profiler_enabled()
    if not undisturbed or session.kineto_results is None:
        raise RuntimeError("another torch profiler ended this measurement: nothing inside may start one")
    nodes = list(session.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.tag == _EventType.Allocation and node.extra_fields.device.type == "cpu":
            record.changes.append(_Change(node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
        elif node.name == _SPAN:
            record.spans.append((node.start_time_ns, node.end_time_ns))
    record.changes = _own_changes(sorted(record.changes))
    record.spans.sort()


def _own_changes(changes: Sequence[_Change]) -> list[_Change]:
    """Without frees of blocks that no change before them allocated, see NOTE [frees of older blocks]."""
    own, live = [], set()
    for change in changes:
        if change.nbytes > 0:
            live.add(change.address)
        elif change.address in live:
            live.remove(change.address)
        else:
            continue
        own.append(change)
    return own


def _extent(changes: Sequence[int]) -> tuple[int, int]:
    """The peak and the end of a running sum that starts at 0."""
    live = peak = 0
    for nbytes in changes:
        live += nbytes
        peak = max(peak, live)
    return peak, live


def _profiled_extents(calls: Sequence[Callable[[], object]]) -> list[tuple[int, int]]:
    """Peak and end of each call, from one profiler session: starting one costs more than most calls."""
    with _recording() as record:
        for call in calls:
            # The range is stamped by the clock that stamps [memory] events; no other clock could be compared with it safely.
            with profiler.record_function(_SPAN):
                result = call()
            del result
    times = [change.time_ns for change in record.changes]
    windows = [slice(bisect_left(times, begin), bisect_right(times, end)) for begin, end in record.spans]
    return [_extent([change.nbytes for change in record.changes[window]]) for window in windows]


class _Statistics(Protocol):
    """Live bytes and their peak, as an allocator keeps them."""

    def reset(self) -> int:
        """Start a new peak; the bytes live now."""
        ...

    def extent(self, entry_nbytes: int) -> tuple[int, int]:
        """Peak and end relative to `entry_nbytes`."""
        ...


class _AcceleratorStatistics:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> int:
        _synchronize(self._device)
        torch.accelerator.reset_peak_memory_stats(self._device)
        return torch.accelerator.memory_allocated(self._device)

    def extent(self, entry_nbytes: int) -> tuple[int, int]:
        _synchronize(self._device)
        peak, live = torch.accelerator.max_memory_allocated(self._device), torch.accelerator.memory_allocated(self._device)
        return peak - entry_nbytes, live - entry_nbytes


class _HookStatistics:
    def __init__(self, hook: Allocator) -> None:
        self._hook = hook

    def reset(self) -> int:
        self._hook.metered.reset()
        return self._hook.live()

    def extent(self, entry_nbytes: int) -> tuple[int, int]:
        return self._hook.metered.nbytes() - entry_nbytes, self._hook.live() - entry_nbytes


def _statistics_of(device: torch.device) -> _Statistics | None:
    """Those of the device's allocator; None where it keeps none."""
    if device.type != "cpu":
        return _AcceleratorStatistics(device)
    try:
        return _HookStatistics(install())
    except BuildError:
        return None


def _extent_of(call: Callable[[], object], statistics: _Statistics) -> tuple[int, int]:
    entry_nbytes = statistics.reset()
    result = call()
    extent = statistics.extent(entry_nbytes)
    del result
    return extent


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; its result is dropped after the clock has stopped.

    A single thread on the CPU is timed by its own clock: what other processes take in between is not part of the call.
    """
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _synchronize(device)
    start = clock()
    result = call()
    _synchronize(device)
    seconds = clock() - start
    del result
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _measurable(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise ValueError(f"cannot measure on {device}: this machine has the CPU and {accelerator or 'no accelerator'}")
    return device


@contextmanager
def _alone() -> Iterator[None]:
    """See NOTE [one measurement at a time]."""
    if not _measuring.acquire(blocking=False):
        raise RuntimeError("a measurement is already running in this process: measurements do not nest or run side by side")
    try:
        # The first is per process, the second also knows profilers started on this thread from C++.
        if profiler._is_profiler_enabled or _profiler_enabled():
            raise RuntimeError("a torch profiler is running: stop it before measuring memory")
        yield
    finally:
        _measuring.release()


@contextmanager
def _muted_kineto() -> Iterator[None]:
    """Keep torch 2.13 from printing two "USDT" lines per session, which its log ranks above errors.

    Kineto reads the level once, at the first session of the process, so it is set for that moment only and never over the user's own.
    """
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = "7"
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]
