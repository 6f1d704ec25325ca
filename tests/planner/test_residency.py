from dataclasses import replace

from hypothesis import given, settings

from chunkft_compile.planner.drafts import Draft, finish
from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.grounds import on_device, spread
from chunkft_compile.planner.options import make_step
from chunkft_compile.planner.problem import Chunk, Link, Placement, Problem, Schedule, Segment, Step, Update
from chunkft_compile.planner.residency import place_state, transfer_us
from chunkft_compile.planner.verifying import verify
from tests.planner.planner_problems import plain_ground, plain_kind, problems

LINK = Link(Placement.DISK, 1_000_000, 1_000_000)
# Two steps of one chunk each: 100 static, gradients of 10; updates take the state and 5 more.
CHUNKS = (Chunk("small", 0, 0, 10, 20, 25), Chunk("large", 0, 0, 10, 40, 45))
PAIR = Problem(155, 100, (plain_kind(),), (Segment("only", 0, 0, 0),), CHUNKS, links=(LINK,))


def _steps(problem: Problem, update: Update = Update.HELD) -> tuple[Step, ...]:
    return tuple(make_step(plain_ground(problem), [index], ("keep",), update) for index in (0, 1))


def _resident(problem: Problem, budget: int, update: Update = Update.HELD) -> tuple[int, ...]:
    problem = replace(problem, budget_nbytes=budget)
    return place_state(problem, _steps(problem, update), on_device(problem)).resident


def test_the_largest_state_that_fits_stays() -> None:
    # At the update of `small`: 100 + 10 + 25, and 40 of `large` would make it 175; at that of `large` its 40 count once.
    for update in Update:
        assert _resident(PAIR, 155, update) == ()
        assert _resident(PAIR, 174, update) == ()
        assert _resident(PAIR, 175, update) == (0, 1)


def test_a_small_state_stays_where_the_large_one_cannot() -> None:
    wide = replace(PAIR, chunks=(CHUNKS[0], Chunk("large", 0, 0, 10, 40, 75)))
    assert _resident(wide, 185) == (1,)
    assert _resident(wide, 205) == (0, 1)
    light = replace(wide, chunks=(Chunk("small", 0, 0, 10, 8, 90), wide.chunks[1]))
    assert _resident(light, 201) == (0,)


def test_state_stays_away_or_at_home_where_it_must() -> None:
    assert _resident(replace(PAIR, state=(Placement.DISK,)), 1000) == ()
    assert _resident(replace(PAIR, state=(Placement.DEVICE,)), 175) == (0, 1)


def test_the_rest_is_moved_twice_per_sweep() -> None:
    away, one = spread(PAIR, on_device(PAIR)), spread(PAIR, on_device(PAIR), resident={1})
    assert transfer_us(PAIR, away) == 120
    assert transfer_us(PAIR, one) == 40
    fast = replace(PAIR, links=(Link(Placement.DISK, 7_000_000, 10_000_000),))
    assert transfer_us(fast, one) == 3 + 2


@settings(max_examples=150, deadline=None)
@given(problems(modes=True))
def test_resident_state_always_fits(problem: Problem) -> None:
    problem = replace(problem, state=(Placement.DEVICE, *problem.state))
    steps = greedy_steps(plain_ground(problem))
    if steps is not None:
        finished, places = finish(problem, Draft(steps, on_device(problem)))
        verify(problem, Schedule(problem.budget_nbytes, finished, places, "GREEDY", 0.0, 0.0))
