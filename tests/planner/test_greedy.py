from dataclasses import replace

from hypothesis import given, settings

from chunkft_compile.planner.bounds import depth_of, fits
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.problem import Problem, Schedule
from chunkft_compile.planner.verifying import verify
from tests.planner.planner_problems import problems, transformer


def test_one_step_where_everything_fits() -> None:
    problem = transformer(4, 2.0)
    steps = greedy_steps(problem)
    assert steps is not None
    assert [step.chunks for step in steps] == [tuple(range(len(problem.chunks)))]


def test_deep_steps_come_first_and_are_few() -> None:
    problem = transformer(12, 0.25, tokens=1024)
    steps = greedy_steps(problem)
    assert steps is not None
    depths = [depth_of(problem, step.chunks) for step in steps]
    assert len(depths) > 2
    assert depths == sorted(set(depths))


@settings(max_examples=100, deadline=None)
@given(problems(chunks=8))
def test_a_plan_exists_if_every_chunk_fits_alone(problem: Problem) -> None:
    steps = greedy_steps(problem)
    alone = all(fits(problem, [index], problem.budget_nbytes) for index in range(len(problem.chunks)))
    assert (steps is not None) == alone
    if steps is not None:
        verify(problem, Schedule(problem.budget_nbytes, steps, (), "GREEDY", 0.0, 0.0))


def test_no_plan_where_a_chunk_does_not_fit() -> None:
    problem = transformer(2, 0.5)
    assert greedy_steps(replace(problem, budget_nbytes=problem.static_nbytes)) is None
