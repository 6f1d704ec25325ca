"""What holds for every sweep of a problem, before any is known: limits on steps, time and bytes that spare the solver work."""

from collections.abc import Sequence

from chunkft_compile.planner.bounds import cost_us
from chunkft_compile.planner.problem import Cost, Problem, Role, Step

# The solver may use this many steps even if greedy needs fewer: more steps with faster options sometimes win. For longer sweeps
# a spare step only made the search slower and its answers worse (measured on 14 segments: 10 % from the bound instead of 6 %).
SMALL_SWEEP = 4


def most_steps(problem: Problem, hint: Sequence[Step]) -> int:
    """How many steps the solver may use, never fewer than the hint has.

    A sweep no slower than the hint consists of at most `affordable` steps, however cheap they are.
    """
    cheapest = cheapest_us(problem)
    grad_us = sum(chunk.grad_us for chunk in problem.chunks)
    affordable = (sum(step.us for step in hint) - grad_us) // cheapest if cheapest else len(problem.chunks)
    return max(len(hint), min(len(problem.chunks), affordable, SMALL_SWEEP))


def least_us(problem: Problem, depth: int) -> int:
    """No step of this depth takes less, whatever its chunks and options (the time of its gradients left out)."""
    total = 0
    for s in range(len(problem.segments)):
        roles = (Role.FROZEN,) if s < depth else (Role.LAST,) if s == depth else (Role.PASS, Role.ACTIVE)
        total += min(cost_us(cost, role) for role in roles for cost in problem.costs(s, role))
    return total


def cheapest_us(problem: Problem) -> int:
    """No step at all takes less (the time of its gradients left out)."""
    return min(least_us(problem, depth) for depth in {chunk.segment for chunk in problem.chunks})


def fewest_steps(problem: Problem, segment: int, update_nbytes: int = 0) -> int:
    """At least so many steps reach `segment` for a chunk whose update takes `update_nbytes` or more.

    From the largest update down: chunks with a large update need some steps of the small capacity that it leaves; what these
    cannot hold of the chunks with a smaller update needs further steps, of a larger capacity.
    """
    deep = [chunk for chunk in problem.chunks if chunk.segment <= segment]
    steps = room = 0
    for least in sorted({chunk.update_nbytes for chunk in deep if chunk.update_nbytes >= update_nbytes}, reverse=True):
        grad_nbytes = sum(chunk.grad_nbytes for chunk in deep if chunk.update_nbytes >= least)
        most = most_gradients(problem, segment, least)
        more = max(0, -(-(grad_nbytes - room) // most))
        steps, room = steps + more, room + more * most
    return steps


def most_gradients(problem: Problem, segment: int, update_nbytes: int) -> int:
    """The most gradient bytes of a step that reaches `segment` and updates a chunk that takes `update_nbytes`."""
    # At the backward of the depth all gradients of the step are there, and the depth is the segment of some chunk.
    lasts = [
        problem.segments[s].arriving_nbytes + cost.saved_nbytes + cost.backward_peak_nbytes
        for s in {chunk.segment for chunk in problem.chunks if chunk.segment <= segment}
        for cost in problem.costs(s, Role.LAST)
    ]
    return problem.budget_nbytes - problem.static_nbytes - max(update_nbytes, min(lasts))


def undominated(costs: Sequence[Cost], role: Role) -> list[Cost]:
    """Options that no other option beats or equals everywhere; of equal ones the first."""
    kept: list[Cost] = []
    for cost in sorted(costs, key=lambda cost: _figures(cost, role)):
        if not any(beats(other, cost, role) for other in kept):
            kept.append(cost)
    return kept


def beats(one: Cost, other: Cost, role: Role) -> bool:
    """Is `one` nowhere worse than `other` in this role?"""
    return all(a <= b for a, b in zip(_figures(one, role), _figures(other, role), strict=True))


def _figures(cost: Cost, role: Role) -> tuple[int, ...]:
    backward = 0 if role is Role.FROZEN else cost.backward_peak_nbytes
    return cost_us(cost, role), cost.saved_nbytes, cost.forward_peak_nbytes, backward
