"""What `CHUNKFT_DEBUG` prints: a line per step, and from level 2 on a line per instruction."""

import sys
import time
from collections.abc import Callable

from chunkft_compile.planner.program import Moment, Op
from chunkft_compile.planner.units import format_nbytes


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class StepLog:
    """Adds up one step, which may be many micro-batches and several calls of optimizers. Level 0 keeps and prints nothing."""

    def __init__(self, level: int, write: Callable[[str], None] = _to_stderr) -> None:
        self._level, self._write = level, write
        self._title: str | None = None

    def begin(self, title: str, promised_nbytes: int, chunks: int) -> None:
        """A program of the step `title` comes next; more of the same add up."""
        if not self._level:
            return
        if title != self._title:
            self._title, self._start_s = title, time.perf_counter()
            self._peak_nbytes: int | None = None
            self._promised_nbytes = self._chunks = self._in_nbytes = self._out_nbytes = 0
        self._promised_nbytes = max(self._promised_nbytes, promised_nbytes)
        self._chunks = max(self._chunks, chunks)

    def note(self, measured: Moment, promised: Moment) -> None:
        """An instruction is done."""
        if not self._level:
            return
        self._peak_nbytes = max(self._peak_nbytes or 0, measured.peak_nbytes)
        grown = measured.after_nbytes - measured.before_nbytes
        if measured.op is Op.FETCH:
            self._in_nbytes += max(0, grown)
        elif measured.op in (Op.EVICT, Op.FREE):
            self._out_nbytes += max(0, -grown)
        if self._level >= 2:
            where = f"{promised.op.upper():8} segment {promised.segment}" if promised.segment >= 0 else promised.op.upper()
            live = " -> ".join(map(format_nbytes, (measured.before_nbytes, measured.peak_nbytes, measured.after_nbytes)))
            most = " -> ".join(map(format_nbytes, (promised.before_nbytes, promised.peak_nbytes, promised.after_nbytes)))
            self._write(f"chunkft:   {where:20} {live}, promised {most}")

    def finish(self) -> None:
        """The step is complete."""
        if not self._level or self._title is None:
            return
        measured = "unknown" if self._peak_nbytes is None else format_nbytes(self._peak_nbytes)
        moved = f", {format_nbytes(self._in_nbytes)} fetched, {format_nbytes(self._out_nbytes)} evicted" if self._peak_nbytes else ""
        self._write(
            f"chunkft: {self._title}: {self._chunks} active chunks, predicted {format_nbytes(self._promised_nbytes)} -> "
            f"measured {measured}, {time.perf_counter() - self._start_s:.3f} s{moved}"
        )
        self._title = None
