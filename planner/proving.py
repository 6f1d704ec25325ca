"""What no sweep can beat, without a solver: sweeps of one step exactly, longer ones by what a second step costs at least."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from heapq import heappush, heapreplace

from chunkft_compile.planner.explaining import smallest_budget
from chunkft_compile.planner.grounds import NO_TRANSFER, Ground, Transfer, away_links, leanest
from chunkft_compile.planner.limits import Capacity
from chunkft_compile.planner.options import best_step, smallest_for
from chunkft_compile.planner.problem import Placement, Problem, Role, Update

_SINGLE_HALVINGS, _SEVERAL_HALVINGS = 12, 64  # each takes milliseconds, and each a tenth of one
_NEVER = 1 << 62
_ALL_POINTS = 1 << 14  # fronts of real models have some hundreds: nothing is thinned, so the best step is the best


def least_sweep_us(problem: Problem) -> int:
    """No sweep of the problem takes less."""
    # as if the fastest place beside the device held everything
    problem = replace(problem, links=tuple(replace(link, capacity_nbytes=None) for link in problem.links))
    passes, most = _Passes(problem), _state_room(problem, smallest_budget(problem)[0])
    several, single = _several_us(passes, most), _single_us(problem)
    return several if single is None else min(several, max(single, passes.us([min(chunk.segment for chunk in problem.chunks)], most)))


def least_pass_us(problem: Problem) -> int:
    """No sweep takes less than one step over everything with all state at home: a weaker bound than `least_sweep_us`, and a quicker one."""
    deepest = min(chunk.segment for chunk in problem.chunks)
    return _Passes(problem).us([deepest], sum(chunk.state_nbytes for chunk in problem.chunks))


class _Moves:
    """The transfers of all state."""

    def __init__(self, ground: Ground) -> None:
        self._us = [[move.hidden_us for move in ground.state_moves], [move.exposed_us for move in ground.state_moves]]
        nbytes = [chunk.state_nbytes for chunk in ground.problem.chunks]
        # dearest bytes first
        self._sorted = [sorted(((u, n) for u, n in zip(us, nbytes, strict=True) if u), key=lambda one: -one[0] / one[1]) for us in self._us]

    def least(self, kept_nbytes: int) -> Transfer:
        """What is left if state stays in so many bytes of the device: of the hidden ones and of the exposed ones at least so much."""
        left = []
        for us, dearest in zip(self._us, self._sorted, strict=True):
            room, moving = kept_nbytes, sum(us)
            for own, nbytes in dearest:
                part = min(room, nbytes)
                if not part:
                    break
                moving -= -(-own * part // nbytes)
                room -= part
            left.append(moving)
        return Transfer(*left)


def _state_room(problem: Problem, least_nbytes: int) -> int:
    """What state can stay in: the budget above what the sweep needs anyway, in which the update of one chunk is counted with its state."""
    if Placement.DEVICE not in problem.state:
        return 0
    return problem.budget_nbytes - least_nbytes + _own_nbytes(problem)


def _own_nbytes(problem: Problem) -> int:
    """So much more than other state may stay beside an update, because state that stays does not come for it."""
    pairs = zip(problem.chunks, leanest(problem).update_nbytes, strict=True)
    return max(nbytes - (chunk.update_nbytes - chunk.piece_state_nbytes) for chunk, nbytes in pairs)


def _single_us(problem: Problem) -> int | None:
    """A bound on sweeps of one step; None where there is none. Exact but for what the places of weights and state may save.

    State that stays spares transfers and takes room from the options.
    """
    ground, everything = _relaxed(problem), range(len(problem.chunks))
    if best_step(ground, everything, problem.budget_nbytes, points=1) is None:
        return None
    room = _state_room(problem, smallest_for(ground, everything))
    own = _own_nbytes(problem)
    moves = _Moves(ground)
    away = moves.least(0)

    def bound(least: int, most: int) -> int:
        step = best_step(ground, everything, problem.budget_nbytes - max(0, least - own), points=_ALL_POINTS)
        left = moves.least(most)
        return _NEVER if step is None else step.us - (away.hidden_us - left.hidden_us) - (away.exposed_us - left.exposed_us)

    return _least(bound, room, _SINGLE_HALVINGS)


def _relaxed(problem: Problem) -> Ground:
    """The ground with the fewest bytes, and weights that cost nothing to fetch if they may leave."""
    ground = leanest(problem)
    if problem.weights == (Placement.DEVICE,):
        return ground
    nothing = (NO_TRANSFER,)
    segments, chunks = nothing * len(problem.segments), nothing * len(problem.chunks)
    return replace(ground, fetch=segments, weight_in=chunks, weight_out=chunks)


def _several_us(passes: "_Passes", most_nbytes: int) -> int:
    """A bound on sweeps of two or more steps, with at most so much state that stays.

    Gradients need room: so many steps reach at least so deep (`Capacity`). State that stays spares transfers and takes of that room.
    """
    capacity = Capacity(passes.problem)
    own = _own_nbytes(passes.problem)

    def bound(least: int, most: int) -> int:
        return passes.us(_depths(capacity, max(0, least - own)), most)

    return _least(bound, most_nbytes, _SEVERAL_HALVINGS)


def _least(bound: Callable[[int, int], int], most_nbytes: int, halvings: int) -> int:
    """The least of a bound on sweeps whose state that stays takes `least` to `most` bytes, over all up to `most_nbytes`.

    The bound is for the steps beside the smallest amount, with the transfers that the largest leaves, so it is the better the closer they
    are: the part with the least is halved, again and again.
    """
    parts = [(bound(0, most_nbytes), 0, most_nbytes)]
    for _ in range(halvings):
        us, least, most = parts[0]
        middle = (least + most) // 2
        if middle == least:
            break
        heapreplace(parts, (max(us, bound(least, middle)), least, middle))
        heappush(parts, (max(us, bound(middle, most)), middle, most))
    return parts[0][0]


def _depths(capacity: Capacity, kept_nbytes: int) -> list[int]:
    """For each of the steps there must be, deepest first: it reaches this segment, if not a lower one."""
    trained = sorted({chunk.segment for chunk in capacity.problem.chunks})
    depths: list[int] = []
    for segment in trained:
        depths += [segment] * (capacity.fewest_steps(segment, kept_nbytes=kept_nbytes) - len(depths))
    return depths + trained[-1:] * (2 - len(depths))


class _Passes:
    """Bounds from compute and transfers alone."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._moves = _Moves(leanest(problem))
        self._fetch = _least_fetch(problem)
        self._forward_us = sum(min(cost.forward_us for cost in problem.kinds[segment.kind].costs) for segment in problem.segments)
        self._backward_us = [_backward_us(problem, depth) for depth in range(len(problem.segments))]
        self._training_us = sum(_training_us(problem, segment) for segment in {chunk.segment for chunk in problem.chunks})
        self._grad_us = sum(chunk.grad_us for chunk in problem.chunks)
        self._update_us = sum(chunk.update_us for chunk in problem.chunks)

    def us(self, depths: Sequence[int], kept_nbytes: int) -> int:
        """No sweep takes less whose steps reach these depths or lower ones, if no more than `kept_nbytes` of state stay.

        Each step runs the whole forward and its backward. Other state moves beside updates, which IMMEDIATE ones spread over backwards;
        weights that the device cannot hold are fetched in every forward and in the deepest backward.
        """
        state, again = self._moves.least(kept_nbytes), self._fetch if depths[0] == 0 else NO_TRANSFER
        backward = sum(self._backward_us[depth] for depth in depths) + self._training_us + self._grad_us
        if self.problem.updates == (Update.HELD,):
            rest = again.with_compute(backward) + state.with_compute(self._update_us)
        else:
            rest = (state + again).with_compute(backward + self._update_us)
        return len(depths) * self._fetch.with_compute(self._forward_us) + rest


def _least_fetch(problem: Problem) -> Transfer:
    """The least that one pass over all segments fetches: weights beyond what the budget leaves above the leanest ground."""
    ground, links = leanest(problem), away_links(problem)
    away = sum(s.weight_nbytes for s, place in zip(problem.segments, ground.places.weights, strict=True) if place is not Placement.DEVICE)
    nbytes = away - (problem.budget_nbytes - ground.base_nbytes if Placement.DEVICE in problem.weights else 0)
    if nbytes <= 0:
        return NO_TRANSFER
    us = min(link.read_us(nbytes) for link in links)
    return Transfer(hidden_us=us) if any(link.overlaps for link in links) else Transfer(exposed_us=us)


def _backward_us(problem: Problem, depth: int) -> int:
    """The least of a backward that goes down to `depth` or lower."""
    passing = sum(_least_backward_us(problem, s, Role.PASS, Role.ACTIVE) for s in range(depth + 1, len(problem.segments)))
    return passing + _least_backward_us(problem, depth, Role.PASS, Role.ACTIVE, Role.LAST)


def _training_us(problem: Problem, segment: int) -> int:
    """At least so much more does the backward of a segment take in the step that trains it than the least of any."""
    trained, passed = (Role.ACTIVE, Role.LAST), (Role.PASS, Role.ACTIVE)
    return max(0, _least_backward_us(problem, segment, *trained) - _least_backward_us(problem, segment, *passed))


def _least_backward_us(problem: Problem, segment: int, *roles: Role) -> int:
    return min(cost.backward_us for role in roles for cost in problem.costs(segment, role))
