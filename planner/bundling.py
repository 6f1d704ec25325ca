"""Fewer, larger chunks for the solver: hundreds of norm weights must not become hundreds of variables."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from chunkft_compile.planner.bounds import fits
from chunkft_compile.planner.problem import Chunk, Problem, Step

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
            groups.setdefault(replace(chunk, name="", grad_us=0), []).append(bundle)
        return [
            groups[key] for key in sorted(groups, key=lambda chunk: (chunk.segment, chunk.first, -chunk.grad_nbytes, chunk.update_nbytes))
        ]


def bundle(problem: Problem) -> Bundled:
    """Join small chunks of the same segments. Every bundle fits in a step of its own if each of its chunks does."""
    limit = (problem.budget_nbytes - problem.static_nbytes) // BUNDLE_SHARE
    places: dict[tuple[int, int], list[int]] = {}
    for index, chunk in enumerate(problem.chunks):
        places.setdefault((chunk.segment, chunk.first), []).append(index)
    members = [part for place in places.values() for part in _parts(problem, place, limit)]
    return Bundled(replace(problem, chunks=tuple(_joined(problem, part) for part in members)), tuple(members))


def _parts(problem: Problem, indices: list[int], limit: int) -> Iterator[tuple[int, ...]]:
    """Runs of equal chunks stay together where they can, so that their bundles are equal too."""
    part: list[int] = []
    for index in sorted(indices, key=lambda index: (-problem.chunks[index].grad_nbytes, -problem.chunks[index].update_nbytes, index)):
        longer = [*part, index]
        if part and (sum(problem.chunks[i].grad_nbytes for i in longer) > limit or not fits(problem, longer, problem.budget_nbytes)):
            yield tuple(sorted(part))
            longer = [index]
        part = longer
    yield tuple(sorted(part))


def _joined(problem: Problem, indices: tuple[int, ...]) -> Chunk:
    """One chunk for several: gradients add up, the optimizer still takes one after the other."""
    chunks = [problem.chunks[index] for index in indices]
    return Chunk(
        name=" + ".join(chunk.name for chunk in chunks),
        segment=chunks[0].segment,
        first=chunks[0].first,
        grad_nbytes=sum(chunk.grad_nbytes for chunk in chunks),
        state_nbytes=0,  # state in the store costs the solver nothing; `residency` places it chunk by chunk
        update_nbytes=max(chunk.update_nbytes for chunk in chunks),
        grad_us=sum(chunk.grad_us for chunk in chunks),
    )


def unbundled(step: Step, bundled: Bundled) -> Step:
    """The same step over the original chunks; its bound and its time do not change."""
    return replace(step, chunks=bundled.expand(step.chunks))
