from hypothesis import given, settings

from chunkft_compile.planner.limits import Capacity, beats, cheapest_us, least_us, most_steps, undominated
from chunkft_compile.planner.problem import Cost, Problem, Role
from tests.planner.brute_force import World, partitions
from tests.planner.planner_problems import cost, greedy_schedule, problems


def test_options_that_lose_everywhere_are_left_out() -> None:
    fast, slow, small = cost("fast", 8, 1, 1, 1, 1), cost("slow", 8, 1, 1, 1, 2), cost("small", 2, 1, 1, 1, 3)
    assert undominated([slow, small, fast], Role.LAST) == [fast, small]
    assert beats(fast, slow, Role.LAST)
    assert not beats(fast, small, Role.LAST)
    assert beats(slow, fast, Role.FROZEN)  # no backward, no difference
    early, late = cost("early", 8, 1, 1, 1, 3), cost("late", 8, 1, 1, 2, 2)
    assert not beats(early, late, Role.LAST)  # behind a longer backward more can hide
    assert not beats(late, early, Role.LAST)
    assert not beats(Cost("away", 0, 1, 1, 1, 1, 8), fast, Role.LAST)  # what is offloaded takes time and comes back


@settings(max_examples=100, deadline=None)
@given(problems(chunks=4, modes=True))
def test_limits_hold_for_every_feasible_sweep(problem: Problem) -> None:
    greedy = greedy_schedule(problem)
    if greedy is None:
        return
    world = World(problem, [problem.links[-1]] * len(problem.chunks), [None] * len(problem.segments))
    capacity = Capacity(problem)
    for parts in partitions(list(range(len(problem.chunks)))):
        times = [world.fastest_step(part) for part in parts]
        if None in times:
            continue
        depths = [min(problem.chunks[index].segment for index in part) for part in parts]
        for s in range(len(problem.segments)):
            assert sum(depth <= s for depth in depths) >= capacity.fewest_steps(s)
        for part, us, depth in zip(parts, times, depths, strict=True):
            own = sum(problem.chunks[index].grad_us + problem.chunks[index].update_us for index in part)
            assert us is not None
            assert us >= least_us(problem, depth) >= cheapest_us(problem)
            assert any(link.overlaps for link in problem.links) or us >= least_us(problem, depth) + own
    assert len(greedy.steps) <= most_steps(problem, greedy.steps) <= len(problem.chunks)
