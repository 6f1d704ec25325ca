"""Known methods as points of the plan space, by their ingredients: hints for the solver, and the rivals it is measured against."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from chunkft_compile.planner.greedy import steps_of
from chunkft_compile.planner.grounds import Ground
from chunkft_compile.planner.options import fits
from chunkft_compile.planner.problem import Kind, Placement, Problem, Step, Update

Bins = list[list[int]]


@dataclass(frozen=True, slots=True)
class Method:
    """What a method fixes. None leaves the choice; `cut` divides the chunks into steps, from the fewest steps on."""

    source: str
    cut: Callable[[Problem], Iterator[Bins]]
    updates: tuple[Update, ...] | None = None
    options: tuple[str, ...] | None = None
    state: tuple[Placement, ...] | None = None


def restrict(
    problem: Problem,
    *,
    updates: tuple[Update, ...] | None = None,
    options: tuple[str, ...] | None = None,
    state: tuple[Placement, ...] | None = None,
    weights: tuple[Placement, ...] | None = None,
) -> Problem:
    """The problem with only these ingredients. An option is a name or the word it begins with: "tiled" stands for all tile counts.

    Roles that have none of the named options keep theirs. Raises `ValueError` for ingredients the problem does not have.
    """
    kept = problem if options is None else replace(problem, kinds=tuple(_only(kind, options) for kind in problem.kinds))
    for name in options or ():
        if not any(_named(cost.option, name) for kind in problem.kinds for cost in kind.costs):
            raise ValueError(f"no segment has an option {name!r}; there are {', '.join(option_names(problem))}")
    for what, wanted, there in (
        ("update", updates, problem.updates),
        ("place of optimizer state", state, _reachable(problem, problem.state)),
        ("place of weights", weights, _reachable(problem, problem.weights)),
    ):
        if wanted is not None and not set(wanted) <= set(there):
            raise ValueError(f"{what} {', '.join(sorted(set(wanted) - set(there)))} is not allowed here; allowed: {', '.join(there)}")
    return replace(kept, updates=updates or problem.updates, state=state or problem.state, weights=weights or problem.weights)


def option_names(problem: Problem) -> list[str]:
    """Every option that some segment has in some role."""
    return sorted({cost.option for kind in problem.kinds for cost in kind.costs})


def _named(option: str, name: str) -> bool:
    return option == name or option.startswith(name + " ")


def _only(kind: Kind, names: tuple[str, ...]) -> Kind:
    roles = (kind.frozen, kind.passing, kind.active, kind.last)
    return Kind(*(tuple(c for c in costs if any(_named(c.option, name) for name in names)) or costs for costs in roles))


def everything(problem: Problem) -> Iterator[Bins]:
    """One step."""
    yield [list(range(len(problem.chunks)))]


def single_segments(problem: Problem) -> Iterator[Bins]:
    """A step for every segment that trains something."""
    yield _by_segments(problem, 1)


def whole_segments(problem: Problem) -> Iterator[Bins]:
    """Groups of neighbouring segments, equally many in each."""
    trained = len({chunk.segment for chunk in problem.chunks})
    previous: Bins = []
    for size in range(trained, 0, -1):
        bins = _by_segments(problem, size)
        if len(bins) != len(previous):  # several sizes give one number of groups: the largest is the most uneven, skip it
            yield bins
        previous = bins


def _by_segments(problem: Problem, size: int) -> Bins:
    trained = sorted({chunk.segment for chunk in problem.chunks})
    number = {segment: i // size for i, segment in enumerate(trained)}
    bins: Bins = [[] for _ in range(-(-len(trained) // size))]
    for index, chunk in enumerate(problem.chunks):
        bins[number[chunk.segment]].append(index)
    return bins


def equal_bytes(problem: Problem) -> Iterator[Bins]:
    """Chunks on one line, cut into pieces of equal bytes."""
    line = sorted(range(len(problem.chunks)), key=lambda index: (problem.chunks[index].segment, index))
    total = sum(chunk.grad_nbytes for chunk in problem.chunks)
    for count in range(1, len(line) + 1):
        bins: Bins = [[] for _ in range(count)]
        before = 0
        for index in line:
            bins[min(count - 1, before * count // total)].append(index)
            before += problem.chunks[index].grad_nbytes
        yield [chunks for chunks in bins if chunks]


METHODS = {
    "plain": Method("torch.optim", everything, (Update.HELD,), ("save",), (Placement.DEVICE,)),
    "checkpointing": Method("Chen et al. 2016", everything, (Update.HELD,), ("inputs",), (Placement.DEVICE,)),
    "in-backward": Method("LOMO; torchtune", everything, (Update.IMMEDIATE,), ("inputs",), (Placement.DEVICE,)),
    "zero-offload": Method("Ren et al. 2021", everything, (Update.HELD,), ("inputs",), (Placement.HOST, Placement.DISK)),
    "hift": Method("Liu et al. 2024, m = 1; BAdam with all layers", single_segments, (Update.HELD,), ("save",)),
    "whole-segments": Method("HiFT with the best m", whole_segments, (Update.HELD,)),
    "equal-bytes": Method("ChunkFT, the fewest pieces", equal_bytes, (Update.HELD,)),
    "streamed": Method("every segment updated at once, state from its place", everything, (Update.IMMEDIATE,)),
}
"""Points of DESIGN.md section 1 by name."""


def ingredients(name: str) -> str:
    """What a method fixes, in words."""
    method = METHODS[name]
    fixed = [("updates", method.updates), ("options", method.options), ("state on", method.state)]
    return ", ".join([*(f"{what} {' or '.join(values)}" for what, values in fixed if values), "weights on device"])


def method_steps(ground: Ground, name: str, most_us: int | None = None) -> tuple[Step, ...] | None:
    """The sweep of a method on this ground: the first of its cuts whose steps all fit.

    None where it has none, is not allowed, or takes more than `most_us`. `ground` must be of a problem from `method_problem`.
    """
    budget_nbytes = ground.problem.budget_nbytes
    for bins in METHODS[name].cut(ground.problem):
        if all(fits(ground, chunks, budget_nbytes) for chunks in bins):
            return steps_of(ground, bins, budget_nbytes, most_us)
    return None


def method_problem(problem: Problem, name: str) -> Problem | None:
    """The problem with only the ingredients of a method; None where the problem does not allow or have one of them."""
    method = METHODS[name]
    state = method.state and tuple(place for place in method.state if place in _reachable(problem, problem.state))
    if state == ():
        return None
    try:
        return restrict(problem, updates=method.updates, options=method.options, state=state)
    except ValueError:
        return None


def _reachable(problem: Problem, places: tuple[Placement, ...]) -> tuple[Placement, ...]:
    """The device, and what a link leads to."""
    there = {Placement.DEVICE, *(link.placement for link in problem.links)}
    return tuple(place for place in places if place in there)
