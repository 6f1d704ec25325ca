"""The one place where the memory and the time of a step are computed: roles, moments, and the fastest options that fit.

The formulas are those in the docstring of `problem`. Everything that builds schedules reads them here; `verifying` alone
recomputes them in its own words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from chunkft_compile.planner.problem import Chunk, Cost, Problem, Role, Step

# How many (saved bytes, time) points `choose_options` keeps per segment. Fronts of real models (a few kinds, three options)
# stay below it, so the choice is the fastest one; beyond it the front is thinned and the choice may be slightly slower.
FRONT_POINTS = 96


@dataclass(frozen=True, slots=True)
class Load:
    """The bytes live at one moment of a step, by what they are."""

    name: str
    static_nbytes: int
    saved_nbytes: int
    grad_nbytes: int
    own_nbytes: int

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.static_nbytes + self.saved_nbytes + self.grad_nbytes + self.own_nbytes


def depth_of(problem: Problem, chunks: Sequence[int]) -> int:
    """The lowest segment that the backward of a step with these chunks reaches."""
    return min(problem.chunks[index].segment for index in chunks)


def emits(chunk: Chunk, segment: int) -> bool:
    """Does the backward of `segment` emit a slice for `chunk`?"""
    return segment in (chunk.segment, chunk.first)


def passes(chunk: Chunk, segment: int) -> bool:
    """Is a new slice for `chunk` on its way in the backward of `segment`? A tied weight's share travels from `first` down."""
    return chunk.segment <= segment <= chunk.first


def roles_of(problem: Problem, chunks: Sequence[int]) -> tuple[Role, ...]:
    """The role of every segment in a step with these chunks."""
    depth = depth_of(problem, chunks)
    emitting = {segment for index in chunks for segment in (problem.chunks[index].segment, problem.chunks[index].first)}
    return tuple(
        Role.FROZEN if s < depth else Role.LAST if s == depth else Role.ACTIVE if s in emitting else Role.PASS
        for s in range(len(problem.segments))
    )


def gradients_at(problem: Problem, chunks: Sequence[int]) -> list[int]:
    """Bytes of gradients live while the backward of each segment runs."""
    count = len(problem.segments)
    emitted = [0] * count
    for index in chunks:
        chunk = problem.chunks[index]
        for segment in range(chunk.segment, chunk.first + 1) if problem.accumulating else (chunk.first,):
            emitted[segment] += chunk.grad_nbytes
    if problem.accumulating:  # all buffers are there already, new slices come on top until they are added
        total = sum(problem.chunks[index].grad_nbytes for index in chunks)
        return [total + nbytes for nbytes in emitted]
    for segment in reversed(range(count - 1)):
        emitted[segment] += emitted[segment + 1]
    return emitted


def update_load(problem: Problem, chunks: Sequence[int]) -> Load:
    """The moment of the optimizer: every gradient of the step, and one chunk at a time with its state and workspace."""
    active = [problem.chunks[index] for index in chunks]
    grad_nbytes = sum(chunk.grad_nbytes for chunk in active)
    return Load("update", problem.static_nbytes, 0, grad_nbytes, max(chunk.update_nbytes for chunk in active))


def costs_of(problem: Problem, chunks: Sequence[int], options: Sequence[str]) -> list[Cost]:
    """The costs behind the names in `options`, one per segment."""
    found = []
    for segment, (role, option) in enumerate(zip(roles_of(problem, chunks), options, strict=True)):
        found.append(next(cost for cost in problem.costs(segment, role) if cost.option == option))
    return found


def loads(problem: Problem, chunks: Sequence[int], options: Sequence[str]) -> list[Load]:
    """Every moment of a step in the order of time: forwards, backwards, update."""
    costs, gradients, depth = costs_of(problem, chunks, options), gradients_at(problem, chunks), depth_of(problem, chunks)
    static, waiting = problem.static_nbytes, _waiting_nbytes(problem, chunks)
    forwards, backwards, saved = [], [], 0
    for s, (segment, cost) in enumerate(zip(problem.segments, costs, strict=True)):
        own = segment.entry_nbytes + cost.forward_peak_nbytes
        forwards.append(Load(f"forward {segment.name}", static, saved, waiting, own))
        saved += cost.saved_nbytes
        if s >= depth:
            own = segment.arriving_nbytes + cost.backward_peak_nbytes
            backwards.append(Load(f"backward {segment.name}", static, saved, gradients[s], own))
    return [*forwards, *reversed(backwards), update_load(problem, chunks)]


def peak_of(problem: Problem, chunks: Sequence[int], options: Sequence[str]) -> int:
    """The bound of a step: its fullest moment, in bytes."""
    return max(load.nbytes for load in loads(problem, chunks, options))


def time_of(problem: Problem, chunks: Sequence[int], options: Sequence[str]) -> int:
    """The time of a step in microseconds, without the transfer of optimizer state."""
    roles = roles_of(problem, chunks)
    segments = sum(cost_us(cost, role) for cost, role in zip(costs_of(problem, chunks, options), roles, strict=True))
    return segments + sum(problem.chunks[index].grad_us for index in chunks)


def cost_us(cost: Cost, role: Role) -> int:
    """The time of an option: a frozen segment has no backward."""
    return cost.forward_us + (0 if role is Role.FROZEN else cost.backward_us)


def make_step(problem: Problem, chunks: Sequence[int], options: Sequence[str]) -> Step:
    """The step of these chunks and options, with its bound and its time."""
    ordered = tuple(sorted(chunks))
    return Step(ordered, tuple(options), peak_of(problem, ordered, options), time_of(problem, ordered, options))


def fits(problem: Problem, chunks: Sequence[int], budget_nbytes: int) -> bool:
    """Is there any choice of options within the budget? Exact."""
    return choose_options(problem, chunks, budget_nbytes, points=1) is not None


def choose_options(problem: Problem, chunks: Sequence[int], budget_nbytes: int, *, points: int = FRONT_POINTS) -> tuple[str, ...] | None:
    """The fastest options with which a step of these chunks stays within the budget, or None where there are none.

    Every moment of segment `s` holds the bytes saved below it plus what `s` itself needs, so two choices for the segments
    below matter only through (saved bytes, time): the Pareto front of these pairs, carried upwards, loses no best choice. The
    point with the fewest saved bytes is never thinned away, which makes the answer None exact for any number of `points`.
    """
    if update_load(problem, chunks).nbytes > budget_nbytes:
        return None
    gradients = gradients_at(problem, chunks)
    forward_room = budget_nbytes - problem.static_nbytes - _waiting_nbytes(problem, chunks)
    front: list[_Point] = [(0, 0, None)]
    for s, role in enumerate(roles_of(problem, chunks)):
        segment = problem.segments[s]
        entering = forward_room - segment.entry_nbytes
        leaving = budget_nbytes - problem.static_nbytes - segment.arriving_nbytes - gradients[s]
        grown: list[_Point] = []
        for cost in problem.costs(s, role):
            us, room = cost_us(cost, role), entering - cost.forward_peak_nbytes
            if role is not Role.FROZEN:
                room = min(room, leaving - cost.saved_nbytes - cost.backward_peak_nbytes)
            grown += [(p[0] + cost.saved_nbytes, p[1] + us, (p[2], cost.option)) for p in front if p[0] <= room]
        front = _thinned(_pareto(grown), points)
        if not front:
            return None
    return _names(front[-1][2])


_Link = tuple["_Link | None", str]
_Point = tuple[int, int, _Link | None]  # saved bytes, microseconds, the names chosen so far


def _waiting_nbytes(problem: Problem, chunks: Sequence[int]) -> int:
    """Gradients of earlier micro-batches, there during every forward."""
    return sum(problem.chunks[index].grad_nbytes for index in chunks) if problem.accumulating else 0


def _pareto(points: list[_Point]) -> list[_Point]:
    """More saved bytes only where they buy time: ascending bytes, descending time."""
    kept: list[_Point] = []
    for point in sorted(points, key=lambda point: point[:2]):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _thinned(front: list[_Point], points: int) -> list[_Point]:
    """At most `points` of a front, evenly spread, the one with the fewest bytes always among them."""
    if len(front) <= points:
        return front
    return [front[0]] if points == 1 else [front[i * (len(front) - 1) // (points - 1)] for i in range(points)]


def _names(link: _Link | None) -> tuple[str, ...]:
    names: list[str] = []
    while link is not None:
        link, name = link
        names.append(name)
    return tuple(reversed(names))
