"""The store on a disk: one file, read and written by worker threads through a few staging buffers."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from chunkft_compile.runtime.ranges import Range, Ranges
from chunkft_compile.runtime.scratch import PAGE, ScratchFile
from chunkft_compile.runtime.store import Traffic, check_sizes, flat, shaped
from chunkft_compile.runtime.transfers import Direction, Job, Transfers

_CPU = torch.device("cpu")


@dataclass(eq=False)
class _Place:
    """A range of the file, the tensor of single bytes that maps it, and the latest copies of it."""

    range: Range
    whole: torch.Tensor
    used: int = 0  # bytes of it that hold something
    written: Job | None = None
    read: list[Job] = field(default_factory=list)  # since then

    @property
    def jobs(self) -> list[Job]:
        """All that may be under way."""
        return [*self.read, *([self.written] if self.written is not None else [])]


class FileCopy:
    """A copy to or from the file."""

    def __init__(self, store: "FileStore", tensor: torch.Tensor, source: torch.Tensor | None, job: Job) -> None:
        self._store = store
        self._tensor = tensor
        self._source = source  # lives until its bytes are in the file: if they never are, it is all there is of them
        self._job = job

    @property
    def tensor(self) -> torch.Tensor:
        """See `Copy.tensor`."""
        return self._tensor

    def wait(self) -> torch.Tensor:
        """See `Copy.wait`."""
        if not self._job.done.is_set():
            start = time.perf_counter_ns()
            # A worker says so when all bytes are in place, those of an accelerator too: streams need no wait of their own.
            self._job.done.wait()
            self._store.waited_ns += time.perf_counter_ns() - start
        self._job.check()
        self._source = None
        return self._tensor


class FileStore:
    """One file; each slot is a page-aligned range of it. `device` is where the tensors are.

    Space is claimed when a slot is made and used again when it is given up. A stand-in maps its range for those who look at it in
    between, and takes no memory until then. Copies go through four staging buffers of 2 MiB, which are pinned beside an accelerator
    and count on no allocator on a CPU. `direct` says whether they go around the page cache.
    """

    def __init__(self, directory: Path, device: torch.device = _CPU) -> None:
        self._device = device
        self._file = ScratchFile(directory)
        self.direct = self._file.direct
        self._transfers = Transfers(self._file, device)
        self._ranges = Ranges(PAGE)
        self._slots: dict[object, _Place] = {}
        self._at: dict[int, _Place] = {}  # by the address of the mapping
        self._started: list[Job] = []  # that are not done, or have failed and told nobody
        self.waited_ns = 0  # nanoseconds that threads stood in `FileCopy.wait`

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self._ranges.end

    @property
    def traffic(self) -> Traffic:
        """See `Store.traffic`."""
        reading, writing = self._transfers.meters[Direction.READ], self._transfers.meters[Direction.WRITE]
        return Traffic(reading.nbytes, writing.nbytes, reading.busy_us, writing.busy_us, self.waited_ns // 1000)

    def put(self, slot: object, tensor: torch.Tensor, room_nbytes: int = 0) -> FileCopy:
        """See `Store.put`."""
        source = tensor.detach().contiguous()
        contents = self._bytes(source)
        place = self._slots.get(slot)
        if place is None or place.range.nbytes < contents.numel():
            place = self._replace(slot, max(contents.numel(), room_nbytes))
        place.used = contents.numel()
        job = Job(Direction.WRITE, contents, place.range.start, place.range.start + place.used, place.jobs)
        return self._write(place, job, shaped(place.whole, tensor), source)

    def put_into(self, part: torch.Tensor, tensor: torch.Tensor) -> FileCopy:
        """See `Store.put_into`."""
        place, start = self._find(part)
        check_sizes(part, tensor)
        source = tensor.detach().contiguous()
        used = place.range.start + place.used
        return self._write(place, Job(Direction.WRITE, self._bytes(source), start, used, place.jobs, place.written), part, source)

    def get(self, stand_in: torch.Tensor, device: torch.device) -> FileCopy:
        """See `Store.get`."""
        self._find(stand_in)  # before memory is allocated for nothing
        return self.get_into(stand_in, torch.empty(stand_in.shape, dtype=stand_in.dtype, device=device))

    def get_into(self, stand_in: torch.Tensor, target: torch.Tensor) -> FileCopy:
        """See `Store.get_into`."""
        place, start = self._find(stand_in)
        check_sizes(stand_in, target)
        job = Job(Direction.READ, self._bytes(target), start, start, (), place.written)
        place.read = [read for read in place.read if not read.done.is_set()]
        place.read.append(job)
        self._start(job)
        return FileCopy(self, target, None, job)

    def drop(self, slot: object) -> None:
        """See `Store.drop`."""
        place = self._slots.pop(slot, None)
        if place is None:
            return
        for job in place.jobs:
            job.done.wait()  # its bytes go to another slot, which no late copy may touch
        del self._at[place.whole.data_ptr()]
        self._ranges.give_back(place.range)

    def synchronize(self) -> None:
        """See `Store.synchronize`."""
        for job in self._started:
            job.done.wait()  # whoever reads a stand-in next reads the file, and the workers may be at it
        failed = [job for job in self._started if job.error is not None and not job.raised]
        failed += [place.written for place in self._slots.values() if place.written is not None and place.written.error is not None]
        self._started = []
        for job in failed:
            job.check()

    def _write(self, place: _Place, job: Job, stand_in: torch.Tensor, source: torch.Tensor) -> FileCopy:
        if job.pieces:  # one without bytes is done at once, whatever was started before
            place.written, place.read = job, []
        self._start(job)
        return FileCopy(self, stand_in, source, job)

    def _start(self, job: Job) -> None:
        self._started = [old for old in self._started if not old.done.is_set() or (old.error is not None and not old.raised)]
        self._started.append(job)
        self._transfers.start(job)

    def _bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type not in ("cpu", self._device.type):
            raise ValueError(f"this store copies for {self._device}, and was given a tensor on {tensor.device}; open it for that device")
        return flat(tensor, "the target of a copy")

    def _find(self, stand_in: torch.Tensor) -> tuple[_Place, int]:
        """Its place, and where in the file it starts."""
        base = stand_in.untyped_storage().data_ptr()
        place = self._at.get(base)
        if place is None or not stand_in.is_contiguous():
            raise ValueError(
                f"a tensor of shape {tuple(stand_in.shape)} on {stand_in.device} is no contiguous part of what this store keeps; "
                f"pass what a put() gave, or a view of it, as long as its slot is not dropped"
            )
        return place, place.range.start + stand_in.data_ptr() - base

    def _replace(self, slot: object, nbytes: int) -> _Place:
        """A new place for a slot. It keeps the old one if there is no room."""
        found = self._ranges.find(nbytes)
        self._file.reserve(found.stop)
        self._ranges.take(found)
        self.drop(slot)
        place = self._slots[slot] = _Place(found, self._file.map(found.start, nbytes))
        self._at[place.whole.data_ptr()] = place
        return place
