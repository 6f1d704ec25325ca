from dataclasses import replace

import pytest
from hypothesis import given, settings
from ortools.sat.python import cp_model

from chunkft_compile.planner.bundling import bundle
from chunkft_compile.planner.cpsat import Answer, build, hint, solve
from chunkft_compile.planner.cpsat_time import constant_us
from chunkft_compile.planner.drafts import Draft, Prefer, finish
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.grounds import leanest, on_device
from chunkft_compile.planner.options import fits
from chunkft_compile.planner.problem import Placement, Problem, Schedule, Update
from chunkft_compile.planner.verifying import verify
from tests.planner.brute_force import fastest_sweep
from tests.planner.planner_problems import plain_ground, problems, transformer


def draft_of(problem: Problem) -> Draft | None:
    """The greedy plan with all weights on the device."""
    steps = greedy_steps(plain_ground(problem))
    return Draft(steps, on_device(problem)) if steps else None


def solved(
    problem: Problem,
    *,
    time_limit_s: float = 10.0,
    gap: float = 0.0,
    workers: int = 1,
    seed: int = 0,
    most: int | None = None,
    prefer: Prefer = "time",
) -> Answer:
    """CP-SAT on the problem as it is, with as many steps as it has chunks: exact when it ends with OPTIMAL."""
    known = draft_of(problem)
    count = most or max(len(known.steps) if known else 1, min(6, len(problem.chunks)))
    model = build(problem, [[index] for index in range(len(problem.chunks))], max_steps=count, prefer=prefer)
    if known is not None and len(known.steps) <= count:
        hint(model, known)
    return solve(model, time_limit_s=time_limit_s, seed=seed, workers=workers, gap=gap, prefer=prefer)


@settings(max_examples=120, deadline=None)
@given(problems(chunks=4, modes=True))
def test_equals_brute_force(problem: Problem) -> None:
    if not all(fits(plain_ground(problem), [index], problem.budget_nbytes) for index in range(len(problem.chunks))):
        return
    answer, best = solved(problem), fastest_sweep(problem)
    assert answer.status == "OPTIMAL"
    assert answer.draft is not None
    steps, places = finish(problem, answer.draft)
    verify(problem, Schedule(problem.budget_nbytes, steps, places, answer.status, 0.0, 0.0))
    assert answer.draft.us == best == answer.bound_us


@settings(max_examples=60, deadline=None)
@given(problems(chunks=3, segments=2, modes=True, places=True))
def test_the_bound_holds_for_every_placement(problem: Problem) -> None:
    if not all(fits(leanest(problem), [index], problem.budget_nbytes) for index in range(len(problem.chunks))):
        return
    best = fastest_sweep(problem)
    answer = solved(problem)
    if answer.draft is not None:
        steps, places = finish(problem, answer.draft)
        verify(problem, Schedule(problem.budget_nbytes, steps, places, answer.status, 0.0, 0.0))
        assert best is None or best <= sum(step.us for step in steps)  # None: a place is too small, and the planner found another way
    optional = Placement.DEVICE in problem.state and len(problem.state) > 1  # then the bound is about a narrower class, see `plan`
    if best is not None and answer.status == "OPTIMAL" and len(problem.links) == 1 and not problem.links[0].overlaps and not optional:
        assert answer.bound_us <= best


@settings(max_examples=15, deadline=None)
@given(problems(chunks=4, modes=True))
def test_a_larger_budget_is_never_slower(problem: Problem) -> None:
    times = []
    for factor in (1, 2, 4):
        wider = replace(problem, budget_nbytes=problem.budget_nbytes * factor)
        answer = solved(wider) if draft_of(wider) else None
        if answer is not None and answer.draft is not None:
            assert answer.status == "OPTIMAL"
            times.append(answer.draft.us)
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("updates", [(Update.HELD,), tuple(Update), (Update.IMMEDIATE,)])
@pytest.mark.parametrize("accumulating", [False, True])
def test_the_hint_is_a_solution(accumulating: bool, updates: tuple[Update, ...]) -> None:
    if (accumulating and len(updates) > 1) or (accumulating and updates[0] is Update.IMMEDIATE):
        return
    problem = bundle(replace(transformer(6, 0.8, tokens=1024, accumulating=accumulating), updates=updates))
    known = draft_of(problem.problem)
    assert known is not None
    model = build(problem.problem, problem.groups(), max_steps=len(known.steps) + 1)
    hint(model, known)
    solver = cp_model.CpSolver()
    solver.parameters.fix_variables_to_their_hinted_value = True
    assert solver.solve(model.cp) == cp_model.OPTIMAL
    assert len(model.cp.proto.solution_hint.vars) == len(model.cp.proto.variables)
    assert solver.value(model.kept) == 0 or solver.objective_value + constant_us(model) < known.us
    assert solver.value(model.kept) > 0 or solver.objective_value + constant_us(model) == pytest.approx(known.us)


def test_without_time_nothing_is_claimed() -> None:
    answer = solved(transformer(6, 0.4, tokens=1024), time_limit_s=1e-9)
    assert (answer.draft, answer.status, answer.bound_us) == (None, "GREEDY", 0)


def test_too_few_steps_are_proven_infeasible() -> None:
    problem = transformer(6, 0.4, tokens=1024)
    assert solved(problem, most=1).status == "INFEASIBLE"


def test_fresh_sweeps_have_the_fewest_steps() -> None:
    problem = transformer(3, 0.5, tokens=1024)
    quick, fresh = solved(problem, gap=0.01), solved(problem, gap=1e-4, prefer="fresh")
    assert quick.draft is not None
    assert fresh.draft is not None
    assert len(fresh.draft.steps) <= len(quick.draft.steps)
    assert fresh.bound_us > fresh.step_us * (len(fresh.draft.steps) - 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_seed_gives_one_schedule(workers: int) -> None:
    problem = transformer(6, 0.5, tokens=1024)
    first, again = (solved(problem, time_limit_s=1.0, workers=workers, seed=3) for _ in range(2))
    assert first.draft is not None
    assert (first.draft, first.bound_us) == (again.draft, again.bound_us)


def test_large_budgets_are_counted_in_units() -> None:
    problem = transformer(6, 1.0)
    model = build(problem, [[index] for index in range(len(problem.chunks))], max_steps=2)
    assert model.unit_nbytes > 1
    assert model.units(model.unit_nbytes + 1) == 2
    assert model.most_room * model.unit_nbytes <= problem.budget_nbytes - problem.static_nbytes
    assert model.cp.validate() == ""
