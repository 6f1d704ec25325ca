"""Problems for the planner's tests: a transformer with plausible numbers, and small random ones."""

from dataclasses import replace

from hypothesis import strategies as st

from chunkft_compile.planner.greedy import greedy_steps
from chunkft_compile.planner.grounds import Ground, on_device, settle, spread
from chunkft_compile.planner.problem import Chunk, Cost, Kind, Link, Placement, Problem, Schedule, Segment, Update


def cost(option: str, saved: int, forward_peak: int, backward_peak: int, forward_us: int, backward_us: int) -> Cost:
    return Cost(option, saved, forward_peak, backward_peak, forward_us, backward_us)


def plain_kind(saved: int = 0, us: int = 10) -> Kind:
    """One option everywhere."""
    frozen, keep = (cost("plain", 0, 0, 0, us, 0),), (cost("keep", saved, 0, 0, us, us),)
    return Kind(frozen=frozen, passing=keep, active=keep, last=keep)


def kind_of(unit: int, us: int) -> Kind:
    """Three options per role that backward runs: keep everything, recompute the cheap part, recompute all."""

    def trained(share: float, backward_us: int) -> tuple[Cost, ...]:
        return (
            cost("save", int(12 * unit * share), 14 * unit, 4 * unit, us, backward_us),
            cost("cheap", int(7 * unit * share), 14 * unit, 6 * unit, us, backward_us + us // 10),
            cost("inputs", unit, 14 * unit, 16 * unit, us, backward_us + us),
        )

    frozen = (cost("plain", 0, 4 * unit, 0, us, 0),)
    return Kind(frozen=frozen, passing=trained(0.7, us), active=trained(1.0, 2 * us), last=trained(0.8, us))


def transformer(
    layers: int, budget_share: float, *, hidden: int = 2048, tokens: int = 4096, parts: int = 1, accumulating: bool = False
) -> Problem:
    """A decoder with `layers + 2` segments; the budget is this share of what one step over everything needs."""
    unit, state = tokens * hidden * 2, 4
    kinds = (kind_of(unit // 8, 500), kind_of(unit, 20_000), kind_of(6 * unit, 30_000))
    segments = [Segment("prelude", 0, 0, unit)]
    segments += [Segment(f"block {i}", 1, unit, unit) for i in range(layers)] + [Segment("head", 2, unit, unit)]
    chunks: list[Chunk] = []

    def add(name: str, segment: int, first: int, elements: int, pieces: int) -> None:
        for piece in range(pieces):
            grad = max(1, elements * 2 // pieces)
            chunks.append(Chunk(f"{name}[{piece}]", segment, first, grad, state * grad, state * grad + grad * 2, 50))

    add("embed", 0, 0, 32_000 * hidden, 4 * parts)
    for i in range(layers):
        for name, elements, pieces in (("q", 1, 1), ("k", 1, 1), ("v", 1, 1), ("o", 1, 1), ("gate", 3, 2), ("up", 3, 2), ("down", 3, 2)):
            add(f"block {i} {name}", i + 1, i + 1, elements * hidden * hidden, pieces * parts)
        add(f"block {i} norm 1", i + 1, i + 1, hidden, 1)
        add(f"block {i} norm 2", i + 1, i + 1, hidden, 1)
    add("head", layers + 1, layers + 1, 32_000 * hidden, 4 * parts)
    params = sum(chunk.grad_nbytes for chunk in chunks)
    one_step = params * 2 + 14 * unit * layers
    return Problem(params + int((one_step - params) * budget_share), params, kinds, tuple(segments), tuple(chunks), accumulating)


@st.composite
def costs(draw: st.DrawFn, *, offloads: bool = False) -> tuple[Cost, ...]:
    numbers = st.tuples(*[st.integers(0, 12)] * 5)
    away = st.integers(0, 6) if offloads else st.just(0)
    return tuple(replace(Cost(f"option {i}", *draw(numbers)), offloaded_nbytes=draw(away)) for i in range(draw(st.integers(1, 2))))


@st.composite
def links(draw: st.DrawFn) -> tuple[Link, ...]:
    """One or two links, slow enough to matter."""
    speed = st.integers(200_000, 4_000_000)
    disk = Link(Placement.DISK, draw(speed), draw(speed), None, draw(st.booleans()))
    if draw(st.booleans()):
        return (disk,)
    return (Link(Placement.HOST, draw(speed), draw(speed), draw(st.integers(0, 30)), draw(st.booleans())), disk)


def plain_ground(problem: Problem) -> Ground:
    """All weights on the device, all state away that may be."""
    return settle(problem, spread(problem, on_device(problem)))


def greedy_schedule(problem: Problem) -> Schedule | None:
    """The greedy plan as a schedule, with no more state on the device than must be."""
    ground = plain_ground(problem)
    steps = greedy_steps(ground)
    return Schedule(problem.budget_nbytes, steps, ground.places, "GREEDY", 0.0, 0.0) if steps else None


@st.composite
def problems(draw: st.DrawFn, *, chunks: int = 5, segments: int = 3, modes: bool = False, places: bool = False) -> Problem:
    """Small random problems, many of them infeasible. `modes` adds updates, links and offloads, `places` state and weights that move."""
    kinds = [Kind(*(draw(costs(offloads=modes)) for _ in range(4))) for _ in range(draw(st.integers(1, 2)))]
    count = draw(st.integers(1, segments))
    sizes = st.integers(0, 4)
    layout = [
        Segment(f"segment {i}", draw(st.integers(0, len(kinds) - 1)), draw(sizes), draw(sizes), draw(sizes) if places else 0)
        for i in range(count)
    ]
    parts = []
    for i in range(draw(st.integers(1, chunks))):
        lowest, first = sorted((draw(st.integers(0, count - 1)), draw(st.integers(0, count - 1))))
        state = draw(st.integers(0, 8))
        update, own_us, weight = state + draw(st.integers(0, 3)), draw(st.integers(0, 2)), draw(sizes) if places and lowest == first else 0
        parts.append(Chunk(f"chunk {i}", lowest, first, draw(st.integers(1, 12)), state, update, own_us, draw(st.integers(0, 3)), weight))
    budget, static = draw(st.integers(20, 110)), draw(st.integers(0, 10)) + sum(segment.weight_nbytes for segment in layout)
    problem = Problem(budget, static, tuple(kinds), tuple(layout), tuple(parts), draw(st.booleans()))
    if modes and not problem.accumulating:
        problem = replace(problem, updates=draw(st.sampled_from([(Update.HELD,), (Update.IMMEDIATE,), tuple(Update)])))
    if modes or places:
        problem = replace(problem, links=draw(links())[0 if places else -1 :])
    there = tuple(link.placement for link in problem.links)
    if not places:
        return replace(problem, state=there)
    choices = [(Placement.DEVICE,), (Placement.DEVICE, *there), there]
    return replace(problem, state=draw(st.sampled_from(choices)), weights=draw(st.sampled_from(choices)))
