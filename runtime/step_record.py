"""What the program of one step really takes, instruction by instruction, for those who record a run.

NOTE [time without waiting]
On a CPU an instruction is over when its call returns, and the host's clock says when. On an accelerator the call only queues work, and
waiting for it would change what is measured. So an event is queued behind each instruction, and the time between two events is asked for
when both have passed, steps later if need be.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from chunkft_compile.planner.program import Instruction, Moment, Op, Program
from chunkft_compile.runtime.guard import Watch

Mark = int | torch.Event
"""A moment in the work of a device: nanoseconds of the host's clock, or an event."""


class Clock:
    """Marks moments in the work of a device; see NOTE [time without waiting]."""

    def __init__(self, device: torch.device) -> None:
        self._device = None if device.type == "cpu" else device

    def mark(self) -> Mark:
        """The moment when everything is done that the device was given so far."""
        if self._device is None:
            return time.perf_counter_ns()
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event


def has_passed(mark: Mark) -> bool:
    """Whether a moment has come. Does not wait for it."""
    return isinstance(mark, int) or mark.query()


def us_between(start: Mark, stop: Mark) -> float:
    """Microseconds from one moment to another; both have passed."""
    if isinstance(start, int):
        assert isinstance(stop, int), "both marks are of one clock"
        return (stop - start) / 1000
    assert not isinstance(stop, int), "both marks are of one clock"
    return 1000 * start.elapsed_time(stop)


@dataclass(frozen=True, slots=True)
class Took:
    """What a step took.

    `us` is the time of each instruction; those of forward and backward are means over the micro-batches. `nbytes` is the peak of each,
    as plans count it, and `peak_nbytes` the largest; None without a gauge. `forward_us`, `backward_us` and `update_us` are sums over all
    micro-batches; of an IMMEDIATE step the updates are in the backward. `complete`: every forward and backward came to its end.
    """

    us: tuple[int, ...]
    nbytes: tuple[int, ...] | None
    peak_nbytes: int | None
    forward_us: int
    backward_us: int
    update_us: int
    micro_batches: int
    complete: bool


class _Span(NamedTuple):
    """One run of an instruction."""

    phase: Op
    number: int
    start: Mark
    stop: Mark


class StepRecord:
    """Adds up the runs of one step's program: micro-batches, and the parts of its update if several optimizers share it."""

    def __init__(self, program: Program, clock: Clock) -> None:
        self.program, self.clock = program, clock
        self._middle, self._end = program.backward_starts, program.update_starts
        self._owner = {(step.op, chunk): number for number, step in enumerate(program.instructions) for chunk in step.chunks}
        self._us = [0.0] * len(program.instructions)
        self._peaks: list[int | None] = [None] * len(program.instructions)
        self._phase_us = {Op.FORWARD: 0.0, Op.BACKWARD: 0.0, Op.UPDATE: 0.0}
        self._spans: list[_Span] = []
        self._begun = {Op.FORWARD: 0, Op.BACKWARD: 0}
        self._ended = {Op.FORWARD: 0, Op.BACKWARD: 0}
        self._phase = Op.FORWARD
        self._latest: Mark | None = None

    def watch(self, inner: Watch) -> Watch:
        """For one run of the program, or of its updates; `inner` is told the same."""
        return _Recording(self, inner)

    def begin(self, phase: Op) -> None:
        """FORWARD, BACKWARD or UPDATE of the program comes next, after code that is not of the step."""
        if phase is Op.FORWARD:
            self._settle()
        if phase is not Op.UPDATE:
            self._begun[phase] += 1
        self._phase, self._latest = phase, self.clock.mark()

    def note(self, number: int, mark: Mark, measured: Moment | None) -> None:
        """Instruction `number` was done at `mark`."""
        assert self._latest is not None, "an instruction follows the begin of its phase"
        self._spans.append(_Span(self._phase, number, self._latest, mark))
        self._latest = mark
        if measured is not None:
            self._peaks[number] = max(self._peaks[number] or 0, measured.peak_nbytes)
        if self._phase is not Op.UPDATE and number == (self._middle if self._phase is Op.FORWARD else self._end) - 1:
            self._ended[self._phase] += 1

    def numbers_of(self, instructions: Sequence[Instruction]) -> list[int]:
        """Which instructions of the program these are parts of, each about some of its chunks."""
        return [self._owner[instruction.op, instruction.chunks[0]] for instruction in instructions]

    def has_passed(self) -> bool:
        """Whether the device has done it all."""
        return all(has_passed(span.stop) for span in reversed(self._spans))

    def wait(self) -> None:
        """Until the device has done it all."""
        for span in self._spans:
            if not isinstance(span.stop, int):
                span.stop.synchronize()

    def took(self) -> Took:
        """What it took; the device has done it all."""
        self._settle()
        assert not self._spans, "the device has not done the step yet"
        forwards, backwards = (max(1, self._ended[phase]) for phase in (Op.FORWARD, Op.BACKWARD))
        runs = [forwards] * self._middle + [backwards] * (self._end - self._middle) + [1] * (len(self._us) - self._end)
        peaks = [peak for peak in self._peaks if peak is not None]
        return Took(
            tuple(round(us / times) for us, times in zip(self._us, runs, strict=True)),
            tuple(peaks) if len(peaks) == len(self._peaks) else None,
            max(peaks, default=None),
            forward_us=round(self._phase_us[Op.FORWARD]),
            backward_us=round(self._phase_us[Op.BACKWARD]),
            update_us=round(self._phase_us[Op.UPDATE]),
            micro_batches=self._ended[Op.BACKWARD],
            complete=self._begun == self._ended and self._ended[Op.FORWARD] == self._ended[Op.BACKWARD] > 0,
        )

    def _settle(self) -> None:
        """Add up what has passed, so that many micro-batches take no more memory than one."""
        if not self.has_passed():
            return
        for span in self._spans:
            us = us_between(span.start, span.stop)
            self._us[span.number] += us
            self._phase_us[span.phase] += us
        self._spans.clear()


class _Recording(Watch):
    """Passes on what it is told, and notes when."""

    def __init__(self, record: StepRecord, inner: Watch) -> None:
        self._record, self._inner = record, inner
        self._numbers: list[int] | None = None  # of the instructions of an update
        self._first = 0

    def anchor(self, number: int, spare_nbytes: int = 0) -> None:
        """See `Watch.anchor`."""
        self._inner.anchor(number, spare_nbytes)
        self._record.begin(Op.BACKWARD if number else Op.FORWARD)

    def begin_update(self, instructions: Sequence[Instruction]) -> None:
        """See `Watch.begin_update`."""
        self._inner.begin_update(instructions)
        self._numbers, self._first = self._record.numbers_of(instructions), self._inner.number_of(0)
        self._record.begin(Op.UPDATE)

    def look(self, number: int) -> None:
        """See `Watch.look`."""
        mark = self._record.clock.mark()
        self._inner.look(number)
        self._record.note(number if self._numbers is None else self._numbers[number - self._first], mark, self._inner.measured)

    def settle(self) -> None:
        """See `Watch.settle`."""
        self._inner.settle()

    def number_of(self, place: int) -> int:
        """See `Watch.number_of`."""
        return self._inner.number_of(place)
