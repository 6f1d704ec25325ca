"""Holds running steps to the memory that their plan promised, instruction by instruction.

NOTE [what is compared]
A gauge reads all bytes on the device, and the user's loop holds some that no plan knows. So before instructions that follow upon
code of the user (forward, backward, `optimizer.step()`), the watch is *anchored*: what is live there beyond what the plan counts is the
user's, and is taken off every reading until the next anchor. The plan counts optimizer state and held gradients that the first
steps have yet to make; those are not missed at the anchor. What another thread allocates on the device while an instruction runs
cannot be told apart, and counts.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from chunkft_compile.planner.program import Instruction, Moment, Op, Program, Timeline, simulate
from chunkft_compile.planner.units import format_nbytes
from chunkft_compile.runtime.allocators import install
from chunkft_compile.runtime.chunks import BLOCK_NBYTES
from chunkft_compile.runtime.environment import debug_level, guard_wanted
from chunkft_compile.runtime.gauges import AcceleratorGauge, CpuGauge, Gauge, has_planned_blocks
from chunkft_compile.runtime.native import BuildError
from chunkft_compile.runtime.step_log import StepLog

logger = logging.getLogger("chunkft_compile")

_SHOWN = 3


class MemoryPromiseError(RuntimeError):
    """An instruction took more memory than its plan promised: `measured_nbytes` of `promised_nbytes`."""

    def __init__(self, message: str, *, measured_nbytes: int, promised_nbytes: int) -> None:
        super().__init__(message)
        self.measured_nbytes = measured_nbytes
        self.promised_nbytes = promised_nbytes

    def __reduce__(self) -> tuple[object, ...]:
        """As `BudgetError` does between processes."""
        return partial(type(self), measured_nbytes=self.measured_nbytes, promised_nbytes=self.promised_nbytes), self.args


class Watch:
    """What those who run a program report to. This one watches nothing. `measured` is what the last `look` found."""

    measured: Moment | None = None

    def anchor(self, number: int, spare_nbytes: int = 0) -> None:
        """Instruction `number` comes next, after code that no plan knows; see NOTE [what is compared].

        `spare_nbytes` are counted by the plan for values that are smaller.
        """

    def begin_update(self, instructions: Sequence[Instruction]) -> None:
        """These follow, in an `optimizer.step()` of HELD gradients: those of the program, as far as they are about its chunks."""

    def look(self, number: int) -> None:
        """Instruction `number` is done. What it took is noted, for `settle`."""

    def settle(self) -> None:
        """Raise `MemoryPromiseError` if something took more than was promised for it."""

    def check(self, number: int) -> None:
        """`look` and `settle`."""
        self.look(number)
        self.settle()

    def number_of(self, place: int) -> int:
        """The number of the instruction at this place of those that `begin_update` was given."""
        return place


class Guard:
    """Of one model. `names` are its chunks. With `strict`, broken promises are errors; either way `log` is told what was measured.

    Without a gauge, `blind` says why.
    """

    def __init__(self, gauge: Gauge | None, names: Sequence[str], log: StepLog, *, strict: bool, blind: str = "") -> None:
        self.gauge, self.names, self.log, self.strict, self.blind = gauge, names, log, strict, blind
        self._peak_nbytes: int | None = None

    def take_peak(self) -> int | None:
        """The most bytes that instructions had live since this was asked before; None where nobody measured."""
        found, self._peak_nbytes = self._peak_nbytes, None
        return found

    def note_peak(self, nbytes: int) -> None:
        """An instruction had so many bytes live."""
        self._peak_nbytes = max(self._peak_nbytes or 0, nbytes)

    def watch(self, program: Program, timeline: Timeline, title: str, absent_nbytes: int, unmade: Mapping[int, int] | None = None) -> Watch:
        """For one run of `program`, or of its updates. `absent_nbytes`: counted as there from the start, but not yet made.

        `unmade` is the state that chunks have yet to get, in bytes: counted from their FETCH on.
        """
        self.log.begin(title, timeline.peak_nbytes, len(program.grad_nbytes))
        if self.gauge is None:
            return Watch()
        return _Watching(self, self.gauge, program, timeline, title, absent_nbytes, unmade or {})


class _Watching(Watch):
    """Compares every reading with the promise. Errors are noted once; the first is the cause."""

    def __init__(
        self,
        guard: Guard,
        gauge: Gauge,
        program: Program,
        timeline: Timeline,
        title: str,
        absent_nbytes: int,
        unmade: Mapping[int, int],
    ) -> None:
        self._guard, self._gauge, self._program = guard, gauge, program
        self._moments, self._title, self._absent_nbytes, self._unmade = timeline.moments, title, absent_nbytes, unmade
        self._others_nbytes = self._live_nbytes = 0
        self._updated: list[int] = []
        self._first = 0
        self._broken: MemoryPromiseError | None = None

    def anchor(self, number: int, spare_nbytes: int = 0) -> None:
        """See `Watch.anchor`."""
        fetched = {chunk for step in self._program.instructions[:number] if step.op is Op.FETCH for chunk in step.chunks}
        absent_nbytes = self._absent_nbytes + sum(nbytes for chunk, nbytes in self._unmade.items() if chunk in fetched)
        self._live_nbytes = self._moments[number].before_nbytes - absent_nbytes - spare_nbytes
        self._others_nbytes = self._gauge.read().live_nbytes - self._live_nbytes

    def begin_update(self, instructions: Sequence[Instruction]) -> None:
        """See `Watch.begin_update`."""
        steps, start = self._program.instructions, self._program.update_starts
        self._first = start
        if steps[start:] == tuple(instructions):  # one optimizer steps all chunks, whose state has come: it is the program itself
            self.anchor(start)
            return
        late = {chunk for step in instructions if step.op is Op.FETCH for chunk in step.chunks}  # the backward knew of no optimizer
        before = [replace(step, chunks=tuple(chunk for chunk in step.chunks if chunk not in late)) for step in steps[:start]]
        self._program = replace(self._program, instructions=(*before, *instructions))
        self._moments = simulate(self._program).moments
        self.anchor(start)

    def look(self, number: int) -> None:
        """See `Watch.look`."""
        live, peak = self._gauge.read()
        before, self._live_nbytes = self._live_nbytes, live - self._others_nbytes
        instruction, moment = self._program.instructions[number], self._moments[number]
        measured = Moment(moment.op, moment.segment, before, peak - self._others_nbytes, self._live_nbytes, 0)
        self.measured = measured
        self._guard.log.note(measured, moment)
        self._guard.note_peak(measured.peak_nbytes)
        if instruction.op is Op.UPDATE:
            self._updated += instruction.chunks
        over = measured.peak_nbytes > moment.peak_nbytes or measured.after_nbytes > moment.after_nbytes
        if over and self._broken is None and self._guard.strict:
            self._broken = self._error(number, measured, moment)

    def settle(self) -> None:
        """See `Watch.settle`."""
        if self._broken is not None:
            raise self._broken

    def number_of(self, place: int) -> int:
        """See `Watch.number_of`."""
        return self._first + place

    def _error(self, number: int, measured: Moment, promised: Moment) -> MemoryPromiseError:
        during = measured.peak_nbytes > promised.peak_nbytes
        found, most = (measured.peak_nbytes, promised.peak_nbytes) if during else (measured.after_nbytes, promised.after_nbytes)
        return MemoryPromiseError(
            f"{self._title}, instruction {number + 1} of {len(self._moments)} ({describe(promised)}): {found} bytes "
            f"{'at its peak' if during else 'left live'}, where the plan promised at most {most} ({format_nbytes(found - most)} over). "
            f"{self._done()} Either the plan is wrong, a bug that CHUNKFT_DEBUG=2 shows instruction by instruction, or something else "
            f"allocated on the device meanwhile, such as another thread. To go on regardless, set CHUNKFT_GUARD=0",
            measured_nbytes=found,
            promised_nbytes=most,
        )

    def _done(self) -> str:
        """What became of the weights."""
        if not self._updated:
            return "No weight was changed, and the gradients of this step are incomplete: drop them with optimizer.zero_grad()."
        names = [self._guard.names[number] for number in self._updated]
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        if len(names) == len(self._program.grad_nbytes):
            return f"All chunks of the step were updated ({shown})."
        return f"Updated before: {shown}; the sweep goes on without them."


def describe(moment: Moment) -> str:
    """`BACKWARD of segment 3`."""
    return moment.op.upper() + (f" of segment {moment.segment}" if moment.segment >= 0 else "")


def open_guard(device: torch.device, names: Sequence[str], weights: Iterable[torch.Tensor]) -> Guard:
    """The guard of a model, as the environment wants it.

    On a CPU it needs the allocator hook, which then counts `weights` too; where that cannot be built, and on an accelerator with
    other blocks than plans count in, memory goes unwatched, and the log says so.
    """
    debug, strict = debug_level(), guard_wanted()
    log = StepLog(debug)
    found = _gauge(device, weights, exact=debug >= 2) if debug or strict else "CHUNKFT_GUARD=0 turns the gauge off"
    if not isinstance(found, str):
        return Guard(found, names, log, strict=strict)
    if debug or strict:
        _say_unwatched(found)
    return Guard(None, names, log, strict=strict, blind=found)


def _gauge(device: torch.device, weights: Iterable[torch.Tensor], *, exact: bool) -> Gauge | str:
    """The gauge, or why there is none."""
    if device.type != "cpu":
        if has_planned_blocks(device):
            return AcceleratorGauge(device, exact=exact)
        return f"the allocator of {device} does not hand out blocks of {BLOCK_NBYTES} bytes"
    try:
        hook = install()
    except BuildError as error:
        return str(error)
    hook.adopt(weights)
    return CpuGauge(hook)


def _say_unwatched(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning("running steps are not held to the memory that was planned for them: %s", reason)


_said: set[str] = set()
