"""A schedule to keep: what it was made for, the planner's question and its answer, as one versioned text."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from chunkft_compile.planner.problem import Problem, Schedule
from chunkft_compile.planner.traces import Trace, trace_bound

_SHOWN = 3  # names in an error message


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a schedule depends on. `graph` is a hash of the segments' graphs, `inputs` describes every input of the model.

    `chunks` are all chunks by name (`fqn[start:stop]`), so they tell the trainable set and how it was divided.
    """

    graph: str
    chunks: tuple[str, ...]
    inputs: tuple[str, ...]
    dtype: str
    device: str
    optimizer: str
    accumulating: bool
    torch: str
    precision: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule with its problem, and the fingerprint of what it runs on.

    `traces` are those of its programs, one for each step; none where it was planned for a device that was not there.
    """

    fingerprint: Fingerprint
    problem: Problem
    schedule: Schedule
    traces: tuple[Trace, ...] = ()

    def __post_init__(self) -> None:
        if self.traces and [trace.peak_nbytes for trace in self.traces] != [step.peak_nbytes for step in self.schedule.steps]:
            raise ValueError("the traces of a plan are those of its steps, with the same peaks")

    @property
    def lowered(self) -> bool:
        """Whether its steps state the exact peaks and times of programs."""
        return bool(self.traces)


def traces_of(planned: Plan) -> tuple[Trace, ...]:
    """The trace of every step: exact where the plan was lowered, else the planner's bound."""
    return planned.traces or tuple(trace_bound(planned.problem, step, planned.schedule.places) for step in planned.schedule.steps)


class PlanMismatch(ValueError):
    """A plan that was made for something else; the message names every difference."""


def check_fingerprint(planned: Fingerprint, here: Fingerprint) -> None:
    """Raise `PlanMismatch` unless a plan for `planned` is one for `here`."""
    found = differences(planned, here)
    if found:
        raise PlanMismatch(
            "this plan was made for something else:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nway out: plan again for this model, batch and optimizer, or use what the plan was made for"
        )


def differences(planned: Fingerprint, here: Fingerprint) -> list[str]:
    """Every difference between what a plan is for and what is here, a line each."""
    return [
        line for field in fields(Fingerprint) for line in _differences(field.name, getattr(planned, field.name), getattr(here, field.name))
    ]


def schedule_differences(planned: Schedule, other: Schedule, there: str) -> list[str]:
    """A line for each way in which `other`, the schedule that `there` has, runs other programs than `planned`; predictions may differ.

    The chunks of both are the same ones.
    """
    found = []
    if planned.budget_nbytes != other.budget_nbytes:
        found.append(f"budget: the plan has {planned.budget_nbytes} bytes, {there} has {other.budget_nbytes}")
    if len(planned.steps) != len(other.steps):
        found.append(f"steps of a sweep: the plan has {len(planned.steps)}, {there} has {len(other.steps)}")
    else:
        for what in ("chunks", "options", "update"):
            pairs = zip(planned.steps, other.steps, strict=True)
            unlike = [number for number, (step, one) in enumerate(pairs, 1) if getattr(step, what) != getattr(one, what)]
            if unlike:
                first, step, one = unlike[0], planned.steps[unlike[0] - 1], other.steps[unlike[0] - 1]
                more = f", and so do {len(unlike) - 1} more steps" if len(unlike) > 1 else ""
                found.append(f"step {first} has other {what} in {there}: {_unlike(getattr(step, what), getattr(one, what))}{more}")
    for what in ("state", "weights"):
        pairs = zip(getattr(planned.places, what), getattr(other.places, what), strict=True)
        if moved := [number for number, (place, one) in enumerate(pairs) if place is not one]:
            of = "chunks" if what == "state" else "segments"
            found.append(f"places of {what}: {len(moved)} {of} differ, the first is number {moved[0]}")
    return found


def _unlike(planned: Sequence[object] | str, other: Sequence[object] | str) -> str:
    """Where two tuples, or texts, differ first."""
    if isinstance(planned, str) or isinstance(other, str):
        return f"{planned} and {other}"
    place, (mine, yours) = next(
        (place, pair) for place, pair in enumerate(itertools.zip_longest(planned, other, fillvalue="nothing")) if pair[0] != pair[1]
    )
    return f"at place {place} {mine} and {yours}"


def _differences(name: str, planned: object, here: object) -> Iterator[str]:
    if planned == here:
        return
    if name == "graph":
        yield f"graph: the plan knows {planned}, this model is {here} (another architecture, size, attention or transformers version)"
    elif name == "chunks":
        assert isinstance(planned, tuple)
        assert isinstance(here, tuple)
        yield from _named("trained by the plan, not trainable here", [chunk for chunk in planned if chunk not in set(here)])
        yield from _named("trainable here, unknown to the plan", [chunk for chunk in here if chunk not in set(planned)])
        if set(planned) == set(here):
            yield "chunks: the same ones in another order"
    else:
        yield f"{name}: the plan has {_text(planned)}, here it is {_text(here)}"


def _named(what: str, chunks: Sequence[str]) -> Iterator[str]:
    if chunks:
        more = f" and {len(chunks) - _SHOWN} more" if len(chunks) > _SHOWN else ""
        yield f"chunks {what}: {', '.join(chunks[:_SHOWN])}{more}"


def _text(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
