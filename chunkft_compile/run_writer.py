"""A file that grows by a line per optimizer step of a training run, while it runs."""

import logging
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO

import torch

import chunkft_compile
from chunkft_compile.assembly import Assembled
from chunkft_compile.compiled import Compiled
from chunkft_compile.errors import TrainingError
from chunkft_compile.planner import Fingerprint, Problem, Schedule, Step
from chunkft_compile.planner.traces import title_of
from chunkft_compile.run_lines import VERSION, Header, Line, Memory, PlanLine, ProgramLine, StepLine, to_text
from chunkft_compile.runtime.guard import Guard, Watch
from chunkft_compile.runtime.step_record import Clock, StepRecord
from chunkft_compile.runtime.store import Traffic
from chunkft_compile.solving import fingerprint

logger = logging.getLogger("chunkft_compile")

REPLANNED = "planned again in its middle: the figures are those from then on"
PART = "a part of a planned step: the sweep was planned again, or an error broke a step off"
SMALLER = "a batch smaller than the planned one"
BROKEN = "a forward or backward of it did not come to its end"


def memory_of(guard: Guard) -> tuple[Memory, str]:
    """What measured bytes are, and why."""
    if guard.gauge is None:
        return Memory.NONE, guard.blind
    if guard.gauge.exact:
        return Memory.EXACT, "every peak is read and reset"
    return Memory.AT_LEAST, "the device has one peak statistic, and it is the user's: only CHUNKFT_DEBUG=2 resets it"


@dataclass(frozen=True)
class Running:
    """What a session is about to run: `step` of `schedule`, which answers `problem`; `number` are the optimizer steps before."""

    compiled: Compiled
    problem: Problem
    schedule: Schedule
    step: Step
    assembled: Assembled
    number: int
    sweep: int


@dataclass
class _Step:
    """A step under way; the last three are known when it is complete."""

    number: int
    sweep: int
    program: int
    record: StepRecord
    differs: str | None
    started_ns: int
    loss: float | None = None
    at_us: int = 0
    wall_us: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    def line(self) -> StepLine:
        """As it is written; the device has done it."""
        took = self.record.took()
        return StepLine(
            step=self.number,
            sweep=self.sweep,
            program=self.program,
            differs=self.differs or (None if took.complete else BROKEN),
            loss=self.loss,
            micro_batches=took.micro_batches,
            at_us=self.at_us,
            wall_us=self.wall_us,
            forward_us=took.forward_us,
            backward_us=took.backward_us,
            update_us=took.update_us,
            peak_nbytes=took.peak_nbytes,
            traffic=self.traffic,
            instant_us=took.us,
            instant_nbytes=took.nbytes,
        )


def _runs_as(step: Step, other: Step) -> bool:
    """Whether two steps do the same; what was predicted of them may differ."""
    return (step.chunks, step.options, step.update) == (other.chunks, other.options, other.update)


class Recording:
    """What a session tells of its steps, written to `file`; see `chunkft_compile.record`.

    `traffic` is what has been moved before. `failed` says that the file could not be written any more.
    """

    def __init__(self, file: IO[bytes], device: torch.device, budget_nbytes: int, guard: Guard, traffic: Traffic) -> None:
        self.failed = False
        self._file, self._clock, self._traffic = file, Clock(device), traffic
        self._plans: dict[tuple[Fingerprint, Schedule], int] = {}
        self._latest: tuple[weakref.ref[Compiled], Schedule, bool, int] | None = None
        self._programs: weakref.WeakKeyDictionary[Assembled, dict[int, int]] = weakref.WeakKeyDictionary()  # and by plan
        self._count = 0  # of programs
        self._step: _Step | None = None
        self._waiting: deque[_Step] = deque()  # complete for the host, and perhaps not for the device
        self._start_ns = time.perf_counter_ns()
        started = datetime.now(UTC).isoformat(timespec="milliseconds")
        versions = chunkft_compile.__version__, str(torch.__version__)
        self._write(Header(VERSION, *versions, str(device), budget_nbytes, started, *memory_of(guard)))

    def note_loss(self, loss: float) -> None:
        """The loss of the step under way: call it between its forward and its `optimizer.step()`. Of several, the last one counts.

        Raises `TrainingError` where no step is under way.
        """
        if self._step is None:
            raise TrainingError("no step is under way that this could be the loss of: call note_loss() before optimizer.step()")
        self._step.loss = float(loss)

    def watch(self, inner: Watch, running: Running, *, exact: bool) -> Watch:
        """The session is about to run a program, or its updates; it reports to what this gives.

        Unless `exact`, the batch is smaller than the one that the program was made for.
        """
        self._write_ready()
        under_way, program = self._step, running.assembled.program
        if under_way is None or under_way.number != running.number or under_way.record.program is not program:
            self._step = self._begin(running)
            if under_way is not None and under_way.number == running.number:
                self._step.differs, self._step.loss = self._step.differs or REPLANNED, under_way.loss
        assert self._step is not None
        if not exact and self._step.differs is None:
            self._step.differs = SMALLER
        return self._step.record.watch(inner)

    def complete(self, traffic: Traffic) -> None:
        """The step under way is complete; `traffic` is that of the whole training."""
        step, self._step = self._step, None
        if step is None:
            return  # it began before the recording
        now = time.perf_counter_ns()
        step.at_us, step.wall_us = (now - self._start_ns) // 1000, (now - step.started_ns) // 1000
        step.traffic, self._traffic = traffic - self._traffic, traffic
        self._waiting.append(step)
        self._write_ready()

    def finish(self) -> None:
        """Write the steps that are complete, when the device has done them."""
        for step in self._waiting:
            step.record.wait()
        self._write_ready()

    def _begin(self, running: Running) -> _Step:
        planned = next((place for place, step in enumerate(running.schedule.steps) if _runs_as(step, running.step)), None)
        program = self._program(running, self._plan(running), planned)
        record = StepRecord(running.assembled.program, self._clock)
        return _Step(running.number, running.sweep, program, record, PART if planned is None else None, time.perf_counter_ns())

    def _plan(self, running: Running) -> int:
        """The number of a plan; a new one gets its line."""
        compiled, schedule, accumulating = running.compiled, running.schedule, running.assembled.program.accumulating
        if self._latest is not None:
            known, of, as_well, number = self._latest
            if known() is compiled and of is schedule and as_well == accumulating:
                return number
        key = fingerprint(compiled, accumulating=accumulating), schedule
        if key not in self._plans:
            self._plans[key] = len(self._plans)
            self._write(PlanLine(self._plans[key], *key))
        self._latest = weakref.ref(compiled), schedule, accumulating, self._plans[key]
        return self._plans[key]

    def _program(self, running: Running, plan: int, planned: int | None) -> int:
        """The number of a program under a plan; a new one gets its line."""
        numbers = self._programs.setdefault(running.assembled, {})
        if plan not in numbers:
            numbers[plan] = self._count
            self._count += 1
            names = tuple(title_of(running.problem, instruction) for instruction in running.assembled.program.instructions)
            self._write(ProgramLine(numbers[plan], plan, planned, names))
        return numbers[plan]

    def _write_ready(self) -> None:
        """Write the steps that the device has done, in their order."""
        while self._waiting and self._waiting[0].record.has_passed():
            self._write(self._waiting.popleft().line())

    def _write(self, line: Line) -> None:
        if self.failed:
            return
        rest = memoryview(to_text(line).encode())
        try:
            while rest:  # one system call may take a part only
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.failed = True
            logger.warning("the recording of this run ends here, training goes on: %s", error)
