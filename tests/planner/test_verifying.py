from dataclasses import replace

import pytest

from chunkft_compile.planner.problem import Link, Placement, Places, Problem, Schedule, Segment, Step, Update
from chunkft_compile.planner.verifying import VerifyError, verify
from tests.planner.planner_problems import greedy_schedule, transformer

PROBLEM = transformer(6, 0.4, tokens=1024)
COUNT = len(PROBLEM.chunks)
DEVICE, DISK = Placement.DEVICE, Placement.DISK


def schedule(problem: Problem = PROBLEM) -> Schedule:
    found = greedy_schedule(problem)
    assert found is not None
    return found


def places(**changes: tuple[Placement, ...]) -> Places:
    return replace(schedule().places, **changes)


def with_first(step: Step) -> Schedule:
    good = schedule()
    return replace(good, steps=(step, *good.steps[1:]))


def test_a_good_schedule_passes() -> None:
    assert len(schedule().steps) > 1
    verify(PROBLEM, schedule())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_nbytes": 5}, "is for 5 bytes"),
        ({"status": "LUCKY"}, "unknown status 'LUCKY'"),
        ({"gap": -0.5}, "gap of -0.5"),
        ({"places": places(state=(DISK,))}, "places the state of 1 chunks"),
        ({"places": places(weights=(DEVICE,))}, "places the weights of 1 segments"),
        ({"places": places(state=(Placement.HOST,) * COUNT)}, "state on the host, to which there is no link"),
        ({"places": places(weights=(Placement.HOST,) * 8)}, "weights on the host, to which there is no link"),
        ({"steps": schedule().steps[1:]}, r"never trains .*embed\[0\]"),
        ({"steps": (*schedule().steps, schedule().steps[0])}, "and again in step"),
        ({"places": places(state=(DEVICE,) * COUNT)}, "bytes in step 0 at forward"),
        ({"steps": tuple(replace(step, update=Update.IMMEDIATE) for step in schedule().steps)}, "wants immediate updates in step 0"),
    ],
)
def test_a_bad_schedule_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(PROBLEM, replace(schedule(), **change))  # type: ignore[arg-type]


def test_a_bad_step_is_named() -> None:
    first = schedule().steps[0]
    with pytest.raises(VerifyError, match="step 0, its options take"):
        verify(PROBLEM, with_first(replace(first, us=first.us + 1)))
    with pytest.raises(VerifyError, match="the bound is"):
        verify(PROBLEM, with_first(replace(first, peak_nbytes=first.peak_nbytes - 1)))
    with pytest.raises(VerifyError, match="'magic' for prelude in step 0, whose role last"):
        verify(PROBLEM, with_first(replace(first, options=("magic", *first.options[1:]))))
    with pytest.raises(VerifyError, match="options in step 0 for 8 segments"):
        verify(PROBLEM, with_first(replace(first, options=first.options[1:])))


def test_lowered_steps_state_exact_peaks() -> None:
    first = schedule().steps[0]
    verify(PROBLEM, with_first(replace(first, peak_nbytes=first.peak_nbytes - 1)), lowered=True)
    with pytest.raises(VerifyError, match="above the budget"):
        verify(PROBLEM, with_first(replace(first, peak_nbytes=PROBLEM.budget_nbytes + 1)), lowered=True)


def test_one_byte_too_much_is_seen() -> None:
    peak = schedule().peak_nbytes
    verify(replace(PROBLEM, budget_nbytes=peak), replace(schedule(), budget_nbytes=peak))
    with pytest.raises(VerifyError, match=f"needs {peak} bytes"):
        verify(replace(PROBLEM, budget_nbytes=peak - 1), replace(schedule(), budget_nbytes=peak - 1))


def test_places_must_be_allowed_and_large_enough() -> None:
    movable = replace(PROBLEM, segments=tuple(replace(segment, weight_nbytes=5) for segment in PROBLEM.segments))
    with pytest.raises(VerifyError, match="weights of prelude on the disk, which is not allowed"):
        verify(movable, replace(schedule(), places=places(weights=(DISK,) * 8)))
    with pytest.raises(VerifyError, match=r"state of embed\[0\] on the disk, which is not allowed"):
        verify(replace(PROBLEM, state=(DEVICE,)), schedule())
    small = Link(Placement.HOST, 10**9, 10**9, 7)
    with pytest.raises(VerifyError, match="bytes on the host"):
        verify(replace(PROBLEM, links=(small, *PROBLEM.links)), replace(schedule(), places=places(state=(Placement.HOST,) * COUNT)))


def test_streamed_weights_and_immediate_updates_are_followed() -> None:
    segments = tuple(Segment(s.name, s.kind, s.entry_nbytes, s.arriving_nbytes, 1000) for s in PROBLEM.segments)
    problem = replace(PROBLEM, segments=segments, weights=(DISK,), updates=(Update.IMMEDIATE,))
    with pytest.raises(VerifyError, match="weights of prelude on the device, which is not allowed"):
        verify(problem, replace(schedule(), steps=tuple(replace(step, update=Update.IMMEDIATE) for step in schedule().steps)))
