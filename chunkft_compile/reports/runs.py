"""Recorded runs, and how a run compares with its plan, step by step and instruction by instruction."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

from chunkft_compile.planner import Plan, PlanMismatch, Trace
from chunkft_compile.planner.artefacts import differences, schedule_differences
from chunkft_compile.planner.program import Op
from chunkft_compile.run_lines import Header, Line, Memory, PlanLine, ProgramLine, StepLine, from_text


@dataclass(frozen=True, slots=True)
class Run:
    """What `chunkft_compile.record` wrote, in order. `torn` says that the last line was cut off, as in a run that was killed."""

    header: Header
    plans: tuple[PlanLine, ...]
    programs: tuple[ProgramLine, ...]
    steps: tuple[StepLine, ...]
    torn: bool = False


def read_run(path: str | Path) -> Run:
    """A recorded run. Raises `ValueError` with the number of the line for anything that is not as written, but for a torn last line."""
    try:
        *lines, rest = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"the run {path} cannot be read: {error}") from error
    header: Header | None = None
    plans: list[PlanLine] = []
    programs: list[ProgramLine] = []
    steps: list[StepLine] = []
    for number, raw in enumerate(lines, 1):
        try:
            line = from_text(raw.decode("utf-8"))
            _check(line, header, plans, programs)
        except ValueError as error:  # UnicodeDecodeError is one
            raise ValueError(f"{path}, line {number}: {error}") from error
        match line:
            case Header():
                header = line
            case PlanLine():
                plans.append(line)
            case ProgramLine():
                programs.append(line)
            case StepLine():
                steps.append(line)
    if header is None:
        raise ValueError(f"{path} holds no complete line, not even a header: nothing was recorded in it")
    return Run(header, tuple(plans), tuple(programs), tuple(steps), torn=bool(rest))


def _check(line: Line, header: Header | None, plans: Sequence[PlanLine], programs: Sequence[ProgramLine]) -> None:
    """Raise `ValueError` for a line that cannot come here."""
    if isinstance(line, Header) is not (header is None):
        raise ValueError("the first line is a header, and no other one")
    match line:
        case PlanLine():
            if line.number != len(plans):
                raise ValueError(f"this is plan {line.number}, expected {len(plans)}")
        case ProgramLine():
            if line.number != len(programs):
                raise ValueError(f"this is program {line.number}, expected {len(programs)}")
            if not 0 <= line.plan < len(plans):
                raise ValueError(f"this program is of plan {line.plan}, and there are {len(plans)} so far")
            steps = len(plans[line.plan].schedule.steps)
            if line.planned is not None and not 0 <= line.planned < steps:
                raise ValueError(f"this is step {line.planned} of a schedule of {steps}")
        case StepLine():
            if not 0 <= line.program < len(programs):
                raise ValueError(f"this step ran program {line.program}, and there are {len(programs)} so far")
            expected = len(programs[line.program].instants)
            for what, found in (("times", line.instant_us), ("peaks", line.instant_nbytes)):
                if found is not None and len(found) != expected:
                    raise ValueError(f"this step has {len(found)} {what}, and its program {expected} instructions")


@dataclass(frozen=True, slots=True)
class ComparedInstant:
    """One instruction of a step, planned and measured. Times are medians over sweeps, bytes the most of any sweep, if measured."""

    op: Op
    name: str
    planned_us: int
    measured_us: int
    planned_nbytes: int
    measured_nbytes: int | None


@dataclass(frozen=True, slots=True)
class ComparedStep:
    """Step `number` (from 0) of the schedule, as measured in `sweeps` sweeps. `instants` are those of its trace, in the same order.

    `measured_us` is the median over sweeps of the sum of all instructions, in the lower of two in the middle; with accumulation both
    times are those of one micro-batch and the update. `measured_nbytes` is the most of any sweep. `moved`: the run has the same
    instructions in another order, since copies begin elsewhere (see `ProgramLine`), so peaks may differ either way.
    """

    number: int
    sweeps: int
    planned_us: int
    measured_us: int
    planned_nbytes: int
    measured_nbytes: int | None
    moved: bool
    instants: tuple[ComparedInstant, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Planned and measured microseconds, or bytes, of instruction `instant` of step `step` (both from 0)."""

    step: int
    instant: int
    name: str
    planned: int
    measured: int

    @property
    def over(self) -> int:
        """How much more was measured; negative where it was less."""
        return self.measured - self.planned


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plan against a run of it.

    `steps` are those that were recorded, of `planned_steps` of the sweep, in order. `left_out` are recorded steps that are not comparable:
    why, and how many. `memory` says what the measured bytes are, `memory_note` why.
    """

    steps: tuple[ComparedStep, ...]
    planned_steps: int
    left_out: tuple[tuple[str, int], ...]
    memory: Memory
    memory_note: str

    @property
    def planned_us(self) -> int:
        """Planned time of the steps that were recorded."""
        return sum(step.planned_us for step in self.steps)

    @property
    def measured_us(self) -> int:
        """Measured time of the same steps."""
        return sum(step.measured_us for step in self.steps)

    def by_op(self) -> dict[Op, tuple[int, int]]:
        """Planned and measured microseconds of these steps by what instructions do."""
        totals = dict.fromkeys(Op, (0, 0))
        for step in self.steps:
            for instant in step.instants:
                planned, measured = totals[instant.op]
                totals[instant.op] = planned + instant.planned_us, measured + instant.measured_us
        return {op: pair for op, pair in totals.items() if pair != (0, 0)}

    def times(self, most: int = 10) -> list[Difference]:
        """The instructions whose times differ most from the planned ones."""
        return _largest(
            (
                Difference(step.number, place, instant.name, instant.planned_us, instant.measured_us)
                for step in self.steps
                for place, instant in enumerate(step.instants)
            ),
            most,
        )

    def peaks(self, most: int = 10) -> list[Difference]:
        """The instructions whose peaks differ most from the planned ones; none where none was measured."""
        return _largest(
            (
                Difference(step.number, place, instant.name, instant.planned_nbytes, instant.measured_nbytes)
                for step in self.steps
                for place, instant in enumerate(step.instants)
                if instant.measured_nbytes is not None
            ),
            most,
        )


def _largest(found: Iterable[Difference], most: int) -> list[Difference]:
    return sorted((difference for difference in found if difference.over), key=lambda difference: -abs(difference.over))[:most]


def compare(plan: Plan, run: Run) -> Comparison:
    """A plan against what running it took.

    Raises `PlanMismatch` where the run is of another plan, with every difference, or the plan has no instructions to compare with, and
    `ValueError` where no step of the run is comparable.
    """
    if not plan.lowered:
        raise PlanMismatch(
            "this plan is for a device that was not there: its steps were never lowered, so there are no instructions to compare with; "
            "take the plan that was run, which model.save_schedule() writes"
        )
    numbers = _matching(plan, run)
    recorded: dict[int, list[StepLine]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for line in run.steps:
        program = run.programs[line.program]
        if program.plan not in numbers:
            left_out["another plan"] += 1
        elif line.differs is not None or program.planned is None:
            left_out[line.differs or "no step of the plan"] += 1
        else:
            recorded[program.planned].append(line)
    if not recorded:
        why = ", ".join(f"{count} ({reason})" for reason, count in left_out.items()) or "there are none"
        raise ValueError(f"no step of this run can be compared with the plan: {why}")
    steps = tuple(_compare(number, plan.traces[number], lines, run.programs) for number, lines in sorted(recorded.items()))
    return Comparison(steps, len(plan.traces), tuple(left_out.items()), run.header.memory, run.header.memory_note)


def _matching(plan: Plan, run: Run) -> set[int]:
    """The plans of the run that are this one. Raises `PlanMismatch` where none is, with what differs from the last one."""
    found: list[str] = []
    numbers = set()
    for line in run.plans:
        found = differences(plan.fingerprint, line.fingerprint) or schedule_differences(plan.schedule, line.schedule, "the run")
        if not found:
            numbers.add(line.number)
    if not numbers:
        lines = "\n".join(f"  {text}" for text in found or ["it ended before there was a plan"])
        raise PlanMismatch(
            f'this run ("here") is of another plan:\n{lines}\nway out: take the plan that was run, which model.save_schedule() writes'
        )
    return numbers


def _compare(number: int, trace: Trace, lines: Sequence[StepLine], programs: Sequence[ProgramLine]) -> ComparedStep:
    orders = [_order(number, trace, programs[line.program]) for line in lines]
    times = [[line.instant_us[place] for place in order] for line, order in zip(lines, orders, strict=True)]
    peaks = [
        [line.instant_nbytes[place] for place in order]
        for line, order in zip(lines, orders, strict=True)
        if line.instant_nbytes is not None
    ]
    instants = tuple(
        ComparedInstant(
            instant.op,
            instant.name,
            instant.us,
            median_low(us[place] for us in times),
            instant.peak_nbytes,
            max((nbytes[place] for nbytes in peaks), default=None),
        )
        for place, instant in enumerate(trace.instants)
    )
    return ComparedStep(
        number,
        len(lines),
        sum(instant.us for instant in trace.instants),
        median_low(sum(us) for us in times),
        trace.peak_nbytes,
        max((line.peak_nbytes for line in lines if line.peak_nbytes is not None), default=None),
        any(order != sorted(order) for order in orders),
        instants,
    )


def _order(number: int, trace: Trace, program: ProgramLine) -> list[int]:
    """For every instant of a trace, its place in the program that was run; of equal names the first is the first.

    Raises `PlanMismatch` where the program has other instructions.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place in reversed(range(len(program.instants))):
        places[program.instants[place]].append(place)
    order = [places[instant.name].pop() for instant in trace.instants if places[instant.name]]
    if len(order) != len(trace.instants) or len(order) != len(program.instants):
        planned, ran = Counter(instant.name for instant in trace.instants), Counter(program.instants)
        unlike = next(iter((planned - ran) + (ran - planned)))
        raise PlanMismatch(
            f"step {number + 1} has other instructions in the run, such as {unlike!r} ({ran[unlike]} instead of {planned[unlike]}): "
            f"they were made by different versions of this library; plan again, and record again"
        )
    return order
