"""Where optimizer state lives while its chunk is not being stepped: host memory beside an accelerator, a file beside a CPU.

On a CPU the host's memory is the budgeted memory, so only a file frees bytes. The file is scratch: it has no name in its directory
once it is open and vanishes with the process.
"""

import mmap
import os
import tempfile
import time
import weakref
from pathlib import Path
from typing import Protocol

import torch


class Store(Protocol):
    """Keeps copies of tensors outside the budgeted memory."""

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        ...

    def put(self, slot: object, tensor: torch.Tensor) -> torch.Tensor:
        """Copy `tensor` to `slot`, which keeps its size for good; gives a stand-in with the same contents."""
        ...

    def get(self, stand_in: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The contents of a stand-in as a tensor in the memory of `device`."""
        ...


class HostStore:
    """Host memory, pinned where there is an accelerator to copy for."""

    def __init__(self) -> None:
        self._slots: dict[object, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return sum(slot.numel() * slot.element_size() for slot in self._slots.values())

    def put(self, slot: object, tensor: torch.Tensor) -> torch.Tensor:
        """See `Store.put`."""
        kept = self._slots.get(slot)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._slots[slot] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
        kept.copy_(tensor)  # blocking: the source is dropped right after, and the stand-in may be read at any time
        return kept

    def get(self, stand_in: torch.Tensor, device: torch.device) -> torch.Tensor:
        """See `Store.get`."""
        return stand_in.to(device, copy=True)


class FileStore:
    """One file; each slot is a page-aligned range of it, mapped into memory.

    Space is claimed when a slot is made, so a full disk is an `OSError` there and not a crash at some later write. After each
    copy the pages are given back to the kernel: they do not stay in the resident set.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ValueError(f"the directory for optimizer state, {directory}, does not exist; create it or pass store=...")
        self._file = tempfile.TemporaryFile(dir=directory, prefix="chunkft-state-")  # noqa: SIM115 (lives as long as the store)
        weakref.finalize(self, self._file.close)
        self._directory = directory
        self._end = 0
        self._slots: dict[object, tuple[mmap.mmap, torch.Tensor]] = {}
        self._mapping_of: dict[int, mmap.mmap] = {}

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self._end

    def put(self, slot: object, tensor: torch.Tensor) -> torch.Tensor:
        """See `Store.put`."""
        held = self._slots.get(slot)
        if held is None or held[1].shape != tensor.shape or held[1].dtype != tensor.dtype:
            held = self._slots[slot] = self._claim(tensor)
        mapping, stand_in = held
        stand_in.copy_(tensor)
        mapping.madvise(mmap.MADV_DONTNEED)
        return stand_in

    def get(self, stand_in: torch.Tensor, device: torch.device) -> torch.Tensor:
        """See `Store.get`."""
        tensor = torch.empty_like(stand_in, device=device).copy_(stand_in)
        self._mapping_of[stand_in.data_ptr()].madvise(mmap.MADV_DONTNEED)
        return tensor

    def _claim(self, tensor: torch.Tensor) -> tuple[mmap.mmap, torch.Tensor]:
        nbytes = tensor.numel() * tensor.element_size()
        start = self._end
        length = -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            os.posix_fallocate(self._file.fileno(), start, length)
        except OSError as error:
            raise OSError(
                error.errno, f"no room for {length} more bytes of optimizer state in {self._directory}: {error.strerror}"
            ) from error
        self._end += length
        mapping = mmap.mmap(self._file.fileno(), length, offset=start)
        flat = torch.frombuffer(mapping, dtype=tensor.dtype, count=tensor.numel())
        stand_in = flat.view(tensor.shape)
        self._mapping_of[stand_in.data_ptr()] = mapping
        return mapping, stand_in


def open_store(device: torch.device, directory: Path | None) -> Store:
    """Host memory for an accelerator; for a CPU a file in `directory` (the system's temporary one if None)."""
    if device.type != "cpu":
        return HostStore()
    return FileStore(directory or Path(tempfile.gettempdir()))


def bytes_per_s(device: torch.device, directory: Path | None) -> int:
    """Measured speed of such a store, there and back, on 2 MiB."""
    store = open_store(device, directory)
    sample = torch.ones(2**19, device=device)
    store.get(store.put("sample", sample), device)
    start = time.perf_counter()
    store.get(store.put("sample", sample), device)
    return max(1, int(2 * 2**21 / (time.perf_counter() - start)))
