"""Schedules made by hand, in place of the planner's: whatever steps a test wants to see run."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from chunkft_compile.planner import Placement, Places, Problem, Schedule, Step, Update


def schedule(
    problem: Problem,
    updates: Sequence[Update],
    *,
    option: str = "inputs",
    head: str | None = None,
    resident: Sequence[int] = (),
    scattered: bool = False,
    away: bool = False,
) -> Schedule:
    """One step for every entry of `updates`; the chunks are dealt out in runs, or one by one where `scattered`.

    The last segment has the option `head`, if given. With `away`, all weights live beside the device that can.
    """
    count, numbers = len(updates), range(len(problem.chunks))
    bounds = [len(numbers) * i // count for i in range(count + 1)]
    parts = [numbers[i::count] for i in range(count)] if scattered else [numbers[a:b] for a, b in itertools.pairwise(bounds)]
    options = (*(option,) * (len(problem.segments) - 1), head or option)
    steps = tuple(Step(tuple(part), options, problem.budget_nbytes, 0, update) for part, update in zip(parts, updates, strict=True))
    state = tuple(Placement.DEVICE if number in resident else problem.links[-1].placement for number in numbers)
    weights = tuple(problem.links[-1].placement if away and segment.weight_nbytes else Placement.DEVICE for segment in problem.segments)
    places = Places(state, weights)
    return Schedule(problem.budget_nbytes, steps, places, "GREEDY", 1.0, 0.0)


def plan_by_hand(patch: pytest.MonkeyPatch, updates: Sequence[Update], **settings: Any) -> None:
    """From now on sessions get such schedules, see `schedule`; where gradients accumulate, with HELD updates."""

    def plans(problem: Problem, **_: object) -> tuple[Schedule, ...]:
        allowed = [update if update in problem.updates else Update.HELD for update in updates]
        return (schedule(problem, allowed, **settings),)

    patch.setattr("chunkft_compile.solving.plans", plans)
