"""A sweep on its way to a schedule: steps, and where the weights live; the state is placed last."""

from dataclasses import dataclass, replace
from typing import Literal

from chunkft_compile.planner.bundling import Bundled
from chunkft_compile.planner.grounds import settle
from chunkft_compile.planner.options import make_step
from chunkft_compile.planner.problem import Placement, Places, Problem, Step
from chunkft_compile.planner.residency import place_state

Prefer = Literal["time", "fresh"]
"""What makes one sweep better: fewer microseconds; or fewer steps first, so that every parameter is trained more often."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Steps, and the places of weights they were made for. Peaks and times are those with no more state on the device than must be."""

    steps: tuple[Step, ...]
    weights: tuple[Placement, ...]

    @property
    def us(self) -> int:
        """Time of the sweep."""
        return sum(step.us for step in self.steps)


def rank(steps: tuple[Step, ...], prefer: Prefer) -> tuple[int, int]:
    """Smaller is better."""
    us = sum(step.us for step in steps)
    return (len(steps), us) if prefer == "fresh" else (us, len(steps))


def finish(problem: Problem, draft: Draft, bundled: Bundled | None = None) -> tuple[tuple[Step, ...], Places]:
    """The draft over the chunks of `problem`, with as much state on the device as it leaves room for."""
    expanded = tuple(replace(step, chunks=bundled.expand(step.chunks)) for step in draft.steps) if bundled else draft.steps
    places = place_state(problem, expanded, draft.weights)
    ground = settle(problem, places)
    return tuple(make_step(ground, step.chunks, step.options, step.update) for step in expanded), places
