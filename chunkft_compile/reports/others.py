"""Other schedules of a plan's chunks: the plan itself as the planner sees it, and sweeps of fewer steps in more bytes."""

import time
from dataclasses import replace

from chunkft_compile.planner import Plan, Schedule, sketch
from chunkft_compile.planner.bounds import roles_of
from chunkft_compile.planner.grounds import settle
from chunkft_compile.planner.options import make_step

_FIRST = 64  # the first bytes more that are tried are this part of the budget; next come four times as many
_MOST = 64  # times the budget: more is not looked at
_GRAIN = 50  # how many bytes more are enough is found to this part of them


def bound_of(planned: Plan) -> Schedule | None:
    """The plan by the planner's bound; None where it has options that another beats by the times its problem knows."""
    problem, schedule = planned.problem, planned.schedule
    for step in schedule.steps:
        for s, (role, option) in enumerate(zip(roles_of(problem, step.chunks), step.options, strict=True)):
            if option not in [cost.option for cost in problem.costs(s, role)]:
                return None
    ground = settle(problem, schedule.places)
    steps = (make_step(ground, step.chunks, step.options, step.update) for step in schedule.steps)
    return replace(schedule, steps=tuple(steps))


def in_fewer_steps(planned: Plan, most: int, seconds: float) -> Schedule | None:
    """A sweep of at most `most` steps in few bytes more than the budget; None where none is found. Takes about `seconds`."""
    until, budget = time.monotonic() + seconds, planned.schedule.budget_nbytes

    def found_in(more_nbytes: int) -> Schedule | None:
        schedule = sketch(replace(planned.problem, budget_nbytes=budget + more_nbytes), prefer="fresh")
        return schedule if schedule is not None and len(schedule.steps) <= most else None

    too_few, enough = 0, max(1, budget // _FIRST)
    while (best := found_in(enough)) is None:
        too_few, enough = enough, 4 * enough
        if enough > _MOST * budget:
            return None
    while enough - too_few > max(1, enough // _GRAIN) and time.monotonic() < until:
        middle = (too_few + enough) // 2
        found = found_in(middle)
        too_few, enough, best = (too_few, middle, found) if found else (middle, enough, best)
    return best
