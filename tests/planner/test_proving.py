from dataclasses import replace

import pytest
from hypothesis import given, settings

from chunkft_compile.planner.grounds import leanest
from chunkft_compile.planner.options import fits
from chunkft_compile.planner.planning import plan
from chunkft_compile.planner.problem import Link, Placement, Problem, Update
from chunkft_compile.planner.proving import least_pass_us, least_sweep_us
from tests.planner.brute_force import fastest_sweep
from tests.planner.planner_problems import greedy_schedule, problems, transformer

HOST = Link(Placement.HOST, 10**10, 10**10)


@settings(max_examples=100, deadline=None)
@given(problems(chunks=3, segments=2, modes=True, places=True))
def test_no_sweep_is_faster(problem: Problem) -> None:
    if all(fits(leanest(problem), [index], problem.budget_nbytes) for index in range(len(problem.chunks))):
        best = fastest_sweep(problem)
        assert best is None or least_pass_us(problem) <= least_sweep_us(problem) <= best


def test_one_step_is_known_exactly() -> None:
    problem = replace(transformer(6, 0.9, tokens=1024), updates=(Update.IMMEDIATE,), state=(Placement.DISK,))
    greedy = greedy_schedule(problem)
    assert greedy is not None
    assert (len(greedy.steps), greedy.sweep_us) == (1, least_sweep_us(problem))


@pytest.mark.parametrize("overlaps", [False, True])
def test_state_that_may_stay_saves_no_more_than_its_room(overlaps: bool) -> None:
    slow = replace(HOST, read_bytes_per_s=10**8, write_bytes_per_s=10**8, overlaps=overlaps)
    problem = replace(transformer(4, 0.9, tokens=1024), links=(slow,), updates=tuple(Update))
    moving = replace(problem, state=(Placement.HOST,))
    saved = least_sweep_us(moving) - least_sweep_us(problem)
    room = problem.budget_nbytes - problem.static_nbytes
    assert 0 < saved <= slow.read_us(room) + slow.write_us(room)
    best = plan(problem, time_limit_s=1)
    assert least_sweep_us(problem) <= best.sweep_us < least_sweep_us(moving)


@pytest.mark.parametrize("layers", [6, 24])
def test_of_several_steps_it_is_known_how_deep_each_must_be(layers: int) -> None:
    problem = replace(transformer(layers, 0.3, tokens=64), state=(Placement.HOST,), links=(HOST,))
    greedy = greedy_schedule(problem)
    assert greedy is not None
    assert len(greedy.steps) > 3
    assert 0.85 * greedy.sweep_us < least_sweep_us(problem) <= greedy.sweep_us


def test_state_that_stays_takes_room_from_gradients() -> None:
    slow = replace(HOST, read_bytes_per_s=10**8, write_bytes_per_s=10**8)
    problem = replace(transformer(6, 0.5, tokens=512), links=(slow,))
    best = plan(problem, time_limit_s=0.01)
    assert 0.9 * best.sweep_us < least_sweep_us(problem) <= best.sweep_us
