"""Schedules that the solver did not choose, and a model that runs them: greedy, an equal-byte cut, whole layers."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from chunkft_compile import ChunkedModule
from chunkft_compile.planner import Placement, Places, Problem, Schedule, Step, place_state, verify
from chunkft_compile.planner.bounds import choose_options, make_step
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.runtime.sweep import Sweep


def greedy(problem: Problem) -> Schedule | None:
    """The plan without a solver."""
    steps = greedy_steps(problem)
    return _schedule(problem, steps) if steps else None


def equal_cut(problem: Problem) -> Schedule | None:
    """All chunks in the order of the model's parameters, cut into the fewest parts of equal gradient bytes that fit."""
    return _fewest(problem, ([*_parts(problem, count)] for count in range(1, len(problem.chunks) + 1)))


def whole_layers(problem: Problem) -> Schedule | None:
    """Groups of m neighbouring segments with all their parameters, for the largest m that fits."""
    count = len(problem.segments)
    return _fewest(problem, ([*_groups(problem, m)] for m in range(count, 0, -1)))


def adopt(model: ChunkedModule, schedule: Schedule) -> Schedule:
    """Let a model that has planned, but not trained, follow `schedule`; gives it with exact peaks and times.

    The schedule must be over the chunks of the same model in the same budget. Raises `ValueError` if a step needs more than the budget.
    """
    session = model._session
    assert session.latest is not None, "plan first"
    exact = session.latest.exact(schedule, accumulating=False)
    if exact.peak_nbytes > model.budget_nbytes:
        raise ValueError(f"the schedule needs {exact.peak_nbytes} bytes, the budget is {model.budget_nbytes}")
    session.sweep = Sweep(exact)
    return exact


def _parts(problem: Problem, count: int) -> Iterable[list[int]]:
    """`count` runs of chunks, each within half a chunk of the same bytes."""
    total, before = sum(chunk.grad_nbytes for chunk in problem.chunks), 0
    parts: list[list[int]] = [[] for _ in range(count)]
    for index, chunk in enumerate(problem.chunks):
        parts[(2 * before + chunk.grad_nbytes) * count // (2 * total)].append(index)
        before += chunk.grad_nbytes
    return (part for part in parts if part)


def _groups(problem: Problem, neighbours: int) -> Iterable[list[int]]:
    groups: dict[int, list[int]] = {}
    for index, chunk in enumerate(problem.chunks):
        groups.setdefault(chunk.segment // neighbours, []).append(index)
    return (groups[number] for number in sorted(groups))


def _fewest(problem: Problem, candidates: Iterable[Sequence[Sequence[int]]]) -> Schedule | None:
    """The first division whose every part fits, each segment with the fastest option that does."""
    for parts in candidates:
        options = [choose_options(problem, part, problem.budget_nbytes) for part in parts]
        if None not in options:
            return _schedule(problem, [make_step(problem, p, o) for p, o in zip(parts, options, strict=True) if o is not None])
    return None


def _schedule(problem: Problem, steps: Sequence[Step]) -> Schedule:
    """With optimizer state placed as the planner places it, and checked as the planner's own."""
    resident, away = set(place_state(problem, steps)), problem.links[-1].placement
    state = tuple(Placement.DEVICE if index in resident else away for index in range(len(problem.chunks)))
    places = Places(state, (Placement.DEVICE,) * len(problem.segments))
    schedule = Schedule(problem.budget_nbytes, tuple(steps), places, "GREEDY", 1.0, 0.0)
    verify(problem, schedule)
    return schedule


def same(one: Schedule, other: Schedule) -> bool:
    """Whether two schedules train the same chunks with the same options in the same steps, in whatever order."""
    return {_plain(step) for step in one.steps} == {_plain(step) for step in other.steps} and one.places == other.places


def _plain(step: Step) -> Step:
    return replace(step, peak_nbytes=0, us=0)
