"""What no sweep can beat, without a solver: sweeps of one step exactly, longer ones by what a second step costs at least."""

from dataclasses import replace

from chunkft_compile.planner.explaining import smallest_budget
from chunkft_compile.planner.grounds import NO_TRANSFER, Ground, Transfer, away_links, leanest
from chunkft_compile.planner.options import best_step, smallest_for
from chunkft_compile.planner.problem import Placement, Problem, Role

_PARTS = 16  # of the room for state
_ALL_POINTS = 1 << 14  # fronts of real models have some hundreds: nothing is thinned, so the best step is the best


def least_sweep_us(problem: Problem) -> int:
    """No sweep of the problem takes less."""
    # as if the fastest place beside the device held everything
    problem = replace(problem, links=tuple(replace(link, capacity_nbytes=None) for link in problem.links))
    several, single = _passes_us(problem, 2), _single_us(problem)
    return several if single is None else min(several, max(single, _passes_us(problem, 1)))


def _saved_us(ground: Ground, room_nbytes: int) -> tuple[int, int]:
    """At most so much of the hidden and of the exposed transfers does state save that stays in `room_nbytes` of the device."""
    found = []
    for moves in ([move.hidden_us for move in ground.state_moves], [move.exposed_us for move in ground.state_moves]):
        room, saved = room_nbytes, 0
        states = [(us, chunk.state_nbytes) for us, chunk in zip(moves, ground.problem.chunks, strict=True) if us]
        for us, nbytes in sorted(states, key=lambda pair: -pair[0] / pair[1]):
            part = min(room, nbytes)
            saved += -(-us * part // nbytes)
            room -= part
        found.append(saved)
    return found[0], found[1]


def _state_room(problem: Problem, least_nbytes: int) -> int:
    """What state can stay in: the budget above what the sweep needs anyway, in which the update of one chunk is counted."""
    if Placement.DEVICE not in problem.state:
        return 0
    return problem.budget_nbytes - least_nbytes + max(chunk.piece_state_nbytes for chunk in problem.chunks)


def _single_us(problem: Problem) -> int | None:
    """A bound on sweeps of one step; None where there is none. Exact but for what the places of weights and state may save.

    State that stays saves transfers and takes room from the options: for each part of the room, the fastest options beside the
    smallest amount in it, less what the largest amount saves.
    """
    ground, everything = _relaxed(problem), range(len(problem.chunks))
    if best_step(ground, everything, problem.budget_nbytes, points=1) is None:
        return None
    room = _state_room(problem, smallest_for(ground, everything))
    own = max(chunk.piece_state_nbytes for chunk in problem.chunks)
    bounds = []
    for part in range(_PARTS if room else 1):
        least, most = max(0, room * part // _PARTS - own), room * (part + 1) // _PARTS
        step = best_step(ground, everything, problem.budget_nbytes - least, points=_ALL_POINTS)
        if step is not None:
            bounds.append(step.us - sum(_saved_us(ground, most)))
    return min(bounds)


def _relaxed(problem: Problem) -> Ground:
    """The ground with the fewest bytes, and weights that cost nothing to fetch if they may leave."""
    ground = leanest(problem)
    if problem.weights == (Placement.DEVICE,):
        return ground
    nothing = (NO_TRANSFER,)
    segments, chunks = nothing * len(problem.segments), nothing * len(problem.chunks)
    return replace(ground, fetch=segments, weight_in=chunks, weight_out=chunks)


def _passes_us(problem: Problem, steps: int) -> int:
    """A bound on sweeps of one step, or of two or more, from compute and transfers alone.

    Each step runs the whole forward, one backward goes as deep as any and another as far as it must. State moves beside backwards and
    updates, never beside a forward; weights that the device cannot hold are fetched in every forward and in the deepest backward.
    """
    depths = {chunk.segment for chunk in problem.chunks}
    backward = _backward_us(problem, min(depths)) + (min(_backward_us(problem, depth) for depth in depths) if steps > 1 else 0)
    own = sum(chunk.grad_us + chunk.update_us for chunk in problem.chunks)
    ground, fetched = leanest(problem), _least_fetch(problem)
    saved_hidden, saved_exposed = _saved_us(ground, _state_room(problem, smallest_budget(problem)[0]))
    hidden = sum(move.hidden_us for move in ground.state_moves) - saved_hidden
    exposed = sum(move.exposed_us for move in ground.state_moves) - saved_exposed
    again = fetched if min(depths) == 0 else NO_TRANSFER
    beside = Transfer(hidden, exposed) + again
    return steps * fetched.with_compute(_forward_us(problem)) + beside.with_compute(backward + own)


def _least_fetch(problem: Problem) -> Transfer:
    """The least that one pass over all segments fetches: weights beyond what the budget leaves above the leanest ground."""
    ground, links = leanest(problem), away_links(problem)
    away = sum(s.weight_nbytes for s, place in zip(problem.segments, ground.places.weights, strict=True) if place is not Placement.DEVICE)
    nbytes = away - (problem.budget_nbytes - ground.base_nbytes if Placement.DEVICE in problem.weights else 0)
    if nbytes <= 0:
        return NO_TRANSFER
    us = min(link.read_us(nbytes) for link in links)
    return Transfer(hidden_us=us) if any(link.overlaps for link in links) else Transfer(exposed_us=us)


def _forward_us(problem: Problem) -> int:
    return sum(min(cost.forward_us for cost in problem.kinds[segment.kind].costs) for segment in problem.segments)


def _backward_us(problem: Problem, depth: int) -> int:
    """The least of a backward that goes down to `depth`."""
    roles = [(s, (Role.LAST,) if s == depth else (Role.PASS, Role.ACTIVE)) for s in range(depth, len(problem.segments))]
    return sum(min(cost.backward_us for role in some for cost in problem.costs(s, role)) for s, some in roles)
