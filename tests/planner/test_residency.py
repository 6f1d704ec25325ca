from dataclasses import replace

from hypothesis import given, settings

from chunkft_compile.planner.bounds import make_step
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.problem import Chunk, Problem, Schedule, Segment
from chunkft_compile.planner.residency import place_state, transfer_us
from chunkft_compile.planner.verifying import verify
from tests.planner.planner_problems import plain_kind, problems

# Two steps of one chunk each: 100 static, gradients of 10; updates take the state and 5 more.
CHUNKS = (Chunk("small", 0, 0, 10, 20, 25), Chunk("large", 0, 0, 10, 40, 45))
PAIR = Problem(155, 100, (plain_kind(),), (Segment("only", 0, 0, 0),), CHUNKS, link_bytes_per_s=1_000_000)
STEPS = tuple(make_step(PAIR, [index], ("keep",)) for index in (0, 1))


def test_the_largest_state_that_fits_stays() -> None:
    # At the update of `small`: 100 + 10 + 25, and 40 of `large` would make it 175; at that of `large` its 40 count once.
    assert place_state(replace(PAIR, budget_nbytes=155), STEPS) == ()
    assert place_state(replace(PAIR, budget_nbytes=174), STEPS) == ()
    assert place_state(replace(PAIR, budget_nbytes=175), STEPS) == (0, 1)


def test_a_small_state_stays_where_the_large_one_cannot() -> None:
    wide = replace(PAIR, chunks=(CHUNKS[0], Chunk("large", 0, 0, 10, 40, 75)))
    steps = tuple(make_step(wide, [index], ("keep",)) for index in (0, 1))
    assert place_state(replace(wide, budget_nbytes=185), steps) == (1,)
    assert place_state(replace(wide, budget_nbytes=205), steps) == (0, 1)
    light = replace(wide, budget_nbytes=195, chunks=(Chunk("small", 0, 0, 10, 8, 90), wide.chunks[1]))
    steps = tuple(make_step(light, [index], ("keep",)) for index in (0, 1))
    assert place_state(replace(light, budget_nbytes=201), steps) == (0,)


def test_the_rest_is_moved_twice_per_sweep() -> None:
    assert transfer_us(PAIR, ()) == 120
    assert transfer_us(PAIR, (1,)) == 40
    assert transfer_us(replace(PAIR, link_bytes_per_s=7_000_000), (1,)) == 6


@settings(max_examples=100, deadline=None)
@given(problems())
def test_resident_state_always_fits(problem: Problem) -> None:
    steps = greedy_steps(problem)
    if steps is not None:
        verify(problem, Schedule(problem.budget_nbytes, steps, place_state(problem, steps), "GREEDY", 0.0, 0.0))
