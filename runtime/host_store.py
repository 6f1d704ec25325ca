"""The store in host memory beside an accelerator: pinned, with a stream for each direction."""

import weakref
from collections import defaultdict
from dataclasses import dataclass

import torch

from chunkft_compile.runtime.store import Traffic, check_sizes, flat, nbytes_of, shaped


@dataclass(eq=False)
class _Place:
    """Pinned memory, as single bytes, and the ends of the latest copies to and from it."""

    whole: torch.Tensor
    written: torch.Event | None = None
    read: torch.Event | None = None


@dataclass(frozen=True, slots=True)
class _Unwaited:
    """What a copy reads and writes. Not the copy, which holds its store: in a cycle memory outlives its use."""

    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Span:
    """Two events around something, and the fields of `Traffic` that it adds to when it has happened."""

    start: torch.Event
    stop: torch.Event
    times: str
    moves: str = ""
    nbytes: int = 0


class StreamCopy:
    """A copy on a side stream."""

    def __init__(self, store: "HostStore", tensor: torch.Tensor, source: torch.Tensor, done: torch.Event) -> None:
        self.done = done
        self._store = store
        self._tensor = tensor
        self._source: torch.Tensor | None = source  # nobody may get its memory while the side stream reads it

    @property
    def tensor(self) -> torch.Tensor:
        """See `Copy.tensor`."""
        return self._tensor

    def wait(self) -> torch.Tensor:
        """See `Copy.wait`. Only the stream waits; `HostStore.synchronize` is for those who read stand-ins on the host."""
        if self._source is not None:
            self._store.await_on_current_stream(self)
            self._source = None
        return self._tensor


class HostStore:
    """Pinned memory of the host, for tensors on the accelerator `device`.

    Memory is allocated and freed on the stream that is current for the caller, never on a side stream, and kept alive by the copy
    instead of `record_stream`: so what the allocator counts does not depend on how fast copies are.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu":
            raise ValueError("the host's memory is the budgeted memory of a CPU: nothing can be kept there, only on a disk")
        self._device = device
        self._inward, self._outward = torch.Stream(device), torch.Stream(device)
        self._slots: dict[object, _Place] = {}
        self._at: dict[int, _Place] = {}  # by address
        self._unwaited: dict[torch.Event, _Unwaited] = {}  # if the caller drops a copy, its memory must stay until it is done
        weakref.finalize(self, _await_all, device, self._unwaited).atexit = False
        self._spans: list[_Span] = []
        self._totals = defaultdict[str, float](float)

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return sum(place.whole.numel() for place in self._slots.values())

    @property
    def traffic(self) -> Traffic:
        """See `Store.traffic`."""
        self._settle()
        return Traffic(**{name: int(total) for name, total in self._totals.items()})

    def put(self, slot: object, tensor: torch.Tensor, room_nbytes: int = 0) -> StreamCopy:
        """See `Store.put`."""
        place = self._slots.get(slot)
        if place is None or place.whole.numel() < nbytes_of(tensor):
            self.drop(slot)
            room = max(1, nbytes_of(tensor), room_nbytes)
            place = self._slots[slot] = _Place(torch.empty(room, dtype=torch.uint8, device="cpu", pin_memory=True))
            self._at[place.whole.data_ptr()] = place
        return self._put(place, shaped(place.whole, tensor), tensor)

    def put_into(self, part: torch.Tensor, tensor: torch.Tensor) -> StreamCopy:
        """See `Store.put_into`."""
        place = self._find(part)
        check_sizes(part, tensor)
        return self._put(place, part, tensor)

    def get(self, stand_in: torch.Tensor, device: torch.device) -> StreamCopy:
        """See `Store.get`."""
        self._find(stand_in)  # before memory is allocated for nothing
        return self.get_into(stand_in, torch.empty(stand_in.shape, dtype=stand_in.dtype, device=device))

    def get_into(self, stand_in: torch.Tensor, target: torch.Tensor) -> StreamCopy:
        """See `Store.get_into`."""
        place = self._find(stand_in)
        check_sizes(stand_in, target)
        if place.written is not None:
            self._inward.wait_event(place.written)  # its bytes may still be on their way out
        copy = self._copy(self._inward, stand_in, target, "reading_us", "read_nbytes")
        place.read = copy.done
        return copy

    def drop(self, slot: object) -> None:
        """See `Store.drop`. Copies of it may be under way: torch keeps pinned memory until the streams that use it have come past."""
        place = self._slots.pop(slot, None)
        if place is not None:
            del self._at[place.whole.data_ptr()]

    def synchronize(self) -> None:
        """See `Store.synchronize`."""
        self._outward.synchronize()  # the host reads what this stream writes
        self._inward.synchronize()  # the host may write to what this one reads
        self._settle()

    def await_on_current_stream(self, copy: StreamCopy) -> None:
        """Let the current stream wait until `copy` is done."""
        stream = torch.accelerator.current_stream(self._device)
        before = self._mark(stream)
        # Of a get: what is queued next reads the target. Of a put: what is queued next overwrites the source, or the memory that the
        # allocator makes of it when it is freed.
        stream.wait_event(copy.done)
        self._spans.append(_Span(before, self._mark(stream), "waiting_us"))
        self._unwaited.pop(copy.done, None)

    def _put(self, place: _Place, stand_in: torch.Tensor, tensor: torch.Tensor) -> StreamCopy:
        source = tensor.detach().contiguous()  # on the current stream, where its memory belongs
        if place.read is not None:
            self._outward.wait_event(place.read)  # a get that was started before is to see the old bytes
        copy = self._copy(self._outward, source, stand_in, "writing_us", "written_nbytes")
        place.written = copy.done
        return copy

    def _copy(self, stream: torch.Stream, source: torch.Tensor, target: torch.Tensor, times: str, moves: str) -> StreamCopy:
        self._settle()
        memory, contents = flat(target, "the target of a copy"), flat(source, "a tensor")
        # What makes the source may still be queued, and so may work on the block that the allocator has handed out as the target.
        stream.wait_event(torch.accelerator.current_stream(self._device).record_event())
        start = self._mark(stream)
        with stream:
            memory.copy_(contents, non_blocking=True)
        copy = StreamCopy(self, target, source, self._mark(stream))
        self._spans.append(_Span(start, copy.done, times, moves, nbytes_of(target)))
        self._unwaited[copy.done] = _Unwaited(source, target)
        return copy

    def _find(self, stand_in: torch.Tensor) -> _Place:
        place = self._at.get(stand_in.untyped_storage().data_ptr())
        if place is None or not stand_in.is_contiguous():
            raise ValueError(
                f"a tensor of shape {tuple(stand_in.shape)} on {stand_in.device} is no contiguous part of what this store keeps; "
                f"pass what a put() gave, or a view of it, as long as its slot is not dropped"
            )
        return place

    def _mark(self, stream: torch.Stream) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record(stream)
        return event

    def _settle(self) -> None:
        """Count what is done, and let go of copies that are done and that nobody waits for."""
        spans, self._spans = self._spans, []
        for span in spans:
            if not span.stop.query():
                self._spans.append(span)
                continue
            self._totals[span.times] += 1000 * span.start.elapsed_time(span.stop)
            if span.moves:
                self._totals[span.moves] += span.nbytes
        for done in [done for done in self._unwaited if done.query()]:
            del self._unwaited[done]


def _await_all(device: torch.device, unwaited: dict[torch.Event, _Unwaited]) -> None:
    """Before the memory of copies under way goes back with their store: the current stream, whose memory it is, waits for them."""
    for done in unwaited:
        torch.accelerator.current_stream(device).wait_event(done)
    unwaited.clear()
