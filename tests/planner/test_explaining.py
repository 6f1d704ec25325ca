from dataclasses import replace

import pytest
from hypothesis import given, settings

from chunkft_compile.planner.explaining import budget_error, smallest_budget
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.grounds import leanest
from chunkft_compile.planner.options import fits
from chunkft_compile.planner.planning import plan
from chunkft_compile.planner.problem import BudgetError, Chunk, Placement, Problem, Segment
from tests.planner.planner_problems import plain_ground, plain_kind, problems, transformer

TIGHT = Problem(
    budget_nbytes=2_000_000_000,
    static_nbytes=3_000_000_000,
    kinds=(plain_kind(saved=500_000_000),),
    segments=(Segment("prelude", 0, 0, 0, 2_000_000_000), Segment("head", 0, 100_000_000, 0)),
    chunks=(Chunk("embed[0:10]", 0, 0, 200_000_000, 800_000_000, 900_000_000), Chunk("head[0:10]", 1, 1, 10, 40, 60)),
)


@settings(max_examples=100, deadline=None)
@given(problems(modes=True))
def test_the_smallest_budget_is_exact(problem: Problem) -> None:
    nbytes, _ = smallest_budget(problem)
    assert greedy_steps(plain_ground(replace(problem, budget_nbytes=nbytes))) is not None
    if nbytes > 1:
        assert greedy_steps(plain_ground(replace(problem, budget_nbytes=nbytes - 1))) is None


@settings(max_examples=40, deadline=None)
@given(problems(chunks=3, places=True, modes=True))
def test_the_smallest_budget_has_a_plan_whatever_the_places(problem: Problem) -> None:
    nbytes, _ = smallest_budget(problem)
    assert plan(replace(problem, budget_nbytes=nbytes), time_limit_s=0.5, workers=1).peak_nbytes <= nbytes
    if nbytes > 1:
        with pytest.raises(BudgetError):
            plan(replace(problem, budget_nbytes=nbytes - 1), time_limit_s=0.5, workers=1)


def test_plans_start_at_the_smallest_budget() -> None:
    problem = transformer(4, 1.0)
    nbytes, binding = smallest_budget(problem)
    assert binding == "forward head"
    assert plan(replace(problem, budget_nbytes=nbytes), time_limit_s=0.2).steps
    with pytest.raises(BudgetError) as caught:
        plan(replace(problem, budget_nbytes=nbytes - 1))
    assert (caught.value.smallest_nbytes, caught.value.binding) == (nbytes, binding)


def test_the_message_says_what_binds_what_would_do_and_what_would_help() -> None:
    assert str(budget_error(TIGHT)).splitlines() == [
        "no schedule fits the budget of 2.000 GB (2000000000 bytes)",
        "the smallest that does is 4.100 GB (4100000000 bytes): update needs it, even when only embed[0:10] is trained",
        "      3.000 GB  weights, buffers and inputs",
        "      900.0 MB  optimizer state and workspace",
        "      200.0 MB  gradient slices",
        'give a budget of "4.100GB" or more, or a smaller batch or sequence',
    ]
    odd = replace(TIGHT, segments=(*TIGHT.segments, Segment("more", 0, 0, 0, 500_000_000)))
    assert str(budget_error(odd)).splitlines()[-1] == "or weights beside the device: 4.000 GB is enough"
    held = replace(TIGHT, state=(Placement.DEVICE,))
    assert "or optimizer state beside the device: 4.100 GB is enough" in str(budget_error(held))
    waiting = replace(transformer(4, 0.05, tokens=1024, accumulating=True), budget_nbytes=1)
    assert "or no accumulation: " in str(budget_error(waiting))


def test_a_budget_copied_from_the_message_is_enough() -> None:
    assert all(fits(leanest(TIGHT), [index], 4_100_000_000) for index in range(2))
    odd = replace(TIGHT, static_nbytes=3_000_000_001)
    assert 'give a budget of "4.101GB"' in str(budget_error(odd))
