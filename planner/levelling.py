"""Greedy sweeps that fill their steps evenly: what the fullest leaves of the budget is room for state that stays."""

from collections.abc import Iterator, Sequence

from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.grounds import Ground
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
        found = greedy_steps(ground, middle)
        if found is not None and len(found) <= count:
            enough = middle
        else:
            too_small = middle
    for share in shares:
        found = greedy_steps(ground, enough + int(share * (ground.problem.budget_nbytes - enough)))
        if found is not None and len(found) <= count:
            yield found
