"""Recorded runs, and how a run compares with its plan, step by step and instruction by instruction."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

from chunkft_compile.planner import Plan, PlanMismatch, Trace
from chunkft_compile.planner.artefacts import differences, schedule_differences
from chunkft_compile.planner.program import Op
from chunkft_compile.run_lines import Header, Line, Memory, PlanLine, StepLine, from_text


@dataclass(frozen=True, slots=True)
class Run:
    """What `chunkft_compile.record` wrote, in order. `torn` says that the last line was cut off, as in a run that was killed."""

    header: Header
    plans: tuple[PlanLine, ...]
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
    steps: list[StepLine] = []
    for number, raw in enumerate(lines, 1):
        try:
            line = from_text(raw.decode("utf-8"))
            _check(line, header, plans)
        except ValueError as error:  # UnicodeDecodeError is one
            raise ValueError(f"{path}, line {number}: {error}") from error
        match line:
            case Header():
                header = line
            case PlanLine():
                plans.append(line)
            case StepLine():
                steps.append(line)
    if header is None:
        raise ValueError(f"{path} holds no complete line, not even a header: nothing was recorded in it")
    return Run(header, tuple(plans), tuple(steps), torn=bool(rest))


def _check(line: Line, header: Header | None, plans: Sequence[PlanLine]) -> None:
    """Raise `ValueError` for a line that cannot come here."""
    if isinstance(line, Header) is not (header is None):
        raise ValueError("the first line is a header, and no other one")
    if isinstance(line, PlanLine) and line.number != len(plans):
        raise ValueError(f"this is plan {line.number}, expected {len(plans)}")
    if isinstance(line, StepLine):
        if not 0 <= line.plan < len(plans):
            raise ValueError(f"this step ran under plan {line.plan}, and there are {len(plans)} so far")
        if line.planned is not None and not 0 <= line.planned < len(plans[line.plan].schedule.steps):
            raise ValueError(f"this is step {line.planned} of a schedule of {len(plans[line.plan].schedule.steps)}")
        if line.instant_nbytes is not None and len(line.instant_nbytes) != len(line.instant_us):
            raise ValueError(f"this step has {len(line.instant_us)} times and {len(line.instant_nbytes)} peaks")


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
    times are those of one micro-batch and the update. `measured_nbytes` is the most of any sweep.
    """

    number: int
    sweeps: int
    planned_us: int
    measured_us: int
    planned_nbytes: int
    measured_nbytes: int | None
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
        if line.plan not in numbers:
            left_out["another plan"] += 1
        elif line.differs is not None or line.planned is None:
            left_out[line.differs or "no step of the plan"] += 1
        else:
            recorded[line.planned].append(line)
    if not recorded:
        why = ", ".join(f"{count} ({reason})" for reason, count in left_out.items()) or "there are none"
        raise ValueError(f"no step of this run can be compared with the plan: {why}")
    steps = tuple(_compare(number, plan.traces[number], lines) for number, lines in sorted(recorded.items()))
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


def _compare(number: int, trace: Trace, lines: Sequence[StepLine]) -> ComparedStep:
    for line in lines:
        if len(line.instant_us) != len(trace.instants):
            raise PlanMismatch(
                f"step {number + 1} has {len(trace.instants)} instructions in the plan and {len(line.instant_us)} in the run: "
                f"they were made by different versions of this library; plan again, and record again"
            )
    peaks = [line.instant_nbytes for line in lines if line.instant_nbytes is not None]
    instants = tuple(
        ComparedInstant(
            instant.op,
            instant.name,
            instant.us,
            median_low(line.instant_us[place] for line in lines),
            instant.peak_nbytes,
            max((peak[place] for peak in peaks), default=None),
        )
        for place, instant in enumerate(trace.instants)
    )
    return ComparedStep(
        number,
        len(lines),
        sum(instant.us for instant in trace.instants),
        median_low(sum(line.instant_us) for line in lines),
        trace.peak_nbytes,
        max((line.peak_nbytes for line in lines if line.peak_nbytes is not None), default=None),
        instants,
    )
