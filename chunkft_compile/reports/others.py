"""Other sweeps of a plan's chunks: in more bytes, or with what the plan was not allowed. Greedy, so what they show can be had at least."""

import time
from dataclasses import dataclass, replace

from chunkft_compile.planner import Placement, Places, Plan, Problem, Step
from chunkft_compile.planner.bounds import roles_of
from chunkft_compile.planner.bundling import bundle
from chunkft_compile.planner.drafts import Draft, finish
from chunkft_compile.planner.explaining import fits_at_all
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.grounds import leanest, settle, spread
from chunkft_compile.planner.options import make_step
from chunkft_compile.planner.traces import trace_bound
from chunkft_compile.reports.moments import time_split

_FIRST = 64  # the first bytes more that are tried are this part of the budget; they are doubled
_MOST = 64  # times the budget: more is not looked at
_GRAIN = 50  # how many bytes more are enough is found to this part of them


@dataclass(frozen=True, slots=True)
class Sweep:
    """Steps that fit `problem.budget_nbytes`, by the planner's bound."""

    problem: Problem
    steps: tuple[Step, ...]
    places: Places

    @property
    def us(self) -> int:
        """Time of the sweep."""
        return sum(step.us for step in self.steps)

    def time_split(self) -> dict[str, int]:
        """Its microseconds by what they are spent on."""
        return time_split(trace_bound(self.problem, step, self.places) for step in self.steps)


def bound_of(planned: Plan) -> Sweep | None:
    """The plan itself by the planner's bound; None where it has options that another beats by the times its problem knows."""
    problem, schedule = planned.problem, planned.schedule
    for step in schedule.steps:
        for s, (role, option) in enumerate(zip(roles_of(problem, step.chunks), step.options, strict=True)):
            if option not in [cost.option for cost in problem.costs(s, role)]:
                return None
    ground = settle(problem, schedule.places)
    return Sweep(problem, tuple(make_step(ground, step.chunks, step.options, step.update) for step in schedule.steps), schedule.places)


def sweep_of(problem: Problem, weights: tuple[Placement, ...]) -> Sweep | None:
    """A greedy sweep with its weights in these places, or else where they leave the most room; None where neither fits."""
    if not fits_at_all(problem):
        return None
    bundled = bundle(problem)
    for places in dict.fromkeys([weights, leanest(problem).places.weights]):
        steps = greedy_steps(settle(bundled.problem, spread(bundled.problem, places)))
        if steps is not None:
            return Sweep(problem, *finish(problem, Draft(steps, places), bundled))
    return None


def in_fewer_steps(planned: Plan, most: int, seconds: float) -> Sweep | None:
    """A sweep of at most `most` steps in few bytes more than the budget; None where none is found. Takes about `seconds`."""
    until, budget = time.monotonic() + seconds, planned.schedule.budget_nbytes

    def found_in(more_nbytes: int) -> Sweep | None:
        sweep = sweep_of(replace(planned.problem, budget_nbytes=budget + more_nbytes), planned.schedule.places.weights)
        return sweep if sweep is not None and len(sweep.steps) <= most else None

    too_few, enough, best = 0, max(1, budget // _FIRST), None
    while (best := found_in(enough)) is None:
        too_few, enough = enough, 2 * enough
        if enough > _MOST * budget:
            return None
    while enough - too_few > max(1, enough // _GRAIN) and time.monotonic() < until:
        middle = (too_few + enough) // 2
        found = found_in(middle)
        too_few, enough, best = (too_few, middle, found) if found else (middle, enough, best)
    return best
