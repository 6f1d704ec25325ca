from hypothesis import given, settings

from chunkft_compile.planner.bundling import BUNDLE_SHARE, bundle
from chunkft_compile.planner.drafts import Draft, finish
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.grounds import leanest, on_device
from chunkft_compile.planner.options import fits
from chunkft_compile.planner.problem import Problem, Schedule
from chunkft_compile.planner.verifying import verify
from tests.planner.planner_problems import plain_ground, problems, transformer


def test_norms_are_joined_and_equal_chunks_counted_together() -> None:
    problem = transformer(6, 0.4, tokens=1024)
    bundled = bundle(problem)
    norms = [members for members in bundled.members if "norm" in problem.chunks[members[-1]].name]
    assert len(norms) == 6
    assert all(len(members) >= 2 for members in norms)
    assert len(bundled.groups()) < len(bundled.members) < len(problem.chunks)
    joined = bundled.problem.chunks[bundled.members.index(norms[0])]
    assert joined.state_nbytes == sum(problem.chunks[index].state_nbytes for index in norms[0])
    assert joined.update_nbytes == max(problem.chunks[index].update_nbytes for index in norms[0])


@settings(max_examples=100, deadline=None)
@given(problems(chunks=8, modes=True))
def test_bundles_partition_the_chunks_and_stay_small(problem: Problem) -> None:
    bundled, ground = bundle(problem), leanest(problem)
    assert sorted(index for members in bundled.members for index in members) == list(range(len(problem.chunks)))
    limit = (problem.budget_nbytes - ground.base_nbytes) // BUNDLE_SHARE
    for index, members in enumerate(bundled.members):
        assert len(members) == 1 or bundled.problem.chunks[index].grad_nbytes <= limit
    alone = all(fits(ground, [index], problem.budget_nbytes) for index in range(len(problem.chunks)))
    assert (greedy_steps(plain_ground(bundled.problem)) is not None) == alone


def test_a_finished_draft_is_a_schedule_of_the_original_chunks() -> None:
    for share in (0.4, 1.0):
        problem = transformer(6, share, tokens=1024)
        bundled = bundle(problem)
        steps = greedy_steps(plain_ground(bundled.problem))
        assert steps is not None
        finished, places = finish(problem, Draft(steps, on_device(problem)), bundled)
        verify(problem, Schedule(problem.budget_nbytes, finished, places, "GREEDY", 0.0, 0.0))
