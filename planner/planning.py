"""The whole planner on one screen: greedy, build, solve, place the state, check."""

import time

from chunkft_compile.planner.bounds import cost_us, roles_of
from chunkft_compile.planner.bundling import bundle, unbundled
from chunkft_compile.planner.cpsat import build, solve
from chunkft_compile.planner.explaining import budget_error
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.limits import cheapest_us, least_us, most_steps
from chunkft_compile.planner.problem import Placement, Places, Problem, Schedule, Step
from chunkft_compile.planner.residency import place_state
from chunkft_compile.planner.verifying import verify


def plan(problem: Problem, *, time_limit_s: float = 5.0, seed: int = 0, workers: int = 2) -> Schedule:
    """The fastest sweep found within the budget; `BudgetError` where none fits.

    The same arguments give the same schedule: `time_limit_s` is turned into an amount of work, and real time ends the search only
    on a machine so slow that it takes twice the limit. OPTIMAL and the gap are about sweeps of at most `most_steps` steps of
    bundled chunks, and OPTIMAL means within 0.2 %.
    """
    start = time.perf_counter()
    steps = greedy_steps(problem)
    if steps is None:
        raise budget_error(problem)
    status, gap = "OPTIMAL", 0.0
    if not _is_best(problem, steps):
        steps, status, gap = _improve(problem, steps, time_limit_s=time_limit_s, seed=seed, workers=workers)
    resident = set(place_state(problem, steps))
    away = problem.links[-1].placement
    state = tuple(Placement.DEVICE if index in resident else away for index in range(len(problem.chunks)))
    places = Places(state, (Placement.DEVICE,) * len(problem.segments))
    schedule = Schedule(problem.budget_nbytes, steps, places, status, gap, time.perf_counter() - start)
    verify(problem, schedule)
    return schedule


def _improve(
    problem: Problem, steps: tuple[Step, ...], *, time_limit_s: float, seed: int, workers: int
) -> tuple[tuple[Step, ...], str, float]:
    """CP-SAT on the bundled problem: steps no slower than the given ones, the status, and the gap to the proven bound."""
    bundled = bundle(problem)
    hint = greedy_steps(bundled.problem)
    assert hint is not None, "every bundle fits alone"
    model = build(bundled.problem, bundled.groups(), hint, max_steps=most_steps(bundled.problem, hint))
    answer = solve(model, hint, time_limit_s=time_limit_s, seed=seed, workers=workers)
    found = tuple(unbundled(step, bundled) for step in answer.steps)
    best = min(found, steps, key=_sweep_us)
    return best, answer.status, max(0.0, 1 - answer.bound_us / _sweep_us(best)) if _sweep_us(best) else 0.0


def _sweep_us(steps: tuple[Step, ...]) -> int:
    return sum(step.us for step in steps)


def _is_best(problem: Problem, steps: tuple[Step, ...]) -> bool:
    """Is this greedy plan certainly the fastest sweep, so that no solver is needed?

    Any sweep has a step over the lowest segment of all chunks, and takes at least `least_us` there. A sweep of two or more
    steps also has another step, which takes at least the cheapest `least_us` of all depths. If one step with the fastest
    option of every segment (no slower than any other single step) is no slower than both together, nothing can beat it.
    """
    grad_us = sum(chunk.grad_us for chunk in problem.chunks)
    deepest = least_us(problem, min(chunk.segment for chunk in problem.chunks))
    if _sweep_us(steps) == deepest + grad_us:
        return True
    roles = roles_of(problem, range(len(problem.chunks)))
    fastest = sum(min(cost_us(cost, role) for cost in problem.costs(s, role)) for s, role in enumerate(roles))
    return len(steps) == 1 and _sweep_us(steps) == fastest + grad_us <= deepest + cheapest_us(problem) + grad_us
