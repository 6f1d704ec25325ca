"""Every chunk is trained exactly once per round, also when the schedule changes in between."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft_compile.planner.problem import Places, Schedule, Step
from chunkft_compile.runtime.sweep import Sweep


def _schedule(steps: list[list[int]]) -> Schedule:
    return Schedule(1, tuple(Step(tuple(sorted(step)), ("save",), 1, 1) for step in steps), Places((), ()), "GREEDY", 0.0, 0.0)


@st.composite
def schedules(draw: st.DrawFn, count: int) -> Schedule:
    """Some partition of chunks 0 .. count-1 into steps."""
    order = draw(st.permutations(range(count)))
    cuts = draw(st.sets(st.integers(1, count - 1)) if count > 1 else st.just(set()))
    bounds = [0, *sorted(cuts), count]
    return _schedule([list(order[a:b]) for a, b in itertools.pairwise(bounds)])


def _round(sweep: Sweep, data: st.DataObject, count: int) -> tuple[list[int], Sweep]:
    """The chunks trained until the round ends, with changes of the schedule thrown in."""
    trained: list[int] = []
    number = sweep.count
    while sweep.count == number:
        change = data.draw(st.sampled_from(["none", "continued", "with_current"]))
        if change == "continued":
            sweep = sweep.continued(data.draw(schedules(count)))
        elif change == "with_current":
            chunks = sweep.current.chunks
            kept = tuple(sorted(data.draw(st.sets(st.sampled_from(chunks), min_size=1))))
            sweep = sweep.with_current(kept, ("inputs",))
            assert (sweep.current.chunks, sweep.current.options) == (kept, ("inputs",))
        current = sweep.current.chunks
        trained += current
        half = len(current) // 2  # two optimizers may step their own chunks one after the other
        if half:
            assert not sweep.stepped(frozenset(current[:half]))
        if data.draw(st.booleans()):  # kept and taken up again, here where a part of the step is done
            sweep = Sweep.at(sweep.schedule, sweep.state)
        assert sweep.stepped(frozenset(current[half:]))
    return trained, sweep


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 7))
def test_every_chunk_once_per_round(data: st.DataObject, count: int) -> None:
    sweep = Sweep(data.draw(schedules(count)))
    for number in range(2):
        assert sweep.count == number
        trained, sweep = _round(sweep, data, count)
        assert sorted(trained) == list(range(count))


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(2, 7))
def test_a_new_schedule_between_the_steps_of_one_step(data: st.DataObject, count: int) -> None:
    """Chunks that were stepped already, in a step that is not complete, are not trained again."""
    sweep = Sweep(_schedule([list(range(count))]))
    first = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    assert not sweep.stepped(frozenset(first))
    trained, sweep = sorted(first), sweep.continued(data.draw(schedules(count)))
    while sweep.count == 0:
        trained += sweep.current.chunks
        sweep.stepped(frozenset(sweep.current.chunks))
    assert sorted(trained) == list(range(count))


def test_position_and_count() -> None:
    sweep = Sweep(_schedule([[0, 1], [2]]))
    assert (sweep.position, sweep.count) == (0, 0)
    assert sweep.stepped(frozenset({0, 1}))
    assert (sweep.position, sweep.count, sweep.current.chunks) == (1, 0, (2,))
    assert sweep.stepped(frozenset({2}))
    assert (sweep.position, sweep.count, sweep.current.chunks) == (0, 1, (0, 1))


def test_a_step_that_an_error_broke_off_goes_on_with_the_rest() -> None:
    sweep = Sweep(_schedule([[0, 1, 2], [3]]))
    assert sweep.resumed() is sweep
    assert not sweep.stepped(frozenset({2}))
    sweep = sweep.resumed()
    assert (sweep.current.chunks, sweep.position, sweep.count) == ((0, 1), 0, 0)
    assert sweep.stepped(frozenset({0, 1}))
    assert sweep.stepped(frozenset({3}))
    assert (sweep.current.chunks, sweep.count) == ((0, 1, 2), 1)
