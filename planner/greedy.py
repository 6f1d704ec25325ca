"""A plan without a solver: the hint of CP-SAT, its fallback, and the baseline it must beat.

Chunks are taken from the deepest segment upwards, each into the fullest open step that still holds it. Open steps reach at
least as deep, so a chunk that joins one never makes its backward longer; and because low segments fill whole steps first,
as few steps as possible are deep. Filling from the top would leave the rest, a nearly empty step, as the deepest of all.
"""

from chunkft_compile.planner.bounds import choose_options, depth_of, fits, make_step
from chunkft_compile.planner.problem import Problem, Step


def greedy_steps(problem: Problem) -> tuple[Step, ...] | None:
    """Steps that train every chunk once, deepest first; None where some chunk does not fit even alone."""
    budget = problem.budget_nbytes
    if not all(fits(problem, [index], budget) for index in range(len(problem.chunks))):
        return None
    bins: list[list[int]] = []
    for index in sorted(range(len(problem.chunks)), key=lambda index: _rank(problem, index)):
        open_bin = next((chunks for chunks in _fullest_first(problem, bins) if fits(problem, [*chunks, index], budget)), None)
        if open_bin is not None:
            open_bin.append(index)
        else:
            bins.append([index])
    steps = []
    for chunks in sorted(bins, key=lambda chunks: depth_of(problem, chunks)):
        options = choose_options(problem, sorted(chunks), budget)
        assert options is not None, "a step that fits has options"
        steps.append(make_step(problem, chunks, options))
    return tuple(steps)


def _rank(problem: Problem, index: int) -> tuple[int, int, int, int]:
    """Deep chunks first; among equals the large ones, which find a place with more difficulty."""
    chunk = problem.chunks[index]
    return chunk.segment, chunk.first, -chunk.grad_nbytes, index


def _fullest_first(problem: Problem, bins: list[list[int]]) -> list[list[int]]:
    return sorted(bins, key=lambda chunks: -sum(problem.chunks[index].grad_nbytes for index in chunks))
