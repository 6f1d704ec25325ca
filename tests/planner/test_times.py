from dataclasses import replace

from chunkft_compile.planner.grounds import on_device, settle, spread
from chunkft_compile.planner.problem import Chunk, Cost, Kind, Link, Placement, Problem, Segment, Update
from chunkft_compile.planner.times import step_us

KEEP, AWAY = Cost("keep", 0, 0, 0, 10, 20), Cost("offload", 0, 0, 0, 10, 20, 4)
KIND = Kind(frozen=(Cost("plain", 0, 0, 0, 10, 99),), passing=(KEEP,), active=(KEEP, AWAY), last=(KEEP,))
LINK = Link(Placement.HOST, 1_000_000, 500_000)  # a byte takes 1 us to come and 2 us to go
PROBLEM = Problem(
    budget_nbytes=1000,
    static_nbytes=100,
    kinds=(KIND,),
    segments=tuple(Segment(name, 0, 0, 0, weight_nbytes=50) for name in ("a", "b", "c")),
    chunks=tuple(Chunk(name, s, s, 5, 8, 9, grad_us=3, update_us=1, weight_nbytes=5) for s, name in ((1, "low"), (2, "high"))),
    links=(LINK,),
    updates=tuple(Update),
    weights=tuple(Placement),
)
OPTIONS = ("plain", "keep", "offload")
STREAMED = (Placement.DEVICE, Placement.DEVICE, Placement.HOST)


def _us(problem: Problem, weights: tuple[Placement, ...], update: Update) -> int:
    return step_us(settle(problem, spread(problem, weights)), (0, 1), OPTIONS, update)


def test_transfers_are_added_where_no_link_overlaps() -> None:
    compute, gradients, updates, state, saved = 10 + 30 + 30, 6, 2, 2 * 8 * 3, 4 * 3
    for update in Update:
        assert _us(PROBLEM, on_device(PROBLEM), update) == compute + gradients + updates + state + saved
    fetched = 2 * 50  # forward and backward
    assert _us(PROBLEM, STREAMED, Update.HELD) == compute + gradients + updates + state + saved + fetched + 5 * 3
    assert _us(PROBLEM, STREAMED, Update.IMMEDIATE) == compute + gradients + updates + state + saved + fetched + 5 * 2


def test_an_overlapping_link_hides_what_is_shorter_than_compute() -> None:
    problem = replace(PROBLEM, links=(replace(LINK, overlaps=True),))
    # a: 10; b: 10 and 20 + 3; c: max(10, 8 offloading) and max(20 + 3, 4 coming back); then updates: max(2, 48)
    assert _us(problem, on_device(problem), Update.HELD) == 10 + 33 + 33 + 48
    # the state of each chunk, 24 us, beside the backward and the update of its segment
    assert _us(problem, on_device(problem), Update.IMMEDIATE) == 10 + (10 + 24) + (10 + 28)
    # 50 us of weights are longer than the forward of c; in its backward they share the link with saved values, state and new weights
    assert _us(problem, STREAMED, Update.IMMEDIATE) == 10 + (10 + 24) + (50 + 8) + (50 + 4 + 24 + 10)


def test_state_that_stays_costs_nothing() -> None:
    ground = settle(PROBLEM, spread(PROBLEM, on_device(PROBLEM), resident={0, 1}))
    assert step_us(ground, (0, 1), OPTIONS, Update.HELD) == _us(PROBLEM, on_device(PROBLEM), Update.HELD) - 48
