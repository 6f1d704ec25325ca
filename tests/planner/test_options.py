from itertools import product

from hypothesis import given, settings

from chunkft_compile.planner.bounds import peak_of, roles_of
from chunkft_compile.planner.options import best_step, choose_options, fits, make_step
from chunkft_compile.planner.problem import Problem, Update
from tests.planner.planner_problems import plain_ground, problems, transformer
from tests.planner.test_bounds import TIED


def test_faster_options_are_taken_as_the_budget_grows() -> None:
    ground = plain_ground(TIED)
    assert choose_options(ground, [0], 220, Update.HELD) is None
    assert choose_options(ground, [0], 230, Update.HELD) == ("plain", "keep", "keep", "keep")
    problem = transformer(8, 1.0)
    everything = range(len(problem.chunks))
    times = []
    for share in (0.55, 0.65, 0.8, 1.0):
        step = best_step(plain_ground(problem), everything, transformer(8, share).budget_nbytes)
        assert step is not None
        times.append(step.us)
    assert times == sorted(times, reverse=True)
    assert len(set(times)) > 2


@settings(max_examples=200, deadline=None)
@given(problems(modes=True))
def test_chosen_options_are_the_fastest_that_fit(problem: Problem) -> None:
    ground, everything = plain_ground(problem), tuple(range(len(problem.chunks)))
    names = [[cost.option for cost in problem.costs(s, role)] for s, role in enumerate(roles_of(problem, everything))]
    steps = [make_step(ground, everything, options, update) for options in product(*names) for update in problem.updates]
    times = [step.us for step in steps if step.peak_nbytes <= problem.budget_nbytes]
    chosen = best_step(ground, everything, problem.budget_nbytes)
    assert fits(ground, everything, problem.budget_nbytes) == bool(times) == (chosen is not None)
    if chosen is not None:
        assert chosen.us == min(times)
        assert chosen.peak_nbytes <= problem.budget_nbytes


@settings(max_examples=50, deadline=None)
@given(problems(modes=True))
def test_a_thinned_front_still_finds_a_choice(problem: Problem) -> None:
    ground, everything, update = plain_ground(problem), tuple(range(len(problem.chunks))), problem.updates[0]
    exact = choose_options(ground, everything, problem.budget_nbytes, update)
    for points in (1, 2, 3):
        found = choose_options(ground, everything, problem.budget_nbytes, update, points=points)
        assert (found is None) == (exact is None)
        if found is not None:
            assert peak_of(ground, everything, found, update) <= problem.budget_nbytes
