"""What a step took, by a clock that says what the test wants."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from chunkft_compile.planner.program import Instruction, Moment, Op
from chunkft_compile.runtime.guard import Watch
from chunkft_compile.runtime.step_record import Clock, StepRecord, Took
from tests.runtime.test_guard import PROGRAM

UPDATE = PROGRAM.instructions[2:]


class Ticking(Clock):
    """Every mark is the sum of so many more microseconds."""

    def __init__(self, us: Sequence[int]) -> None:
        super().__init__(torch.device("cpu"))
        self._us = iter(us)
        self._now = 0

    def mark(self) -> int:
        """See `Clock.mark`."""
        self._now += next(self._us)
        return 1000 * self._now


class Measuring(Watch):
    """Finds a peak of 100 bytes for each instruction, and one more at each look."""

    def __init__(self, first: int = 0) -> None:
        self._looks, self._first = 0, first

    def look(self, number: int) -> None:
        """See `Watch.look`."""
        self.measured = Moment(Op.FORWARD, -1, 0, 100 + self._looks, 0, 0)
        self._looks += 1

    def number_of(self, place: int) -> int:
        """As a guard does whose program has other instructions before."""
        return self._first + place


def _micro_batch(watch: Watch) -> None:
    watch.anchor(0)
    watch.check(0)
    watch.anchor(1)
    watch.check(1)


def _update(watch: Watch, instructions: Sequence[Instruction]) -> None:
    watch.begin_update(instructions)
    for place in range(len(instructions)):
        watch.check(watch.number_of(place))


def test_micro_batches_are_averaged_and_the_update_is_not() -> None:
    record = StepRecord(PROGRAM, Ticking([5, 10, 1000, 20, 5, 30, 7, 60, 3, 1, 2, 3, 4]))
    watch = record.watch(Measuring(first=7))
    _micro_batch(watch)
    _micro_batch(watch)
    _update(watch, UPDATE)
    assert record.took() == Took((20, 40, 1, 2, 3, 4), (102, 103, 104, 105, 106, 107), 107, 40, 80, 10, 2, complete=True)


def test_parts_of_an_update_add_up() -> None:
    """Two optimizers, each with one chunk: their instructions are those of the program, in parts."""
    record = StepRecord(PROGRAM, Ticking([0, 1, 0, 1, 0, 1, 2, 3, 4, 500, 10, 20, 30, 40]))
    watch = record.watch(Watch())
    _micro_batch(watch)
    for chunk in (0, 1):
        _update(record.watch(Watch()), [replace(step, chunks=(chunk,)) for step in UPDATE])
    took = record.took()
    assert took.us == (1, 1, 11, 22, 33, 44)
    assert (took.update_us, took.nbytes, took.peak_nbytes, took.complete) == (110, None, None, True)


def test_a_forward_without_a_backward_makes_a_step_incomplete() -> None:
    record = StepRecord(PROGRAM, Ticking([1] * 20))
    watch = record.watch(Watch())
    watch.anchor(0)
    watch.check(0)
    _micro_batch(watch)
    _update(watch, UPDATE)
    assert not record.took().complete


def test_a_backward_that_broke_off_makes_a_step_incomplete() -> None:
    record = StepRecord(PROGRAM, Ticking([1] * 20))
    watch = record.watch(Watch())
    watch.anchor(0)
    watch.check(0)
    watch.anchor(1)
    assert not record.took().complete
    _micro_batch(watch)
    _update(watch, UPDATE)
    assert not record.took().complete


def test_a_clock_of_a_cpu_is_the_hosts() -> None:
    clock = Clock(torch.device("cpu"))
    first, second = clock.mark(), clock.mark()
    assert isinstance(first, int)
    assert isinstance(second, int)
    assert first < second
