"""Budgets beside that of a plan, and the sweeps they would buy with the same chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chunkft_compile.budget import budgets_between
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
    own = Point(planned.schedule.budget_nbytes, planned.schedule.sweep_us, len(planned.schedule.steps))
    budgets = {*budgets_between(smallest_budget(planned.problem)[0], 2 * own.budget_nbytes, count)} - {own.budget_nbytes}
    found = ((budget, sketch(replace(planned.problem, budget_nbytes=budget))) for budget in sorted(budgets))
    points = [Point(budget, schedule.sweep_us, len(schedule.steps)) for budget, schedule in found if schedule is not None]
    return tuple(point for point in points if not _dominated(point, [*points, own]))


def _dominated(point: Point, others: Sequence[Point]) -> bool:
    """Whether a smaller budget buys a faster sweep: then the larger one buys it, too."""
    return any(other.budget_nbytes < point.budget_nbytes and other.sweep_us < point.sweep_us for other in others)
