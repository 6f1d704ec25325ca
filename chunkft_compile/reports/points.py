"""Budgets beside that of a plan, and the sweeps they would buy with the same chunks."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chunkft_compile.planner import BudgetError, Plan, plan, smallest_budget

_SECONDS = 0.5  # for the solver, each: a curve is read, not run
_LONGEST_S = 15.0  # for all of them: the planner's other work on a model of 80 blocks takes seconds a budget


@dataclass(frozen=True, slots=True)
class Point:
    """A budget and the sweep it buys: T steps in `sweep_us` microseconds."""

    budget_nbytes: int
    sweep_us: int
    steps: int


def points_around(planned: Plan, *, count: int = 7) -> tuple[Point, ...]:
    """What other budgets would buy, from the smallest that works to twice that of the plan, by a short search at each.

    Chunks are those of the plan. Planning anew for another budget cuts other ones, so the figures are for the shape of the curve.
    """
    smallest, _ = smallest_budget(planned.problem)
    found, ends = [], time.monotonic() + _LONGEST_S
    budgets = _budgets(smallest, planned.schedule.budget_nbytes, count)
    for budget in sorted(budgets, key=lambda budget: abs(math.log(budget / planned.schedule.budget_nbytes))):  # near ones first
        if time.monotonic() > ends:
            break
        try:
            schedule = plan(replace(planned.problem, budget_nbytes=budget), time_limit_s=_SECONDS)
        except BudgetError:  # the smallest is that of the leanest places, which this search may leave
            continue
        found.append(Point(budget, schedule.sweep_us, len(schedule.steps)))
    return tuple(sorted(found, key=lambda point: point.budget_nbytes))


def _budgets(smallest: int, budget: int, count: int) -> Sequence[int]:
    """Budgets in equal ratios, that of the plan left out: its own figures are known."""
    largest = max(2 * budget, smallest + 1)
    ratio = (largest / smallest) ** (1 / (count - 1))
    return sorted({round(smallest * ratio**number) for number in range(count)} - {budget})
