"""A scratch file without a name, read and written by position and, where the filesystem takes it, around the page cache."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch

PAGE = mmap.ALLOCATIONGRANULARITY
"""What positions, sizes and memory addresses of direct transfers are multiples of, and what a mapping starts at."""


class ScratchFile:
    """A file in `directory` that vanishes with the process. Positions and sizes are multiples of `PAGE`.

    `direct` says that transfers go around the page cache (O_DIRECT). Where they cannot, the kernel is told after each that the pages
    are not needed again, which starts to write them out and drops them.

    NOTE [mappings beside direct transfers]. Stand-ins map the file. A direct write drops the pages of its range from the page cache
    when it starts and when it is done, and a direct read writes changed ones out first, so a mapping that is read after a write is
    done sees what was written. open(2) leaves that to the filesystem, so it is tried on the first page: where a mapping shows old
    bytes, transfers are not direct.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ValueError(f"the directory for optimizer state, {directory}, does not exist; create it or pass store=...")
        self._directory = directory
        self._nbytes = 0
        try:
            # buffering=0: what is written through the file object itself (nothing) must not be kept back
            self._file = tempfile.TemporaryFile(dir=directory, prefix="chunkft-", buffering=0)  # noqa: SIM115 (lives as long as this)
        except OSError as error:
            raise self._named(error, "cannot make the file of the store; pass store=... to keep it elsewhere") from error
        weakref.finalize(self, self._file.close)
        self.reserve(PAGE)
        self.direct = self._try_direct()

    def reserve(self, end: int) -> None:
        """Claim the bytes up to `end` on the disk, so that a full one is an `OSError` here and not at some later write."""
        if end <= self._nbytes:
            return
        try:
            os.posix_fallocate(self._file.fileno(), self._nbytes, end - self._nbytes)
        except OSError as error:
            raise self._named(error, f"no room for {end - self._nbytes} more bytes of optimizer state or saved values") from error
        self._nbytes = end

    def map(self, start: int, nbytes: int) -> torch.Tensor:
        """These bytes as a tensor; it takes no memory until it is looked at, and then page cache."""
        return torch.frombuffer(mmap.mmap(self._file.fileno(), nbytes, offset=start), dtype=torch.uint8)

    def read(self, view: memoryview, start: int) -> None:
        """Fill `view` from `start` on. Raises `OSError`."""
        self._check_size()
        done = 0
        while done < len(view):  # one system call may do a part only
            try:
                count = os.preadv(self._file.fileno(), [view[done:]], start + done)
            except OSError as error:
                raise self._named(error, f"cannot read {len(view)} bytes at {start} of the store's file") from error
            if count <= 0:
                raise self._named(OSError(errno.EIO, "short read"), f"the store's file ended {len(view) - done} bytes early")
            done += count
        self._forget_pages(start, len(view))

    def write(self, view: memoryview, start: int) -> None:
        """Write `view` from `start` on. Raises `OSError`; some of the bytes may be written then."""
        self._check_size()
        done = 0
        while done < len(view):
            try:
                count = os.pwritev(self._file.fileno(), [view[done:]], start + done)
            except OSError as error:
                raise self._named(error, f"cannot write {len(view)} bytes at {start} of the store's file") from error
            if count <= 0:
                raise self._named(OSError(errno.EIO, "short write"), f"{len(view) - done} bytes of the store's file were not written")
            done += count
        self._forget_pages(start, len(view))

    def _check_size(self) -> None:
        """A write behind the end of a file that was cut would succeed, and leave zeros where other slots are."""
        reserved = self._nbytes  # read first: the file may grow meanwhile
        size = os.fstat(self._file.fileno()).st_size
        if size < reserved:
            changed = OSError(errno.EIO, "changed by someone else")
            raise self._named(changed, f"the store's file has {size} bytes where {reserved} were reserved")

    def _forget_pages(self, start: int, nbytes: int) -> None:
        if not self.direct:
            os.posix_fadvise(self._file.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)

    def _named(self, error: OSError, what: str) -> OSError:
        return OSError(error.errno, f"{what} in {self._directory}: {error.strerror}")

    def _try_direct(self) -> bool:
        """Switch to direct transfers, if they and mappings agree on this filesystem."""
        flags = fcntl.fcntl(self._file.fileno(), fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # not every filesystem takes the flag, and some take it and refuse the first write
            fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags | os.O_DIRECT)
            if self._maps_what_is_written():
                return True
        fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags)
        return False

    def _maps_what_is_written(self) -> bool:
        page, mapped = Buffer(PAGE), self.map(0, PAGE)
        for byte in (1, 2):
            page.bytes.fill_(byte)
            if os.pwritev(self._file.fileno(), [page.view], 0) != PAGE or not torch.equal(mapped, page.bytes):
                return False
        mapped.fill_(3)  # by the mapping, and read around it
        return os.preadv(self._file.fileno(), [page.view], 0) == PAGE and torch.equal(mapped, page.bytes)


class Buffer:
    """Host memory that starts at a page, as a tensor of single `bytes` and as a `view` for system calls."""

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        if pinned:
            room = torch.empty(nbytes + PAGE, dtype=torch.uint8, pin_memory=True)
            skipped = -room.data_ptr() % PAGE
            self.bytes = room[skipped : skipped + nbytes]
        else:
            self.bytes = torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
        self.address = self.bytes.data_ptr()
        self.view = memoryview((ctypes.c_char * nbytes).from_address(self.address)).cast("B")
