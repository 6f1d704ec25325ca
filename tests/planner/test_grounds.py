from dataclasses import replace

import pytest
from hypothesis import given, settings

from chunkft_compile.planner.grounds import leanest, on_device, settle, spread, weight_places
from chunkft_compile.planner.problem import Chunk, Link, Placement, Problem, Segment, Update
from tests.planner.planner_problems import plain_kind, problems

DEVICE, HOST, DISK = Placement
LINKS = (Link(HOST, 10**9, 10**9, 70), Link(DISK, 10**8, 10**8))
PROBLEM = Problem(
    budget_nbytes=1000,
    static_nbytes=500,
    kinds=(plain_kind(),),
    segments=tuple(Segment(name, 0, 0, 0, weight_nbytes=n) for name, n in (("a", 90), ("b", 30), ("c", 30), ("d", 0))),
    chunks=tuple(Chunk(f"chunk {s}", s, s, 10, 20, 25) for s in range(4)),
    links=LINKS,
    weights=tuple(Placement),
)


def test_weights_that_leave_make_room_for_all_but_the_slab() -> None:
    places = spread(PROBLEM, (DEVICE, HOST, HOST, DEVICE))
    assert settle(PROBLEM, places).base_nbytes == 500 - 60 + 30
    double = replace(PROBLEM, links=(replace(LINKS[0], overlaps=True), LINKS[1]))
    assert settle(double, places).base_nbytes == 500 - 60 + 60


def test_state_goes_to_the_fastest_place_with_room() -> None:
    assert spread(PROBLEM, on_device(PROBLEM)).state == (HOST, HOST, HOST, DISK)
    assert spread(PROBLEM, (DEVICE, HOST, DEVICE, DEVICE)).state == (HOST, HOST, DISK, DISK)  # 30 of 70 bytes are taken
    assert spread(PROBLEM, on_device(PROBLEM), resident={1}).state == (HOST, DEVICE, HOST, HOST)
    assert spread(replace(PROBLEM, state=(DEVICE,)), on_device(PROBLEM)).state == (DEVICE,) * 4


def test_resident_state_is_always_there_and_not_twice() -> None:
    ground = settle(PROBLEM, spread(PROBLEM, on_device(PROBLEM), resident={0}))
    assert (ground.base_nbytes, ground.update_nbytes[:2]) == (520, (5, 25))
    double = replace(PROBLEM, links=(replace(LINKS[0], overlaps=True), LINKS[1]))
    assert settle(double, spread(double, on_device(double))).update_nbytes[0] == 45  # the next chunk's state beside this one's


def test_the_leanest_ground_leaves_the_largest_segment_where_its_slab_would_cost_more() -> None:
    assert leanest(PROBLEM).places.weights == (DISK, HOST, HOST, DEVICE)
    assert leanest(PROBLEM).base_nbytes == 500 - 150 + 90
    double = replace(PROBLEM, links=(replace(LINKS[1], overlaps=True),))
    assert leanest(double).base_nbytes == 500  # 60 leave and 60 come as slab; with the large one it is 150 and 180
    assert leanest(replace(PROBLEM, weights=(DEVICE,))).base_nbytes == 500


def test_ways_to_place_weights_run_from_none_to_all() -> None:
    ways = list(weight_places(PROBLEM))
    assert ways[0] == on_device(PROBLEM)
    assert ways[-1] == (DISK, HOST, HOST, DEVICE)
    assert list(weight_places(replace(PROBLEM, weights=(DISK,))))[-1] == (DISK, DISK, DISK, DEVICE)


def test_links_that_cannot_hold_everything_are_refused() -> None:
    with pytest.raises(ValueError, match="last one without a capacity"):
        replace(PROBLEM, links=LINKS[:1])
    with pytest.raises(ValueError, match="IMMEDIATE updates would apply each one alone"):
        replace(PROBLEM, accumulating=True, updates=tuple(Update))


@settings(max_examples=100, deadline=None)
@given(problems(places=True))
def test_no_way_to_place_weights_is_leaner(problem: Problem) -> None:
    least = leanest(problem).base_nbytes
    for weights in weight_places(problem):
        assert settle(problem, spread(problem, weights)).base_nbytes >= least
