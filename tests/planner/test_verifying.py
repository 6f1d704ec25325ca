from dataclasses import replace

import pytest

from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.problem import Problem, Schedule, Step
from chunkft_compile.planner.verifying import VerifyError, verify
from tests.planner.planner_problems import transformer

PROBLEM = transformer(6, 0.4, tokens=1024)


def schedule(problem: Problem = PROBLEM) -> Schedule:
    steps = greedy_steps(problem)
    assert steps is not None
    return Schedule(problem.budget_nbytes, steps, (), "GREEDY", 0.1, 0.0)


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
        ({"resident": (9999,)}, r"chunks \[9999\], which do not exist"),
        ({"resident": (1, 1)}, "twice"),
        ({"steps": schedule().steps[1:]}, r"never trains .*embed\[0\]"),
        ({"steps": (*schedule().steps, schedule().steps[0])}, "and again in step"),
        ({"resident": tuple(range(len(PROBLEM.chunks)))}, "bytes in step 0 at forward"),
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
