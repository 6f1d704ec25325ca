from dataclasses import replace

from hypothesis import given, settings

from chunkft_compile.planner.drafts import Draft, finish
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.grounds import on_device
from chunkft_compile.planner.levelling import levelled_steps
from chunkft_compile.planner.problem import Link, Placement, Problem
from tests.planner.planner_problems import plain_ground, problems, transformer

SHARES = (0.0, 0.5)


def test_even_steps_keep_more_state_than_steps_to_the_brim() -> None:
    problem = replace(transformer(12, 0.5, tokens=512), links=(Link(Placement.HOST, 10**10, 10**10),))
    ground = plain_ground(problem)
    steps = greedy_steps(ground)
    assert steps is not None
    kept = []
    for some in (steps, *levelled_steps(ground, len(steps), SHARES)):
        finished, places = finish(problem, Draft(some, on_device(problem)))
        assert len(finished) <= len(steps)
        kept.append(sum(problem.chunks[index].state_nbytes for index in places.resident))
    assert max(kept[1:]) > kept[0]


@settings(max_examples=50, deadline=None)
@given(problems(chunks=6, modes=True))
def test_levelled_sweeps_train_everything_in_no_more_steps(problem: Problem) -> None:
    ground = plain_ground(problem)
    steps = greedy_steps(ground)
    for some in levelled_steps(ground, len(steps), SHARES) if steps else ():
        assert sorted(index for step in some for index in step.chunks) == list(range(len(problem.chunks)))
        assert all(step.peak_nbytes <= problem.budget_nbytes for step in some)
