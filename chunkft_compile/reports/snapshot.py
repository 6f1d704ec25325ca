"""A sweep as a snapshot of CUDA's caching allocator, for `python -m torch.cuda._memory_viz` and https://pytorch.org/memory_viz.

Every lifetime and every workspace is one allocation; what is there through a whole step and through the next one stays. Addresses are
made up (first fit in one segment), as are frames: the first one names the bytes, the second the step and the instruction of their coming.
The snapshot is taken at the end of the last step.
"""

import pickle
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from chunkft_compile.planner import Category, Lifetime, Plan, Trace, traces_of

# The viewers read no later one: with protocol 5 their page stays blank.
_PROTOCOL = 4

_BASE = 1 << 32  # where addresses begin; 0 looks like none

# The page colours by category as soon as one event has one, and fails where none of them is "unknown". This event moves no bytes.
_FIRST_EVENT = {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "frames": [], "category": "unknown", "time_us": 0}


def to_snapshot(planned: Plan) -> bytes:
    """The snapshot, pickled."""
    traces = traces_of(planned)
    times = accumulate((instant.us for trace in traces for instant in trace.instants), initial=0)
    events, live = _play(_allocations(traces), list(times))
    snapshot = {"device_traces": [events], "segments": [_segment(events, live)], "allocator_settings": {}, "external_annotations": []}
    return pickle.dumps(snapshot, protocol=_PROTOCOL)


@dataclass(eq=False)
class _Allocation:
    """Bytes from the instant `first` of the sweep to the instant `last`, both included."""

    nbytes: int
    category: Category
    first: int
    last: int
    frames: list[dict[str, Any]]
    address: int = 0


def _allocations(traces: Sequence[Trace]) -> list[_Allocation]:
    """In the order of their coming; workspaces come last, on top of everything else."""
    found: list[_Allocation] = []
    staying: dict[tuple[str, Category, int], list[_Allocation]] = {}
    start = 0
    for number, trace in enumerate(traces, 1):
        step, end = f"step {number} of {len(traces)}", len(trace.instants) - 1
        stayed, staying = staying, {}
        for lifetime in (*trace.lifetimes, *_workspaces(trace)):
            whole = (lifetime.first, lifetime.last) == (0, end) and lifetime.category is not Category.WORKSPACE
            key = lifetime.name, lifetime.category, lifetime.nbytes
            if whole and stayed.get(key):
                allocation = stayed[key].pop()
                allocation.last = start + end
            else:
                came = {"filename": step, "line": lifetime.first + 1, "name": trace.instants[lifetime.first].name}
                frames = [{"filename": str(lifetime.category), "line": number, "name": lifetime.name}, came]
                allocation = _Allocation(lifetime.nbytes, lifetime.category, start + lifetime.first, start + lifetime.last, frames)
                found.append(allocation)
            if whole:
                staying.setdefault(key, []).append(allocation)
        start += len(trace.instants)
    return sorted(found, key=lambda allocation: (allocation.first, allocation.category is Category.WORKSPACE))


def _workspaces(trace: Trace) -> Iterator[Lifetime]:
    for n, nbytes in enumerate(trace.stacks()[Category.WORKSPACE]):
        if nbytes:
            yield Lifetime(f"workspace of {trace.instants[n].name}", Category.WORKSPACE, nbytes, n, n)


def _play(allocations: Sequence[_Allocation], times: Sequence[int]) -> tuple[list[dict[str, Any]], list[_Allocation]]:
    """The events of all instants, and what is still there after them. `times` are the beginnings of the instants, and the end."""
    memory, events, end = _Memory(), [_FIRST_EVENT], len(times) - 2
    goes: list[list[_Allocation]] = [[] for _ in times]
    waiting = deque(allocations)
    for n, us in enumerate(times[:-1]):
        while waiting and waiting[0].first == n:
            allocation = waiting.popleft()
            memory.place(allocation)
            events.append(_event("alloc", allocation, us))
            if allocation.last < end or allocation.category is Category.WORKSPACE:
                goes[allocation.last].append(allocation)
        for allocation in reversed(goes[n]):
            memory.live.remove(allocation)
            # one directly after the other: the viewers take the two for one event
            events += [_event("free_requested", allocation, times[n + 1]), _event("free_completed", allocation, times[n + 1])]
    return events, memory.live


@dataclass
class _Memory:
    """What is live, by address."""

    live: list[_Allocation] = field(default_factory=list)

    def place(self, allocation: _Allocation) -> None:
        """Give it the lowest address with room."""
        address = _BASE
        for other in self.live:
            if address + allocation.nbytes <= other.address:
                break
            address = other.address + other.nbytes
        allocation.address = address
        insort(self.live, allocation, key=lambda allocation: allocation.address)


def _event(action: str, allocation: _Allocation, us: int) -> dict[str, Any]:
    where = {"action": action, "addr": allocation.address, "size": allocation.nbytes, "stream": 0, "time_us": us}
    return {**where, "frames": allocation.frames, "category": str(allocation.category)}


def _segment(events: Sequence[dict[str, Any]], live: Sequence[_Allocation]) -> dict[str, Any]:
    """One segment around all addresses that were ever in use, with its blocks at the end."""
    highest = max(event["addr"] + event["size"] for event in events)
    blocks, address = [], _BASE
    for allocation in live:
        blocks += _gap(address, allocation.address)
        size = {"address": allocation.address, "size": allocation.nbytes, "requested_size": allocation.nbytes}
        blocks.append({**size, "state": "active_allocated", "frames": allocation.frames})
        address = allocation.address + allocation.nbytes
    blocks += _gap(address, highest)
    held = sum(allocation.nbytes for allocation in live)
    sizes = {"total_size": highest - _BASE, "allocated_size": held, "active_size": held, "requested_size": held}
    kind = {"device": 0, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0), "is_expandable": False}
    return {"address": _BASE, **sizes, **kind, "frames": [], "blocks": blocks}


def _gap(first: int, last: int) -> list[dict[str, Any]]:
    if first == last:
        return []
    return [{"address": first, "size": last - first, "requested_size": 0, "state": "inactive", "frames": []}]
