from dataclasses import replace

import pytest
from hypothesis import given, settings

from chunkft_compile.planner import planning
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.planning import plan
from chunkft_compile.planner.problem import BudgetError, Problem
from chunkft_compile.planner.verifying import verify
from tests.planner.brute_force import fastest_sweep
from tests.planner.planner_problems import problems, transformer


@settings(max_examples=40, deadline=None)
@given(problems(chunks=4))
def test_plans_are_valid_and_never_slower_than_greedy(problem: Problem) -> None:
    greedy = greedy_steps(problem)
    if greedy is None:
        with pytest.raises(BudgetError):
            plan(problem, time_limit_s=1, workers=1)
        return
    schedule = plan(problem, time_limit_s=1, workers=1)
    verify(problem, schedule)
    best = fastest_sweep(problem)
    assert best is not None
    assert best <= schedule.sweep_us <= sum(step.us for step in greedy)
    # With four chunks the model allows every sweep that can be the fastest, so OPTIMAL means so, up to the gap of the search.
    assert schedule.status != "OPTIMAL" or schedule.sweep_us <= best * 1.003


def test_no_solver_where_one_step_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(planning, "build")
    schedule = plan(transformer(12, 2.0))
    assert (len(schedule.steps), schedule.status, schedule.gap) == (1, "OPTIMAL", 0.0)


def test_a_tight_budget_beats_greedy() -> None:
    problem = transformer(6, 0.5, tokens=1024)
    greedy = greedy_steps(problem)
    assert greedy is not None
    schedule = plan(problem, time_limit_s=3, workers=1)
    assert schedule.sweep_us < sum(step.us for step in greedy)
    assert schedule.gap < 0.2


def test_accumulation_needs_more() -> None:
    problem = transformer(6, 0.6, tokens=1024)
    plain, accumulating = plan(problem, time_limit_s=1), plan(replace(problem, accumulating=True), time_limit_s=1)
    assert len(accumulating.steps) >= len(plain.steps)
