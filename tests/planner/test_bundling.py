from hypothesis import given, settings

from chunkft_compile.planner.bounds import fits, peak_of, time_of
from chunkft_compile.planner.bundling import BUNDLE_SHARE, bundle, unbundled
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.problem import Problem
from tests.planner.planner_problems import problems, transformer


def test_norms_are_joined_and_equal_chunks_counted_together() -> None:
    problem = transformer(6, 0.4, tokens=1024)
    bundled = bundle(problem)
    norms = [members for members in bundled.members if "norm" in problem.chunks[members[-1]].name]
    assert len(norms) == 6
    assert all(len(members) >= 2 for members in norms)
    assert len(bundled.groups()) < len(bundled.members) < len(problem.chunks)


@settings(max_examples=100, deadline=None)
@given(problems(chunks=8))
def test_bundles_partition_the_chunks_and_stay_small(problem: Problem) -> None:
    bundled = bundle(problem)
    assert sorted(index for members in bundled.members for index in members) == list(range(len(problem.chunks)))
    limit = (problem.budget_nbytes - problem.static_nbytes) // BUNDLE_SHARE
    for index, members in enumerate(bundled.members):
        assert len(members) == 1 or bundled.problem.chunks[index].grad_nbytes <= limit
    alone = all(fits(problem, [index], problem.budget_nbytes) for index in range(len(problem.chunks)))
    assert (greedy_steps(bundled.problem) is not None) == alone


def test_unbundled_steps_keep_their_bound_and_time() -> None:
    problem = transformer(6, 1.0)
    bundled = bundle(problem)
    steps = greedy_steps(bundled.problem)
    assert steps is not None
    for step in (unbundled(step, bundled) for step in steps):
        assert step.peak_nbytes == peak_of(problem, step.chunks, step.options)
        assert step.us == time_of(problem, step.chunks, step.options)
