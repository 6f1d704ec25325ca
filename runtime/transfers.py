"""Copies between tensors and a file, piece by piece on worker threads, while the device computes."""

import contextlib
import copy
import ctypes
import os
import queue
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import NoReturn

import torch

from chunkft_compile.runtime.scratch import PAGE, Buffer, ScratchFile

PIECE_NBYTES = 2 << 20
"""Bytes that one system call moves at most: the disk is as fast with 2 MiB as with larger ones."""

_WORKERS = 2  # per direction: one moves bytes between tensor and staging buffer while the other is in a system call


class Direction(Enum):
    """Which way bytes go."""

    READ = "read"
    WRITE = "write"


class Job:
    """One copy: the single bytes `memory` from or to position `start` of the file.

    `after` are jobs that must be done before, whether they failed or not; `needs` is one whose bytes this one is about, so that it
    fails with it. Bytes of the file from `used` on hold nothing that must stay. Where `memory` is on an accelerator, `ready` is the
    point of the stream that makes or frees it from which on it may be touched.
    """

    def __init__(
        self, direction: Direction, memory: torch.Tensor, start: int, used: int, after: Sequence["Job"], needs: "Job | None" = None
    ) -> None:
        self.direction = direction
        self.start, self.nbytes, self.used = start, memory.numel(), used
        self.error: BaseException | None = None
        self.raised = False
        self.done = threading.Event()
        self.ready = torch.accelerator.current_stream(memory.device).record_event() if memory.device.type != "cpu" else None
        self._memory: torch.Tensor | None = memory
        self._after = (*after, needs) if needs is not None else tuple(after)
        self._needs = needs
        self._lock = threading.Lock()
        first = start // PAGE * PAGE
        self.pieces = range(first, start + self.nbytes, PIECE_NBYTES) if self.nbytes else range(0)
        self._left = len(self.pieces)
        if not self.pieces:
            self._finish()

    def check(self) -> None:
        """Raise what went wrong with it. It is done."""
        if self.error is not None:
            self.raised = True
            self._raise()

    def await_order(self) -> torch.Tensor:
        """Wait for the jobs before; gives the memory. Raises the error of the one it needs.

        They were started before, so their pieces stand before those of this one in the queues: some worker is at them.
        """
        for job in self._after:
            job.done.wait()
        if self._needs is not None and self._needs.error is not None:
            self._needs._raise()
        assert self._memory is not None, "the memory of a job is gone before its last piece is moved"
        return self._memory

    def piece_done(self, error: BaseException | None) -> None:
        """One of its pieces was moved, or was not."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            last = not self._left
        if last:
            self._finish()

    def _raise(self) -> NoReturn:
        """Raise a copy of its error: one that is raised holds all frames it has come through, and their tensors."""
        assert self.error is not None
        raise copy.copy(self.error) from self.error

    def _finish(self) -> None:
        # Whoever waits frees the tensor next: from then on no worker may hold it, not even in the frames of an error.
        self._memory, self._after, self._needs = None, (), None
        if self.error is not None:
            traceback.clear_frames(self.error.__traceback__)
        self.done.set()


class _Meter:
    """Bytes of one direction, and the time in which at least one piece was on its way."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._busy_ns = self._since_ns = self._moving = 0
        self._lock = threading.Lock()

    @property
    def busy_us(self) -> int:
        """Microseconds in which something moved."""
        with self._lock:
            return (self._busy_ns + (time.perf_counter_ns() - self._since_ns if self._moving else 0)) // 1000

    @contextlib.contextmanager
    def moving(self, nbytes: int) -> Iterator[None]:
        """Around the transfer of a piece; it counts if it succeeds."""
        with self._lock:
            self._since_ns = self._since_ns if self._moving else time.perf_counter_ns()
            self._moving += 1
        try:
            yield
            with self._lock:
                self.nbytes += nbytes
        finally:
            with self._lock:
                self._moving -= 1
                if not self._moving:
                    self._busy_ns += time.perf_counter_ns() - self._since_ns


class _Staging:
    """A staging buffer, and the stream that copies between it and the memory of an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = Buffer(PIECE_NBYTES, pinned=device.type != "cpu")
        self._stream = torch.Stream(device) if device.type != "cpu" else None

    def fill(self, offset: int, memory: torch.Tensor, ready: torch.Event | None) -> None:
        """Copy `memory` to the buffer."""
        self._copy(self.buffer.bytes[offset : offset + memory.numel()], memory, ready)

    def empty(self, offset: int, memory: torch.Tensor, ready: torch.Event | None) -> None:
        """Copy from the buffer to `memory`."""
        self._copy(memory, self.buffer.bytes[offset : offset + memory.numel()], ready)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, ready: torch.Event | None) -> None:
        if ready is None:
            # Lets other threads run, and unlike `copy_` needs no OpenMP threads, of which each worker would get a team of its own.
            ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())
            return
        assert self._stream is not None, "staging for a CPU is given memory of an accelerator"
        # What makes the source may still be queued, and so may work on the block that the allocator has handed out as the target.
        self._stream.wait_event(ready)
        with self._stream:
            target.copy_(source, non_blocking=True)
        # The buffer is written to the file or filled again next, and the job may be announced as done.
        self._stream.synchronize()


def _workers() -> dict[Direction, ThreadPoolExecutor]:
    return {direction: ThreadPoolExecutor(_WORKERS, f"chunkft-{direction.value}") for direction in Direction}


class Transfers:
    """Runs jobs on a file: both directions at once, each in the order in which jobs were started."""

    def __init__(self, file: ScratchFile, device: torch.device) -> None:
        self._file = file
        self.meters = {direction: _Meter() for direction in Direction}
        self._workers = _workers()
        self._process = os.getpid()
        self._staging = queue.SimpleQueue[_Staging]()
        for _ in range(_WORKERS * len(Direction)):  # one for each worker, so that none waits for another
            self._staging.put(_Staging(device))

    def start(self, job: Job) -> None:
        """Start a job; gives control back at once."""
        if self._process != os.getpid():  # threads stay behind in a fork, and an executor does not notice that its own are gone
            self._workers, self._process = _workers(), os.getpid()
        for at in job.pieces:
            self._workers[job.direction].submit(self._run, job, at)

    def _run(self, job: Job, at: int) -> None:
        error: BaseException | None = None
        staging = self._staging.get()
        try:
            self._move(job, at, staging)
        except BaseException as caught:  # whatever it is, it is raised to the one who waits for the copy
            error = caught
        self._staging.put(staging)
        job.piece_done(error)

    def _move(self, job: Job, at: int, staging: _Staging) -> None:
        memory = job.await_order()
        if job.error is not None:  # of another piece
            return
        # [lower, upper) are the pages of the piece, [start, stop) its own bytes
        lower, start = at, max(at, job.start)
        stop = min(at + PIECE_NBYTES, job.start + job.nbytes)
        upper = -(-stop // PAGE) * PAGE
        piece, view = memory[start - job.start : stop - job.start], staging.buffer.view[: upper - lower]
        with self.meters[job.direction].moving(stop - start):
            if job.direction is Direction.READ:
                self._file.read(view, lower)
                staging.empty(start - lower, piece, job.ready)
                return
            # Whole pages are written: what else is in the first and the last must stay.
            if start > lower:
                self._file.read(view[:PAGE], lower)
            if stop < min(upper, job.used):
                self._file.read(view[-PAGE:], upper - PAGE)
            staging.fill(start - lower, piece, job.ready)
            self._file.write(view, lower)
