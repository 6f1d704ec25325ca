"""The best options for given chunks: exact, by carrying the Pareto front of (saved bytes, time) upwards through the segments."""

from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import NamedTuple

from chunkft_compile.planner.bounds import arriving_below, depth_of, gradients_at, held_update, peak_of, roles_of, waiting_nbytes, windows
from chunkft_compile.planner.grounds import Ground
from chunkft_compile.planner.problem import Demand, Role, Step, Update
from chunkft_compile.planner.times import segment_us, step_us, work_of

# How many (saved bytes, time) points `choose_options` keeps per segment. Fronts of real models (a few kinds, a few options)
# stay below it, so the choice is the fastest one; beyond it the front is thinned and the choice may be slightly slower.
FRONT_POINTS = 96


def make_step(ground: Ground, chunks: Sequence[int], options: Sequence[str], update: Update) -> Step:
    """The step of these chunks and options, with its bound and its time."""
    ordered = tuple(sorted(chunks))
    peak = peak_of(ground, ordered, options, update)
    return Step(ordered, tuple(options), peak, step_us(ground, ordered, options, update), update)


def best_step(ground: Ground, chunks: Sequence[int], budget_nbytes: int, *, points: int = FRONT_POINTS) -> Step | None:
    """The fastest step of these chunks within the budget, over the updates that the problem allows; None where none fits."""
    found = []
    for update in ground.problem.updates:
        options = choose_options(ground, chunks, budget_nbytes, update, points=points)
        if options is not None:
            found.append(make_step(ground, chunks, options, update))
    return min(found, key=lambda step: step.us, default=None)


def fits(ground: Ground, chunks: Sequence[int], budget_nbytes: int) -> bool:
    """Is there any choice of options and update within the budget? Exact."""
    return any(_fits(ground, chunks, budget_nbytes, update) for update in ground.problem.updates)


def sorts(ground: Ground) -> Collection[int]:
    """One chunk of each sort, the first. The others are like it in all that decides what fits; names and times do not."""
    found: dict[tuple[int, ...], int] = {}
    for index, chunk in enumerate(ground.problem.chunks):
        found.setdefault((chunk.segment, chunk.first, chunk.grad_nbytes, ground.update_nbytes[index]), index)
    return found.values()


def each_fits(ground: Ground, budget_nbytes: int) -> bool:
    """Does every chunk fit in a step of its own? Exact."""
    return all(fits(ground, [index], budget_nbytes) for index in sorts(ground))


def _fits(ground: Ground, chunks: Sequence[int], budget_nbytes: int, update: Update) -> bool:
    """Whether `choose_options` finds any. Of the options that fit, the one that saves the fewest bytes is enough."""
    limits = _limits(ground, chunks, budget_nbytes, update)
    saved = 0
    for _, demands, entering, leaving, updating in limits or ():
        if saved > updating:
            return False
        least = -1
        for _, own, forward, backward in demands:
            if saved + forward <= entering and saved + backward <= leaving and not 0 <= least <= own:
                least = own
        if least < 0:
            return False
        saved += least
    return limits is not None


def smallest_for(ground: Ground, chunks: Sequence[int], too_small: int = 0) -> int:
    """The smallest budget in which a step of these chunks fits, above `too_small`, by binary search."""
    enough = max(2 * too_small, ground.base_nbytes, 1)
    while not fits(ground, chunks, enough):
        too_small, enough = enough, 2 * enough
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        if fits(ground, chunks, middle):
            enough = middle
        else:
            too_small = middle
    return enough


def choose_options(
    ground: Ground, chunks: Sequence[int], budget_nbytes: int, update: Update, *, points: int = FRONT_POINTS
) -> tuple[str, ...] | None:
    """The fastest options with which a step of these chunks stays within the budget, or None where there are none.

    Every moment of segment `s` holds the bytes saved below it plus what `s` itself needs, so two choices for the segments
    below matter only through (saved bytes, time): the Pareto front of these pairs, carried upwards, loses no best choice. The
    point with the fewest saved bytes is never thinned away, which makes the answer None exact for any number of `points`.
    """
    limits = _limits(ground, chunks, budget_nbytes, update)
    if limits is None:
        return None
    work = work_of(ground, chunks, update)
    front: list[_Point] = [(0, 0, None)]
    for s, (role, demands, entering, leaving, updating) in enumerate(limits):
        front = [point for point in front if point[0] <= updating]
        grown: list[_Point] = []
        for cost, saved, forward, backward in demands:
            most = min(entering - forward, leaving - backward)
            us = segment_us(ground, s, cost, role, work)
            grown += [(p[0] + saved, p[1] + us, (p[2], cost.option)) for p in front if p[0] <= most]
        front = _thinned(_pareto(grown), points)
        if not front:
            return None
    return _names(front[-1][2])


class _Limit(NamedTuple):
    """What one segment leaves for bytes saved below it: at its forward, at its backward, and at its updates."""

    role: Role
    demands: tuple[Demand, ...]
    entering: int
    leaving: int
    updating: int


def _limits(ground: Ground, chunks: Sequence[int], budget_nbytes: int, update: Update) -> list[_Limit] | None:
    """The limits of all segments; None where the HELD update is over the budget."""
    problem, room = ground.problem, budget_nbytes - ground.base_nbytes
    if update is Update.HELD and held_update(ground, chunks).nbytes > budget_nbytes:
        return None
    gradients, depth = gradients_at(problem, chunks, update), depth_of(problem, chunks)
    window = windows(ground, chunks) if update is Update.IMMEDIATE else [-1] * len(problem.segments)
    waiting = waiting_nbytes(problem, chunks)
    return [
        _Limit(
            role,
            problem.kinds[segment.kind].demands[role],
            room - waiting - segment.entry_nbytes,
            room - segment.arriving_nbytes - gradients[s],
            room - gradients[s] - window[s] - arriving_below(problem, s, depth) if window[s] >= 0 else room,
        )
        for s, (segment, role) in enumerate(zip(problem.segments, roles_of(problem, chunks), strict=True))
    ]


_Link = tuple["_Link | None", str]
_Point = tuple[int, int, _Link | None]  # saved bytes, microseconds, the names chosen so far


def _pareto(points: list[_Point]) -> list[_Point]:
    """More saved bytes only where they buy time: ascending bytes, descending time."""
    kept: list[_Point] = []
    for point in sorted(points, key=itemgetter(0, 1)):
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
