"""The one place where the memory of a step is computed: roles, moments, and what they hold.

The formulas are those of NOTE [memory of a step] in `problem`. Everything that builds schedules reads them here; `verifying` alone
recomputes them in its own words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from chunkft_compile.planner.grounds import Ground
from chunkft_compile.planner.problem import Chunk, Cost, Problem, Role, Update


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


def gradients_at(problem: Problem, chunks: Sequence[int], update: Update) -> list[int]:
    """Bytes of gradients live while the backward of each segment runs."""
    count = len(problem.segments)
    passing, first = [0] * count, [0] * count
    for index in chunks:
        chunk = problem.chunks[index]
        first[chunk.first] += chunk.grad_nbytes
        for segment in range(chunk.segment, chunk.first + 1):
            passing[segment] += chunk.grad_nbytes
    if problem.accumulating:  # all buffers are there already, new slices come on top until they are added
        total = waiting_nbytes(problem, chunks)
        return [total + nbytes for nbytes in passing]
    if update is Update.IMMEDIATE:
        return passing
    for segment in reversed(range(count - 1)):
        first[segment] += first[segment + 1]
    return first


def waiting_nbytes(problem: Problem, chunks: Sequence[int]) -> int:
    """Gradients of earlier micro-batches, there during every forward."""
    return sum(problem.chunks[index].grad_nbytes for index in chunks) if problem.accumulating else 0


def held_update(ground: Ground, chunks: Sequence[int]) -> Load:
    """The moment of the optimizer: every gradient of the step, and one chunk at a time with its state and workspace."""
    grad_nbytes = sum(ground.problem.chunks[index].grad_nbytes for index in chunks)
    return Load("update", ground.base_nbytes, 0, grad_nbytes, max(ground.update_nbytes[index] for index in chunks))


def windows(ground: Ground, chunks: Sequence[int]) -> list[int]:
    """The largest update inside the backward of each segment, when updates are IMMEDIATE; -1 where there is none."""
    found = [-1] * len(ground.problem.segments)
    for index in chunks:
        segment = ground.problem.chunks[index].segment
        found[segment] = max(found[segment], ground.update_nbytes[index])
    return found


def costs_of(problem: Problem, chunks: Sequence[int], options: Sequence[str]) -> list[Cost]:
    """The costs behind the names in `options`, one per segment."""
    found = []
    for segment, (role, option) in enumerate(zip(roles_of(problem, chunks), options, strict=True)):
        found.append(next(cost for cost in problem.costs(segment, role) if cost.option == option))
    return found


def loads(ground: Ground, chunks: Sequence[int], options: Sequence[str], update: Update) -> list[Load]:
    """Every moment of a step in the order of time: forwards, backwards (and IMMEDIATE updates), the HELD update."""
    problem, base = ground.problem, ground.base_nbytes
    costs, gradients, depth = costs_of(problem, chunks, options), gradients_at(problem, chunks, update), depth_of(problem, chunks)
    waiting, window = waiting_nbytes(problem, chunks), windows(ground, chunks)
    forwards: list[Load] = []
    backwards: list[Load] = []
    saved = 0
    for s, (segment, cost) in enumerate(zip(problem.segments, costs, strict=True)):
        below = saved
        forwards.append(Load(f"forward {segment.name}", base, saved, waiting, segment.entry_nbytes + cost.forward_peak_nbytes))
        saved += cost.saved_nbytes
        if s < depth:
            continue
        if update is Update.IMMEDIATE and window[s] >= 0:
            own = window[s] + arriving_below(problem, s, depth)
            backwards.append(Load(f"update in {segment.name}", base, below, gradients[s], own))
        own = segment.arriving_nbytes + cost.backward_peak_nbytes + cost.offloaded_nbytes
        backwards.append(Load(f"backward {segment.name}", base, saved, gradients[s], own))
    return [*forwards, *reversed(backwards), *([held_update(ground, chunks)] if update is Update.HELD else [])]


def arriving_below(problem: Problem, segment: int, depth: int) -> int:
    """What the backward of `segment` leaves for the one below it."""
    return problem.segments[segment - 1].arriving_nbytes if segment > depth else 0


def peak_of(ground: Ground, chunks: Sequence[int], options: Sequence[str], update: Update) -> int:
    """The bound of a step: its fullest moment, in bytes."""
    return max(load.nbytes for load in loads(ground, chunks, options, update))
