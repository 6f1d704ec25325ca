"""A plan without a solver: the hint of CP-SAT, its fallback, and the baseline it must beat.

Chunks are taken from the deepest segment upwards, each into the fullest open step that still holds it. Open steps reach at
least as deep, so a chunk that joins one never makes its backward longer; and because low segments fill whole steps first,
as few steps as possible are deep. Filling from the top would leave the rest, a nearly empty step, as the deepest of all.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from chunkft_compile.planner.bounds import depth_of
from chunkft_compile.planner.grounds import Ground
from chunkft_compile.planner.options import best_step, each_fits, fits
from chunkft_compile.planner.problem import Chunk, Problem, Step


def greedy_steps(ground: Ground) -> tuple[Step, ...] | None:
    """Steps that train every chunk once, deepest first; None where some chunk does not fit alone."""
    budget_nbytes = ground.problem.budget_nbytes
    bins = greedy_bins(ground, budget_nbytes) if each_fits(ground, budget_nbytes) else None
    return steps_of(ground, bins, budget_nbytes) if bins is not None else None


def greedy_bins(ground: Ground, budget_nbytes: int, most: int | None = None) -> list[list[int]] | None:
    """The chunks of each step, in the order in which steps were opened.

    None where some chunk fits neither beside others nor alone, or there would be more than `most` steps.
    """
    problem = ground.problem
    bins: list[list[int]] = []
    full: set[tuple[int, Chunk]] = set()  # bins only grow, so what did not fit once never will
    order = sorted(range(len(problem.chunks)), key=lambda index: _rank(problem, index))
    for sort, group in groupby(order, key=lambda index: replace(problem.chunks[index], name="", grad_us=0)):
        left = list(group)
        for number in _fullest_first(problem, bins):
            if left and (number, sort) not in full:
                count = _most(ground, bins[number], left, budget_nbytes)
                bins[number] += left[:count]
                left = left[count:]
                if left:
                    full.add((number, sort))
        while left:
            count = _most(ground, [], left, budget_nbytes)
            if not count or len(bins) == most:
                return None
            full.add((len(bins), sort))
            bins.append(left[:count])
            left = left[count:]
    return bins


def _most(ground: Ground, chunks: Sequence[int], equal: Sequence[int], budget_nbytes: int) -> int:
    """How many of these equal chunks fit beside `chunks`: mostly all or none."""
    fitting, over = 0, len(equal) + 1
    tried = len(equal)
    while over - fitting > 1:
        if fits(ground, [*chunks, *equal[:tried]], budget_nbytes):
            fitting = tried
        else:
            over = tried
        tried = 1 if not fitting and over > 2 else (fitting + over) // 2
    return fitting


def steps_of(ground: Ground, bins: Sequence[Sequence[int]], budget_nbytes: int, most_us: int | None = None) -> tuple[Step, ...] | None:
    """The fastest steps over these sets of chunks, deepest first; None where one does not fit, or they take more than `most_us`."""
    steps: list[Step] = []
    for chunks in sorted(bins, key=lambda chunks: depth_of(ground.problem, chunks)):
        step = best_step(ground, sorted(chunks), budget_nbytes)
        if step is None:
            return None
        steps.append(step)
        if most_us is not None and sum(step.us for step in steps) > most_us:
            return None
    return tuple(steps)


def _rank(problem: Problem, index: int) -> tuple[int, int, int, int]:
    """Deep chunks first; among equals the large ones, which find a place with more difficulty."""
    chunk = problem.chunks[index]
    return chunk.segment, chunk.first, -chunk.grad_nbytes, index


def _fullest_first(problem: Problem, bins: list[list[int]]) -> list[int]:
    fill = [sum(problem.chunks[index].grad_nbytes for index in chunks) for chunks in bins]
    return sorted(range(len(bins)), key=lambda number: -fill[number])
