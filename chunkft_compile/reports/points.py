"""Budgets beside that of a plan, and the sweeps they would buy with the same chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chunkft_compile.planner import Plan, sketch, smallest_budget


@dataclass(frozen=True, slots=True)
class Point:
    """A budget and the sweep it buys: T steps in `sweep_us` microseconds."""

    budget_nbytes: int
    sweep_us: int
    steps: int


def points_around(planned: Plan, *, count: int = 8) -> tuple[Point, ...]:
    """What other budgets would buy, from the smallest that works to twice that of the plan, without a search (`sketch`).

    Chunks are those of the plan. Planning anew for another budget cuts other ones and searches, so a point is a sweep that can be had, and
    there may be faster ones.
    """
    smallest, _ = smallest_budget(planned.problem)
    found = ((budget, sketch(replace(planned.problem, budget_nbytes=budget))) for budget in _budgets(smallest, planned, count))
    points = [Point(budget, schedule.sweep_us, len(schedule.steps)) for budget, schedule in found if schedule is not None]
    own = Point(planned.schedule.budget_nbytes, planned.schedule.sweep_us, len(planned.schedule.steps))
    return tuple(point for point in points if not _dominated(point, [*points, own]))


def _dominated(point: Point, others: Sequence[Point]) -> bool:
    """Whether a smaller budget buys a faster sweep: then the larger one buys it, too."""
    return any(other.budget_nbytes < point.budget_nbytes and other.sweep_us < point.sweep_us for other in others)


def _budgets(smallest: int, planned: Plan, count: int) -> Sequence[int]:
    """Budgets in equal ratios, that of the plan left out: its own figures are known."""
    budget = planned.schedule.budget_nbytes
    ratio = (max(2 * budget, smallest + 1) / smallest) ** (1 / (count - 1))
    return sorted({round(smallest * ratio**number) for number in range(count)} - {budget})
