from dataclasses import replace

from hypothesis import given, settings

from chunkft_compile.planner.bounds import depth_of
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.options import fits
from chunkft_compile.planner.problem import Problem
from chunkft_compile.planner.verifying import verify
from tests.planner.planner_problems import greedy_schedule, plain_ground, problems, transformer


def test_one_step_where_everything_fits() -> None:
    problem = transformer(4, 2.0)
    steps = greedy_steps(plain_ground(problem))
    assert steps is not None
    assert [step.chunks for step in steps] == [tuple(range(len(problem.chunks)))]


def test_deep_steps_come_first_and_are_few() -> None:
    problem = transformer(12, 0.25, tokens=1024)
    steps = greedy_steps(plain_ground(problem))
    assert steps is not None
    depths = [depth_of(problem, step.chunks) for step in steps]
    assert len(depths) > 2
    assert depths == sorted(set(depths))


@settings(max_examples=150, deadline=None)
@given(problems(chunks=8, modes=True))
def test_a_plan_exists_if_every_chunk_fits_alone(problem: Problem) -> None:
    schedule = greedy_schedule(problem)
    alone = all(fits(plain_ground(problem), [index], problem.budget_nbytes) for index in range(len(problem.chunks)))
    assert (schedule is not None) == alone
    if schedule is not None:
        verify(problem, schedule)


def test_no_plan_where_a_chunk_does_not_fit() -> None:
    problem = transformer(2, 0.5)
    assert greedy_steps(plain_ground(replace(problem, budget_nbytes=problem.static_nbytes))) is None
