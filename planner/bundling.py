"""Fewer, larger chunks for the solver: hundreds of norm weights must not become hundreds of variables."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from chunkft_compile.planner.grounds import Ground, leanest
from chunkft_compile.planner.options import fits
from chunkft_compile.planner.problem import Chunk, Problem

# A bundle stays below this share of the bytes a budget leaves above the static ones, so packing loses almost nothing.
BUNDLE_SHARE = 64


@dataclass(frozen=True, slots=True)
class Bundled:
    """`problem` has one chunk per bundle; bundle `i` stands for the chunks `members[i]` of the original, ascending."""

    problem: Problem
    members: tuple[tuple[int, ...], ...]

    def expand(self, bundles: tuple[int, ...]) -> tuple[int, ...]:
        """The original chunks of these bundles, ascending."""
        return tuple(sorted(index for bundle in bundles for index in self.members[bundle]))

    def groups(self) -> list[list[int]]:
        """Bundles that differ in nothing the solver sees, together; only their number per step matters."""
        groups: dict[Chunk, list[int]] = {}
        for bundle, chunk in enumerate(self.problem.chunks):
            groups.setdefault(replace(chunk, name="", grad_us=0, update_us=0), []).append(bundle)
        return [
            groups[key] for key in sorted(groups, key=lambda chunk: (chunk.segment, chunk.first, -chunk.grad_nbytes, chunk.update_nbytes))
        ]


def bundle(problem: Problem) -> Bundled:
    """Join small chunks of the same segments. Every bundle fits in a step of its own if each of its chunks does."""
    ground = leanest(problem)
    limit = (problem.budget_nbytes - ground.base_nbytes) // BUNDLE_SHARE
    places: dict[tuple[int, int], list[int]] = {}
    for index, chunk in enumerate(problem.chunks):
        places.setdefault((chunk.segment, chunk.first), []).append(index)
    members = [part for place in places.values() for part in _parts(ground, place, limit)]
    return Bundled(replace(problem, chunks=tuple(_joined(problem, part) for part in members)), tuple(members))


def _parts(ground: Ground, indices: list[int], limit: int) -> Iterator[tuple[int, ...]]:
    """Runs of equal chunks stay together where they can, so that their bundles are equal too."""
    problem = ground.problem
    part: list[int] = []
    for index in sorted(indices, key=lambda index: (-problem.chunks[index].grad_nbytes, -problem.chunks[index].update_nbytes, index)):
        longer = [*part, index]
        if part and (sum(problem.chunks[i].grad_nbytes for i in longer) > limit or not fits(ground, longer, problem.budget_nbytes)):
            yield tuple(sorted(part))
            longer = [index]
        part = longer
    yield tuple(sorted(part))


def _joined(problem: Problem, indices: tuple[int, ...]) -> Chunk:
    """One chunk for several: everything adds up but the update, which still takes one after the other."""
    chunks = [problem.chunks[index] for index in indices]
    return Chunk(
        name=" + ".join(chunk.name for chunk in chunks),
        segment=chunks[0].segment,
        first=chunks[0].first,
        grad_nbytes=sum(chunk.grad_nbytes for chunk in chunks),
        state_nbytes=sum(chunk.state_nbytes for chunk in chunks),
        update_nbytes=max(chunk.update_nbytes for chunk in chunks),
        grad_us=sum(chunk.grad_us for chunk in chunks),
        update_us=sum(chunk.update_us for chunk in chunks),
        weight_nbytes=sum(chunk.weight_nbytes for chunk in chunks),
        joined_state_nbytes=max(chunk.piece_state_nbytes for chunk in chunks) if len(chunks) > 1 else None,
    )
