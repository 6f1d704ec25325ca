"""What holds for every sweep of a problem, before any is known: limits on steps, time and bytes that spare the solver work."""

from collections.abc import Sequence
from itertools import accumulate

from chunkft_compile.planner.grounds import leanest
from chunkft_compile.planner.problem import Cost, Problem, Role, Step, Update

# The solver may use this many steps even if greedy needs fewer: more steps with faster options sometimes win. For longer sweeps
# a spare step only made the search slower and its answers worse (measured on 14 segments: 10 % from the bound instead of 6 %).
SMALL_SWEEP = 4

# Close to the smallest budget a step holds a chunk or two, and a sweep has hundreds of steps. A model of them all takes minutes to build
# and nothing comes of it; greedy then has the last word.
MOST_CELLS = 4000


def most_steps(problem: Problem, hint: Sequence[Step]) -> int:
    """How many steps the solver may use, never fewer than the hint has.

    A sweep no slower than the hint consists of at most `affordable` steps, however cheap they are.
    """
    cheapest = cheapest_us(problem)
    affordable = sum(step.us for step in hint) // cheapest if cheapest else len(problem.chunks)
    return max(len(hint), min(len(problem.chunks), affordable, SMALL_SWEEP))


def least_us(problem: Problem, depth: int) -> int:
    """No step of this depth takes less, whatever its chunks and options (gradients, updates and transfers left out)."""
    total = 0
    for s in range(len(problem.segments)):
        roles = (Role.FROZEN,) if s < depth else (Role.LAST,) if s == depth else (Role.PASS, Role.ACTIVE)
        total += min(cost_us(cost, role) for role in roles for cost in problem.costs(s, role))
    return total


def cheapest_us(problem: Problem) -> int:
    """No step at all takes less (gradients, updates and transfers left out)."""
    return min(least_us(problem, depth) for depth in {chunk.segment for chunk in problem.chunks})


def cost_us(cost: Cost, role: Role) -> int:
    """The compute of an option: a frozen segment has no backward."""
    return cost.forward_us + (0 if role is Role.FROZEN else cost.backward_us)


class Capacity:
    """How much gradient a step can hold, for one problem."""

    def __init__(self, problem: Problem) -> None:
        ground = leanest(problem)
        self.problem = problem
        self.room = problem.budget_nbytes - ground.base_nbytes
        self.update_nbytes = ground.update_nbytes
        self.held_only = problem.updates == (Update.HELD,)
        lasts = [self._least_last(s) for s in range(len(problem.segments))]
        trained = sorted({chunk.segment for chunk in problem.chunks})
        # at the backward of the depth all HELD gradients of the step are there, and the depth is the segment of some chunk
        self._least = {s: min(lasts[t] for t in trained if t <= s) for s in range(trained[0], len(problem.segments))}
        self._tabulate()

    def fewest_steps(self, segment: int, update_nbytes: int = 0, kept_nbytes: int = 0) -> int:
        """At least so many steps reach `segment` for a chunk whose update takes `update_nbytes` or more; too many where none can hold one.

        HELD, from the largest update down: chunks with a large update need some steps of the small capacity that it leaves; what
        these cannot hold of the chunks with a smaller update needs further steps, of a larger capacity. IMMEDIATE gradients share
        a step's memory with those of their own segment only. `kept_nbytes` of the room are taken in every step.
        """
        if not self.held_only:
            return self._steps(self._fullest[segment], self.room - kept_nbytes)
        steps = held = 0
        for least, grad_nbytes in self._totals[segment]:
            if least < update_nbytes:
                break
            most = self.most_gradients(segment, least) - kept_nbytes
            more = self._steps(max(0, grad_nbytes - held), most)
            steps, held = steps + more, held + more * most
        return steps

    def _steps(self, grad_nbytes: int, most_nbytes: int) -> int:
        return -(-grad_nbytes // most_nbytes) if most_nbytes > 0 else len(self.problem.chunks) + 1

    def _tabulate(self) -> None:
        """What `fewest_steps` asks of each segment and those below it.

        `_totals`: sizes of updates from the largest down, with the gradient bytes of all chunks whose update takes as much or more.
        `_fullest`: the most gradient bytes of one segment.
        """
        own: list[dict[int, int]] = [{} for _ in self.problem.segments]
        for chunk, nbytes in zip(self.problem.chunks, self.update_nbytes, strict=True):
            own[chunk.segment][nbytes] = own[chunk.segment].get(nbytes, 0) + chunk.grad_nbytes
        self._fullest = list(accumulate((sum(sizes.values()) for sizes in own), max))
        self._totals: list[list[tuple[int, int]]] = []
        deep: dict[int, int] = {}
        for sizes in own:
            deep = {nbytes: deep.get(nbytes, 0) + sizes.get(nbytes, 0) for nbytes in {**deep, **sizes}}
            largest = sorted(deep, reverse=True)
            self._totals.append(list(zip(largest, accumulate(deep[nbytes] for nbytes in largest), strict=True)))

    def most_gradients(self, segment: int, update_nbytes: int) -> int:
        """The most gradient bytes of a HELD step that reaches `segment` and updates a chunk that takes `update_nbytes`."""
        return self.room - max(update_nbytes, self._least[segment])

    def _least_last(self, segment: int) -> int:
        costs = self.problem.costs(segment, Role.LAST)
        most = min(cost.saved_nbytes + cost.backward_peak_nbytes + cost.offloaded_nbytes for cost in costs)
        return self.problem.segments[segment].arriving_nbytes + most


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
    # both directions, not only their sum: transfers hide behind one or the other
    us, nbytes = (0, 0) if role is Role.FROZEN else (cost.backward_us, cost.backward_peak_nbytes + cost.offloaded_nbytes)
    return cost.forward_us + us, cost.forward_us, us, cost.saved_nbytes, cost.forward_peak_nbytes, nbytes, cost.offloaded_nbytes
