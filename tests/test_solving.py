"""Which form of the question is answered: weights at home or away, bytes kept free for copies or not."""

from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from chunkft_compile.errors import BudgetError
from chunkft_compile.planner import Link, Placement, Problem, Schedule, smallest_budget
from chunkft_compile.solving import Solving, forms, solve
from tests.planner.planner_problems import transformer

LINK = Link(Placement.DISK, 4_000_000_000, 4_000_000_000, None, overlaps=True)
SOLVING = Solving(seconds=0.5)


@dataclass(frozen=True)
class _Compiled:
    """Stands where a compiled signature gives problems, under one budget; its programs take what the planner says."""

    budget_nbytes: int

    @property
    def setting(self) -> Any:
        return SimpleNamespace(links=(LINK,))

    def problem(self, *, accumulating: bool, weights: tuple[Placement, ...] = (Placement.DEVICE,), overlaps: bool = True) -> Problem:
        made = transformer(6, 0.5, tokens=256, accumulating=accumulating)
        sizes: dict[int, int] = defaultdict(int)
        for chunk in made.chunks:
            sizes[chunk.segment] += chunk.grad_nbytes
        return replace(
            made,
            budget_nbytes=self.budget_nbytes,
            segments=tuple(replace(segment, weight_nbytes=sizes[number]) for number, segment in enumerate(made.segments)),
            chunks=tuple(replace(chunk, weight_nbytes=chunk.grad_nbytes) for chunk in made.chunks),
            links=(replace(LINK, overlaps=overlaps),),
            state=(Placement.DEVICE, Placement.DISK),
            weights=weights,
        )

    def exact(self, schedule: Schedule, *, accumulating: bool) -> Schedule:
        return schedule


def _solve(budget_nbytes: int, solving: Solving = SOLVING) -> tuple[Problem, Schedule]:
    compiled: Any = _Compiled(budget_nbytes)
    return solve(compiled, solving, accumulating=False)


def _smallest(form: int) -> int:
    compiled: Any = _Compiled(1)
    return smallest_budget(forms(compiled, SOLVING, accumulating=False)[form])[0]


def test_each_form_fits_budgets_that_the_one_before_does_not() -> None:
    needed = [_smallest(form) for form in range(4)]
    assert needed == sorted(needed, reverse=True)
    assert len(set(needed)) == 4
    with pytest.raises(BudgetError):
        _solve(needed[-1] - 1)
    assert _solve(needed[-1])[1].peak_nbytes <= needed[-1]


@pytest.mark.parametrize("form", [0, 1, 2])
def test_a_form_that_barely_fits_is_not_taken_where_another_is_faster(form: int) -> None:
    """Just below the budget from which on a form fits, a plan of another one was found; it is there above that budget, too."""
    needed = _smallest(form)
    _, below = _solve(needed - 1)
    _, above = _solve(needed)
    assert above.sweep_us <= below.sweep_us / 0.9


def test_weights_stay_where_that_is_as_fast() -> None:
    problem, schedule = _solve(3 * _smallest(0))
    assert problem.weights == (Placement.DEVICE,)
    assert len(schedule.steps) == 1


def test_the_fewest_steps_are_looked_for_in_all_forms() -> None:
    budget = _smallest(0)
    _, fastest = _solve(budget)
    _, freshest = _solve(budget, replace(SOLVING, prefer="fresh"))
    assert len(freshest.steps) <= len(fastest.steps)
