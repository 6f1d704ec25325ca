"""Greedy sweeps that fill their steps evenly: what the fullest leaves of the budget is room for state that stays."""

from collections.abc import Iterator, Sequence

from chunkft_compile.planner.greedy import greedy_bins, steps_of
from chunkft_compile.planner.grounds import Ground
from chunkft_compile.planner.options import fits
from chunkft_compile.planner.problem import Step

_HALVINGS = 6  # of the room between the base and the budget: to a percent or two


def levelled_steps(ground: Ground, count: int, shares: Sequence[float]) -> Iterator[tuple[Step, ...]]:
    """Greedy sweeps of at most `count` steps that leave room for state: in the smallest budget with so many steps, and above.

    Greedy fills its first steps to the brim, and state that stays must fit beside the fullest. `shares` are those of what lies
    between that smallest budget and the budget.
    """
    too_small, enough = ground.base_nbytes, ground.problem.budget_nbytes
    for _ in range(_HALVINGS):
        middle = (too_small + enough) // 2
        if _bins(ground, count, middle) is not None:
            enough = middle
        else:
            too_small = middle
    for share in shares:
        budget_nbytes = enough + int(share * (ground.problem.budget_nbytes - enough))
        bins = _bins(ground, count, budget_nbytes)
        steps = steps_of(ground, bins, budget_nbytes) if bins is not None else None
        if steps is not None:
            yield steps


def _bins(ground: Ground, count: int, budget_nbytes: int) -> list[list[int]] | None:
    """The chunks of at most `count` steps that greedy finds in a budget."""
    if count == 1:  # nothing to find
        everything = list(range(len(ground.problem.chunks)))
        return [everything] if fits(ground, everything, budget_nbytes) else None
    return greedy_bins(ground, budget_nbytes, count)
