"""The whole planner on one screen: known plans, build, solve, place the state, check."""

import time
from itertools import islice

from chunkft_compile.planner.bundling import Bundled, bundle
from chunkft_compile.planner.cpsat import GAP, Answer, build, hint, solve
from chunkft_compile.planner.drafts import Draft, Prefer, finish, rank
from chunkft_compile.planner.explaining import budget_error, fits_at_all, steps_error
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.grounds import leanest, on_device, settle, spread, weight_places
from chunkft_compile.planner.levelling import levelled_steps
from chunkft_compile.planner.limits import MOST_CELLS, most_steps
from chunkft_compile.planner.methods import METHODS, ingredients, method_problem, method_steps, option_names
from chunkft_compile.planner.problem import Placement, Places, Problem, Schedule, Step
from chunkft_compile.planner.proving import least_sweep_us
from chunkft_compile.planner.verifying import verify

_SHARES = tuple(part / 8 for part in range(8))  # one step is quickly made, and the amount of state all that is left to choose

Found = tuple[tuple[Step, ...], Places, Draft]
"""A finished sweep, and the draft it was made from."""


def plan(
    problem: Problem,
    *,
    prefer: Prefer = "time",
    max_steps: int | None = None,
    time_limit_s: float = 5.0,
    seed: int = 0,
    workers: int = 4,
    gap: float = GAP,
) -> Schedule:
    """The best of `plans`."""
    return plans(problem, prefer=prefer, max_steps=max_steps, time_limit_s=time_limit_s, seed=seed, workers=workers, gap=gap)[0]


def plans(
    problem: Problem,
    *,
    prefer: Prefer = "time",
    max_steps: int | None = None,
    time_limit_s: float = 5.0,
    seed: int = 0,
    workers: int = 4,
    gap: float = GAP,
    most: int = 1,
) -> tuple[Schedule, ...]:
    """At most `most` different sweeps found within the budget, best first: the fastest, or with `prefer="fresh"` that of the fewest steps.

    Never slower than greedy or any of `METHODS` under the same budget. Raises `BudgetError` where no schedule fits, or none of at
    most `max_steps` steps was found. The same arguments give the same schedule: `time_limit_s` is turned into an amount of work, and
    real time ends the search only on a machine so slow that it takes twice the limit. No search is begun
    where the known plans are proven to be within `gap` of the best. OPTIMAL and the gap of a search are about sweeps of at most
    `most_steps` steps of bundled chunks whose updates leave room for their state as if it were away; OPTIMAL means within 0.2 %.
    """
    start = time.perf_counter()
    if not fits_at_all(problem):
        raise budget_error(problem)
    bundled = bundle(problem)
    found = [(*finish(problem, draft, bundled), draft) for draft in known_drafts(bundled.problem, prefer, max_steps)]
    best = min(found, key=lambda one: rank(one[0], prefer), default=None)
    solvable = best is None or len(best[0]) * len(problem.segments) <= MOST_CELLS
    least = least_sweep_us(problem) if best else 0
    if best is not None and solvable:
        found += _with_room_for_state(problem, bundled, best, prefer, max_steps)
        best = min(found, key=lambda one: rank(one[0], prefer))
    proven = 0.0 if best is None else _gap(least, best[0])
    status = "GREEDY" if not solvable else "OPTIMAL" if proven <= GAP else "FEASIBLE"
    if solvable and (best is None or proven > max(gap, GAP) or (prefer == "fresh" and len(best[0]) > 1)):
        draft = best[2] if best else None
        answer = _improve(bundled, draft, prefer, max_steps, time_limit_s=time_limit_s, seed=seed, workers=workers)
        if answer.draft is not None:
            found.append((*finish(problem, answer.draft, bundled), answer.draft))
        if not found:
            raise steps_error(problem, max_steps or 1, proven=answer.status == "INFEASIBLE")
        assert answer.status != "INFEASIBLE", "CP-SAT calls a problem infeasible for which a plan is known"
        best = min(found, key=lambda one: rank(one[0], prefer))
        proven = _gap(max(least, answer.bound_us - len(best[0]) * answer.step_us), best[0])
        status = "OPTIMAL" if proven <= GAP else answer.status
    assert best is not None, "without a known plan the solver's is the one"
    solve_s = time.perf_counter() - start
    different = {steps: places for steps, places, _ in sorted(found, key=lambda one: rank(one[0], prefer))}
    schedules = []
    for steps, places in islice(different.items(), most):
        own_status = status if steps == best[0] else "GREEDY"
        own_gap = proven if steps == best[0] else _gap(least, steps)
        schedules.append(Schedule(problem.budget_nbytes, steps, places, own_status, own_gap, solve_s))
        verify(problem, schedules[-1])
    return tuple(schedules)


def sketch(problem: Problem, *, prefer: Prefer = "time") -> Schedule | None:
    """The best of greedy and `METHODS`, without a search: a second's work where `plan` takes ten. None where none of them fits.

    Its gap is 1: nothing is proven, and a search may find a faster sweep.
    """
    start = time.perf_counter()
    bundled = bundle(problem)
    found = [finish(problem, draft, bundled) for draft in known_drafts(bundled.problem, prefer)]
    if not found:
        return None
    steps, places = min(found, key=lambda one: rank(one[0], prefer))
    schedule = Schedule(problem.budget_nbytes, steps, places, "GREEDY", 1.0, time.perf_counter() - start)
    verify(problem, schedule)
    return schedule


def plan_method(problem: Problem, name: str) -> Schedule | None:
    """The sweep of exactly one of `METHODS`, with all weights on the device; None where it does not fit the budget.

    The gap is that to the fastest sweep of the problem. Raises `ValueError` where the problem lacks an ingredient of the method.
    """
    start = time.perf_counter()
    method = method_problem(problem, name)
    if method is None or Placement.DEVICE not in problem.weights:
        raise ValueError(
            f"{name} needs {ingredients(name)}; there are updates {', '.join(problem.updates)}, state on {', '.join(problem.state)}, "
            f"weights on {', '.join(problem.weights)}, and options {', '.join(option_names(problem))}"
        )
    steps = method_steps(settle(method, spread(method, on_device(method))), name)
    if steps is None:
        return None
    steps, places = finish(method, Draft(steps, on_device(method)))
    gap = _gap(least_sweep_us(problem), steps)
    schedule = Schedule(problem.budget_nbytes, steps, places, "FEASIBLE", gap, time.perf_counter() - start)
    verify(method, schedule)
    return schedule


def known_drafts(problem: Problem, prefer: Prefer, max_steps: int | None = None) -> list[Draft]:
    """Plans that need no solver: greedy for several ways to place the weights, and those methods that may be faster."""
    most = max_steps or len(problem.chunks)
    found: list[Draft] = []
    for weights in {leanest(problem).places.weights: None, **dict.fromkeys(_some(list(weight_places(problem))))}:
        ground = settle(problem, spread(problem, weights))
        steps = greedy_steps(ground)
        if steps is not None and len(steps) <= most:
            found.append(Draft(steps, weights))
    for name in METHODS:
        method = method_problem(problem, name)
        if method is not None and Placement.DEVICE in problem.weights:
            ground = settle(method, spread(method, on_device(method)))
            most_us = None
            if found and prefer == "time":  # state that stays on the device spares transfers of at most all of it
                most_us = min(draft.us for draft in found) + sum(move.hidden_us + move.exposed_us for move in ground.state_moves)
            steps = method_steps(ground, name, most_us)
            if steps is not None and len(steps) <= most:
                found.append(Draft(steps, on_device(problem)))
    return found


def _with_room_for_state(problem: Problem, bundled: Bundled, best: Found, prefer: Prefer, max_steps: int | None) -> list[Found]:
    """Greedy sweeps that keep more state on the device: of as many steps as the best, and of more while that pays."""
    found: list[Found] = []
    if Placement.DEVICE not in problem.state or not any(chunk.state_nbytes for chunk in problem.chunks):
        return found
    ground = settle(bundled.problem, spread(bundled.problem, best[2].weights))
    most = len(best[0]) if prefer == "fresh" else max_steps or len(bundled.problem.chunks)
    for count in range(len(best[0]), most + 1):
        shares = _SHARES if count == 1 else _SHARES[::4]
        drafts = [Draft(steps, best[2].weights) for steps in levelled_steps(ground, count, shares)]
        more = [(*finish(problem, draft, bundled), draft) for draft in drafts]
        found += more
        better = min([best, *more], key=lambda one: rank(one[0], prefer))
        if count > len(best[0]) and better is best:
            break
        best = better
    return found


def _some(ways: list[tuple[Placement, ...]], most: int = 8) -> list[tuple[Placement, ...]]:
    """A few of many, evenly spread, the first and the last among them."""
    return ways if len(ways) <= most else [ways[i * (len(ways) - 1) // (most - 1)] for i in range(most)]


def _improve(
    bundled: Bundled, known: Draft | None, prefer: Prefer, max_steps: int | None, *, time_limit_s: float, seed: int, workers: int
) -> Answer:
    """CP-SAT on the bundled problem, from the best known draft."""
    count = most_steps(bundled.problem, known.steps if known else ())
    if max_steps is not None:
        count = min(count, max_steps) if known else max_steps
    model = build(bundled.problem, bundled.groups(), max_steps=min(count, len(bundled.problem.chunks)), prefer=prefer)
    if known is not None:
        hint(model, known)
    return solve(model, time_limit_s=time_limit_s, seed=seed, workers=workers, prefer=prefer)


def _gap(bound_us: int, steps: tuple[Step, ...]) -> float:
    """How far the sweep is from the proven bound, as a share of it; 1 where nothing is proven."""
    us = sum(step.us for step in steps)
    return min(1.0, max(0.0, 1 - bound_us / us)) if us else 0.0
