from dataclasses import replace

import pytest
from hypothesis import given, settings
from ortools.sat.python import cp_model

from chunkft_compile.planner.bundling import bundle
from chunkft_compile.planner.cpsat import Answer, build, solve
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.problem import Problem, Schedule
from chunkft_compile.planner.verifying import verify
from tests.planner.brute_force import fastest_sweep
from tests.planner.planner_problems import problems, transformer


def solved(problem: Problem, *, time_limit_s: float = 10.0, gap: float = 0.0, workers: int = 1, seed: int = 0) -> Answer | None:
    """CP-SAT on the problem as it is, with as many steps as it has chunks: exact when it ends with OPTIMAL."""
    hint = greedy_steps(problem)
    if hint is None:
        return None
    model = build(problem, [[index] for index in range(len(problem.chunks))], hint, max_steps=max(len(hint), min(6, len(problem.chunks))))
    return solve(model, hint, time_limit_s=time_limit_s, seed=seed, workers=workers, gap=gap)


@settings(max_examples=60, deadline=None)
@given(problems(chunks=5))
def test_equals_brute_force(problem: Problem) -> None:
    answer, best = solved(problem), fastest_sweep(problem)
    if answer is not None:
        verify(problem, Schedule(problem.budget_nbytes, answer.steps, (), answer.status, 0.0, 0.0))
        assert answer.status == "OPTIMAL"
        assert sum(step.us for step in answer.steps) == best == answer.bound_us


@settings(max_examples=15, deadline=None)
@given(problems(chunks=4))
def test_a_larger_budget_is_never_slower(problem: Problem) -> None:
    times = []
    for factor in (1, 2, 4):
        answer = solved(replace(problem, budget_nbytes=problem.budget_nbytes * factor))
        if answer is not None:
            assert answer.status == "OPTIMAL"
            times.append(sum(step.us for step in answer.steps))
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("accumulating", [False, True])
def test_the_hint_is_a_solution(accumulating: bool) -> None:
    problem = bundle(transformer(6, 0.8, tokens=1024, accumulating=accumulating))
    hint = greedy_steps(problem.problem)
    assert hint is not None
    model = build(problem.problem, problem.groups(), hint, max_steps=len(hint) + 1)
    solver = cp_model.CpSolver()
    solver.parameters.fix_variables_to_their_hinted_value = True
    assert solver.solve(model.cp) == cp_model.OPTIMAL
    constant_us = sum(chunk.grad_us for chunk in problem.problem.chunks)
    assert solver.objective_value + constant_us == pytest.approx(sum(step.us for step in hint))


def test_without_time_the_hint_is_the_answer() -> None:
    problem = transformer(6, 0.4, tokens=1024)
    hint = greedy_steps(problem)
    answer = solved(problem, time_limit_s=1e-9)
    assert answer is not None
    assert (answer.steps, answer.status) == (hint, "GREEDY")
    assert 0 <= answer.bound_us <= sum(step.us for step in answer.steps)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_seed_gives_one_schedule(workers: int) -> None:
    problem = transformer(6, 0.5, tokens=1024)
    first, again = (solved(problem, time_limit_s=1.0, workers=workers, seed=3) for _ in range(2))
    assert first is not None
    assert again is not None
    assert (first.steps, first.bound_us) == (again.steps, again.bound_us)


def test_large_budgets_are_counted_in_units() -> None:
    problem = transformer(6, 1.0)
    hint = greedy_steps(problem)
    assert hint is not None
    model = build(problem, [[index] for index in range(len(problem.chunks))], hint, max_steps=len(hint))
    assert model.unit_nbytes > 1
    assert model.units(model.unit_nbytes + 1) == 2
    assert model.room * model.unit_nbytes <= problem.budget_nbytes - problem.static_nbytes
    assert model.cp.validate() == ""
