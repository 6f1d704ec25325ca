from dataclasses import replace

from chunkft_compile.planner.bounds import loads, peak_of, roles_of
from chunkft_compile.planner.problem import Chunk, Cost, Kind, Problem, Role, Segment, Update
from tests.planner.planner_problems import cost, plain_ground

KIND = Kind(
    frozen=(cost("plain", 0, 3, 0, 1, 99),),
    passing=(cost("keep", 10, 5, 2, 1, 2),),
    active=(cost("keep", 20, 5, 4, 1, 3), cost("recompute", 1, 5, 22, 1, 5)),
    last=(cost("keep", 8, 5, 1, 1, 2), Cost("offload", 2, 5, 1, 1, 2, 6)),
)
TIED = Problem(
    budget_nbytes=1000,
    static_nbytes=100,
    kinds=(KIND,),
    segments=tuple(Segment(name, 0, 7, 6) for name in ("a", "b", "c", "d")),
    chunks=(Chunk("tied", 1, 3, 40, 80, 90, 10), Chunk("top", 3, 3, 9, 18, 20, 1)),
)
HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE


def test_roles_of_a_tied_weight() -> None:
    assert roles_of(TIED, [0]) == (Role.FROZEN, Role.LAST, Role.PASS, Role.ACTIVE)
    assert roles_of(TIED, [1]) == (Role.FROZEN, Role.FROZEN, Role.FROZEN, Role.LAST)


def test_every_moment_by_hand() -> None:
    options = ("plain", "keep", "keep", "recompute")
    found = [(load.name, load.nbytes) for load in loads(plain_ground(TIED), (0, 1), options, HELD)]
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
    assert peak_of(plain_ground(TIED), (0, 1), options, HELD) == 239


def test_immediate_updates_leave_what_is_on_its_way() -> None:
    options = ("plain", "keep", "keep", "recompute")
    found = [(load.name, load.nbytes) for load in loads(plain_ground(TIED), (0, 1), options, IMMEDIATE)]
    assert found[4:] == [
        ("backward d", 119 + 6 + 49 + 22),
        ("update in d", 118 + 49 + 20 + 6),  # what is saved below, both gradients, the update, and dX for c
        ("backward c", 118 + 6 + 40 + 2),
        ("backward b", 108 + 6 + 40 + 1),
        ("update in b", 100 + 40 + 90),  # nothing below, so no dX
    ]


def test_offloaded_values_are_back_for_their_backward() -> None:
    ground = plain_ground(TIED)
    kept, away = (loads(ground, (0,), ("plain", name, "keep", "keep"), HELD) for name in ("keep", "offload"))
    at = {load.name: load.nbytes for load in away}
    assert at["forward c"] == {load.name: load.nbytes for load in kept}["forward c"] - 6
    assert at["backward b"] == {load.name: load.nbytes for load in kept}["backward b"]


def test_accumulated_gradients_wait_and_new_slices_come_on_top() -> None:
    problem = replace(TIED, accumulating=True)
    found = {load.name: load.grad_nbytes for load in loads(plain_ground(problem), (0, 1), ("plain", "keep", "keep", "keep"), HELD)}
    assert found["forward a"] == found["update"] == 49
    assert found["backward d"] == 98  # both chunks emit here
    assert found["backward c"] == found["backward b"] == 89  # only the tied one, on its way down
