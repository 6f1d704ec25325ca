from itertools import product

from hypothesis import given, settings

from chunkft_compile.planner.bounds import choose_options, fits, loads, make_step, peak_of, roles_of, time_of
from chunkft_compile.planner.problem import Chunk, Kind, Problem, Role, Segment
from tests.planner.planner_problems import cost, problems, transformer

KIND = Kind(
    frozen=(cost("plain", 0, 3, 0, 1, 99),),
    passing=(cost("keep", 10, 5, 2, 1, 2),),
    active=(cost("keep", 20, 5, 4, 1, 3), cost("recompute", 1, 5, 22, 1, 5)),
    last=(cost("keep", 8, 5, 1, 1, 2),),
)
TIED = Problem(
    budget_nbytes=1000,
    static_nbytes=100,
    kinds=(KIND,),
    segments=tuple(Segment(name, 0, 7, 6) for name in ("a", "b", "c", "d")),
    chunks=(Chunk("tied", 1, 3, 40, 80, 90, 10), Chunk("top", 3, 3, 9, 18, 20, 1)),
)


def test_roles_of_a_tied_weight() -> None:
    assert roles_of(TIED, [0]) == (Role.FROZEN, Role.LAST, Role.PASS, Role.ACTIVE)
    assert roles_of(TIED, [1]) == (Role.FROZEN, Role.FROZEN, Role.FROZEN, Role.LAST)


def test_every_moment_by_hand() -> None:
    options = ("plain", "keep", "keep", "recompute")
    found = [(load.name, load.nbytes) for load in loads(TIED, (0, 1), options)]
    assert found == [
        ("forward a", 100 + 10),
        ("forward b", 100 + 12),
        ("forward c", 108 + 12),
        ("forward d", 118 + 12),
        ("backward d", 119 + 6 + 49 + 22),
        ("backward c", 118 + 6 + 49 + 2),
        ("backward b", 108 + 6 + 49 + 1),
        ("update", 100 + 49 + 90),
    ]
    assert time_of(TIED, (0, 1), options) == 1 + 3 + 3 + 6 + 11
    assert peak_of(TIED, (0, 1), options) == 239


def test_accumulated_gradients_wait_and_new_slices_come_on_top() -> None:
    problem = Problem(1000, 100, TIED.kinds, TIED.segments, TIED.chunks, accumulating=True)
    found = {load.name: load.grad_nbytes for load in loads(problem, (0, 1), ("plain", "keep", "keep", "keep"))}
    assert found["forward a"] == found["update"] == 49
    assert found["backward d"] == 98  # both chunks emit here
    assert found["backward c"] == found["backward b"] == 89  # only the tied one, on its way down


def test_faster_options_are_taken_as_the_budget_grows() -> None:
    assert choose_options(TIED, [0], 220) is None
    assert choose_options(TIED, [0], 230) == ("plain", "keep", "keep", "keep")
    problem = transformer(8, 1.0)
    everything = range(len(problem.chunks))
    times = []
    for share in (0.55, 0.65, 0.8, 1.0):
        options = choose_options(problem, everything, transformer(8, share).budget_nbytes)
        assert options is not None
        times.append(time_of(problem, everything, options))
    assert times == sorted(times, reverse=True)
    assert len(set(times)) > 2


@settings(max_examples=150, deadline=None)
@given(problems())
def test_chosen_options_are_the_fastest_that_fit(problem: Problem) -> None:
    everything = tuple(range(len(problem.chunks)))
    names = [[cost.option for cost in problem.costs(s, role)] for s, role in enumerate(roles_of(problem, everything))]
    steps = [make_step(problem, everything, options) for options in product(*names)]
    times = [step.us for step in steps if step.peak_nbytes <= problem.budget_nbytes]
    chosen = choose_options(problem, everything, problem.budget_nbytes)
    assert fits(problem, everything, problem.budget_nbytes) == bool(times) == (chosen is not None)
    if chosen is not None:
        assert make_step(problem, everything, chosen).us == min(times)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_a_thinned_front_still_finds_a_choice(problem: Problem) -> None:
    everything = tuple(range(len(problem.chunks)))
    for points in (1, 2, 3):
        found = choose_options(problem, everything, problem.budget_nbytes, points=points)
        assert (found is None) == (not fits(problem, everything, problem.budget_nbytes))
        if found is not None:
            assert peak_of(problem, everything, found) <= problem.budget_nbytes
