"""The fastest sweep by trying everything: all partitions of the chunks, all options. Shares nothing with the planner."""

from collections.abc import Iterator
from itertools import product

from chunkft_compile.planner.problem import Cost, Problem, Role


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to divide `items` into non-empty parts."""
    if not items:
        yield []
        return
    for parts in partitions(items[1:]):
        yield [[items[0]], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [items[0], *part], *parts[i + 1 :]]


def fastest_step(problem: Problem, chunks: list[int]) -> int | None:
    """Microseconds of the fastest options that fit, None where none do."""
    active = [problem.chunks[index] for index in chunks]
    depth = min(chunk.segment for chunk in active)
    menus: list[list[tuple[Role, Cost]]] = []
    for s in range(len(problem.segments)):
        if s < depth:
            role = Role.FROZEN
        elif s == depth:
            role = Role.LAST
        else:
            role = Role.ACTIVE if any(s in {chunk.segment, chunk.first} for chunk in active) else Role.PASS
        menus.append([(role, cost) for cost in problem.costs(s, role)])
    times = [_time(choice) for choice in product(*menus) if _peak(problem, chunks, choice) <= problem.budget_nbytes]
    return min(times) + sum(chunk.grad_us for chunk in active) if times else None


def fastest_sweep(problem: Problem) -> int | None:
    """Microseconds of the fastest sweep, None where no sweep fits."""
    known: dict[tuple[int, ...], int | None] = {}
    best: int | None = None
    for parts in partitions(list(range(len(problem.chunks)))):
        total: int | None = 0
        for part in parts:
            key = tuple(sorted(part))
            if key not in known:
                known[key] = fastest_step(problem, list(key))
            us = known[key]
            total = None if total is None or us is None else total + us
        if total is not None and (best is None or total < best):
            best = total
    return best


def _time(choice: tuple[tuple[Role, Cost], ...]) -> int:
    return sum(cost.forward_us + (cost.backward_us if role != Role.FROZEN else 0) for role, cost in choice)


def _peak(problem: Problem, chunks: list[int], choice: tuple[tuple[Role, Cost], ...]) -> int:
    active = [problem.chunks[index] for index in chunks]
    gradients = sum(chunk.grad_nbytes for chunk in active)
    peaks = [gradients + max(chunk.update_nbytes for chunk in active)]
    before = gradients if problem.accumulating else 0
    saved = 0
    for s, (role, cost) in enumerate(choice):
        peaks.append(before + saved + problem.segments[s].entry_nbytes + cost.forward_peak_nbytes)
        saved += cost.saved_nbytes
        if role != Role.FROZEN:
            if problem.accumulating:
                slices = gradients + sum(chunk.grad_nbytes for chunk in active if chunk.segment <= s <= chunk.first)
            else:
                slices = sum(chunk.grad_nbytes for chunk in active if chunk.first >= s)
            peaks.append(saved + problem.segments[s].arriving_nbytes + slices + cost.backward_peak_nbytes)
    return problem.static_nbytes + max(peaks)
