"""Where optimizer state and saved values live between uses: host memory beside an accelerator, a file beside a CPU.

On a CPU the host's memory is the budgeted memory, so only a file frees bytes. The file is scratch: it has no name in its directory
once it is open and vanishes with the process.
"""

import ctypes
import errno
import functools
import mmap
import os
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from chunkft_compile.planner.problem import Link, Placement

_TRIALS = 5


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy under way; `tensor` is its target."""

    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        """From here on the target may be used, and the source freed or overwritten."""
        return self.tensor


class Store(Protocol):
    """Keeps copies of tensors outside the budgeted memory."""

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        ...

    def put(self, slot: object, tensor: torch.Tensor, room_nbytes: int = 0) -> Copy:
        """Copy `tensor` to `slot`, to a stand-in with the same contents.

        A slot keeps its place as long as what it is given fits; a new place has at least `room_nbytes`.
        """
        ...

    def get(self, stand_in: torch.Tensor, device: torch.device) -> Copy:
        """Copy a stand-in, or rows of one, to new memory of `device`."""
        ...

    def overwrite(self, stand_in: torch.Tensor, tensor: torch.Tensor) -> Copy:
        """Copy `tensor` over a stand-in, or over rows of one."""
        ...

    def drop(self, slot: object) -> None:
        """Give a slot back; its stand-in must not be used any more."""
        ...

    def synchronize(self) -> None:
        """Wait until every copy is complete, also for readers on the host."""
        ...


class HostStore:
    """Host memory, pinned where there is an accelerator to copy for."""

    def __init__(self) -> None:
        self._slots: dict[object, torch.Tensor] = {}  # of single bytes

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return sum(slot.numel() for slot in self._slots.values())

    def put(self, slot: object, tensor: torch.Tensor, room_nbytes: int = 0) -> Copy:
        """See `Store.put`."""
        whole = self._slots.get(slot)
        if whole is None or whole.numel() < _nbytes(tensor):
            room, pinned = max(_nbytes(tensor), room_nbytes), tensor.device.type != "cpu"
            whole = self._slots[slot] = torch.empty(room, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        stand_in = _as(whole, tensor)
        stand_in.copy_(tensor)  # blocking: the source is dropped right after, and the stand-in may be read at any time
        return Copy(stand_in)

    def get(self, stand_in: torch.Tensor, device: torch.device) -> Copy:
        """See `Store.get`."""
        return Copy(stand_in.to(device, copy=True))

    def overwrite(self, stand_in: torch.Tensor, tensor: torch.Tensor) -> Copy:
        """See `Store.overwrite`."""
        return Copy(stand_in.copy_(tensor))

    def drop(self, slot: object) -> None:
        """See `Store.drop`."""
        del self._slots[slot]

    def synchronize(self) -> None:
        """See `Store.synchronize`."""


@dataclass(frozen=True, eq=False)
class _Range:
    """A page-aligned range of the file, and the tensor of single bytes that maps it."""

    start: int
    whole: torch.Tensor


class FileStore:
    """One file; each slot is a page-aligned range of it.

    Space is claimed when a slot is made, so a full disk is an `OSError` there and not a crash at some later write. Contents are
    written and read by position, straight from and to the tensor's memory; a stand-in maps its range for those who look at it
    in between (`optimizer.state_dict()`), and takes no memory until then.
    """

    def __init__(self, directory: Path) -> None:
        check_directory(directory)
        self._file = tempfile.TemporaryFile(dir=directory, prefix="chunkft-state-")  # noqa: SIM115 (lives as long as the store)
        weakref.finalize(self, self._file.close)
        self._directory = directory
        self._end = 0
        self._slots: dict[object, _Range] = {}
        self._start_of: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self._end

    def put(self, slot: object, tensor: torch.Tensor, room_nbytes: int = 0) -> Copy:
        """See `Store.put`."""
        held = self._slots.get(slot)
        if held is None or held.whole.numel() < _nbytes(tensor):
            held = self._slots[slot] = self._claim(max(_nbytes(tensor), room_nbytes))
        source, start = tensor.contiguous(), held.start
        _move(lambda view, at: os.pwrite(self._file.fileno(), view, start + at), source)
        return Copy(_as(held.whole, tensor))

    def get(self, stand_in: torch.Tensor, device: torch.device) -> Copy:
        """See `Store.get`."""
        start = self._place_of(stand_in)
        tensor = torch.empty_like(stand_in)
        _move(lambda view, at: os.preadv(self._file.fileno(), [view], start + at), tensor)
        return Copy(tensor.to(device))

    def overwrite(self, stand_in: torch.Tensor, tensor: torch.Tensor) -> Copy:
        """See `Store.overwrite`."""
        source, start = tensor.contiguous(), self._place_of(stand_in)
        _move(lambda view, at: os.pwrite(self._file.fileno(), view, start + at), source)
        return Copy(stand_in)

    def drop(self, slot: object) -> None:
        """See `Store.drop`."""
        del self._start_of[self._slots.pop(slot).whole.data_ptr()]

    def synchronize(self) -> None:
        """See `Store.synchronize`."""

    def _place_of(self, stand_in: torch.Tensor) -> int:
        """Where in the file a stand-in, or rows of one, begin."""
        whole = stand_in.untyped_storage().data_ptr()
        return self._start_of[whole] + stand_in.data_ptr() - whole

    def _claim(self, nbytes: int) -> _Range:
        start = self._end
        length = -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            os.posix_fallocate(self._file.fileno(), start, length)
        except OSError as error:
            raise OSError(
                error.errno,
                f"no room for {length} more bytes of optimizer state or saved values in {self._directory}: {error.strerror}",
            ) from error
        self._end += length
        whole = torch.frombuffer(mmap.mmap(self._file.fileno(), length, offset=start), dtype=torch.uint8, count=nbytes)
        self._start_of[whole.data_ptr()] = start
        return _Range(start, whole)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The first bytes of a place as a contiguous tensor of the shape and dtype of another."""
    return whole[: _nbytes(tensor)].view(tensor.dtype).view(tensor.shape)


def _move(transfer: Callable[[memoryview, int], int], tensor: torch.Tensor) -> None:
    """Transfer all bytes of a contiguous CPU tensor; one system call may do a part only."""
    nbytes = _nbytes(tensor)
    view = memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")
    done = 0
    while done < nbytes:
        count = transfer(view[done:], done)
        if count <= 0:
            raise OSError(errno.EIO, f"the file of optimizer state ended {nbytes - done} bytes early")
        done += count


class Stores:
    """The stores beside a device, opened when first asked for; a file goes to `directory` (the system's temporary one if None)."""

    def __init__(self, device: torch.device, directory: Path | None) -> None:
        self._directory = directory or Path(tempfile.gettempdir())
        if device.type == "cpu" or directory is not None:
            check_directory(self._directory)
        self.fastest = Placement.DISK if device.type == "cpu" else Placement.HOST
        self._open: dict[Placement, Store] = {}

    def at(self, place: Placement) -> Store:
        """The store at a place, which is not the device."""
        assert place is not Placement.DEVICE, "the device is no store"
        if place not in self._open:
            self._open[place] = HostStore() if place is Placement.HOST else FileStore(self._directory)
        return self._open[place]

    @property
    def nbytes(self) -> int:
        """Bytes that all of them occupy."""
        return sum(store.nbytes for store in self._open.values())

    def synchronize(self) -> None:
        """Wait until every copy is complete, also for readers on the host."""
        for store in self._open.values():
            store.synchronize()


def check_directory(directory: Path) -> None:
    """Raise `ValueError` where a store's directory does not exist."""
    if not directory.is_dir():
        raise ValueError(f"the directory for optimizer state, {directory}, does not exist; create it or pass store=...")


@functools.cache
def measure_link(device: torch.device, directory: Path | None, place: Placement) -> Link:
    """The way to the store at `place` and its measured speed: the best of a few trials, taken once, so that equal plans stay equal."""
    store = Stores(device, directory).at(place)
    sample = torch.ones(2**19, device=device)
    store.get(store.put("sample", sample).wait(), device).wait()
    reading, writing = [], []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        stand_in = store.put("sample", sample).wait()
        middle = time.perf_counter()
        store.get(stand_in, device).wait()
        reading.append(time.perf_counter() - middle)
        writing.append(middle - start)
    return Link(place, max(1, int(2**21 / min(reading))), max(1, int(2**21 / min(writing))))
