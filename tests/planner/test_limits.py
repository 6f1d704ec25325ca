from hypothesis import given, settings

from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.limits import beats, cheapest_us, fewest_steps, least_us, most_steps, undominated
from chunkft_compile.planner.problem import Problem, Role
from tests.planner.brute_force import fastest_step, partitions
from tests.planner.planner_problems import cost, problems


def test_options_that_lose_everywhere_are_left_out() -> None:
    fast, slow, small = cost("fast", 8, 1, 1, 1, 1), cost("slow", 8, 1, 1, 1, 2), cost("small", 2, 1, 1, 1, 3)
    assert undominated([slow, small, fast], Role.LAST) == [fast, small]
    assert beats(fast, slow, Role.LAST)
    assert not beats(fast, small, Role.LAST)
    assert beats(slow, fast, Role.FROZEN)  # no backward, no difference


@settings(max_examples=60, deadline=None)
@given(problems(chunks=4))
def test_limits_hold_for_every_feasible_sweep(problem: Problem) -> None:
    greedy = greedy_steps(problem)
    if greedy is None:
        return
    times: dict[tuple[int, ...], int | None] = {}
    for parts in partitions(list(range(len(problem.chunks)))):
        keys = [tuple(part) for part in parts]
        for key in keys:
            times.setdefault(key, fastest_step(problem, list(key)))
        if any(times[key] is None for key in keys):
            continue
        depths = [min(problem.chunks[index].segment for index in key) for key in keys]
        for s in range(len(problem.segments)):
            assert sum(depth <= s for depth in depths) >= fewest_steps(problem, s)
        for key, depth in zip(keys, depths, strict=True):
            us = (times[key] or 0) - sum(problem.chunks[index].grad_us for index in key)
            assert us >= least_us(problem, depth) >= cheapest_us(problem)
    assert len(greedy) <= most_steps(problem, greedy) <= len(problem.chunks)
