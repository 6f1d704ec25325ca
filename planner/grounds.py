"""A problem with its places settled: what every step of a schedule stands on, in bytes and in transfer times."""

from collections.abc import Iterator, Set
from dataclasses import dataclass

from chunkft_compile.planner.problem import Chunk, Link, Placement, Places, Problem


@dataclass(frozen=True, slots=True)
class Transfer:
    """Microseconds on links that run beside compute (`hidden_us`) and on those that do not."""

    hidden_us: int = 0
    exposed_us: int = 0

    def __add__(self, other: "Transfer") -> "Transfer":
        return Transfer(self.hidden_us + other.hidden_us, self.exposed_us + other.exposed_us)

    def with_compute(self, compute_us: int) -> int:
        """How long compute and these transfers take together."""
        return self.exposed_us + max(compute_us, self.hidden_us)


NO_TRANSFER = Transfer()


@dataclass(frozen=True, slots=True)
class Ground:
    """`base_nbytes` are live at every moment of every step, gradients that accumulate left out.

    `update_nbytes[c]` is what updating chunk `c` takes on top. `fetch[s]` brings the weights of segment `s` to the device,
    `state_moves[c]` the state of a chunk there and back, `weight_in[c]` and `weight_out[c]` its weights.
    """

    problem: Problem
    places: Places
    base_nbytes: int
    update_nbytes: tuple[int, ...]
    fetch: tuple[Transfer, ...]
    state_moves: tuple[Transfer, ...]
    weight_in: tuple[Transfer, ...]
    weight_out: tuple[Transfer, ...]


def link_to(problem: Problem, place: Placement) -> Link | None:
    """The link to a place; None for the device itself."""
    return next((link for link in problem.links if link.placement is place), None)


def settle(problem: Problem, places: Places) -> Ground:
    """The ground under every schedule of `problem` with these places."""
    state = [link_to(problem, place) for place in places.state]
    weights = [link_to(problem, place) for place in places.weights]
    of_chunk = [weights[chunk.segment] for chunk in problem.chunks]
    chunks = list(zip(problem.chunks, state, of_chunk, strict=True))
    resident = sum(chunk.state_nbytes for chunk, link, _ in chunks if link is None)
    return Ground(
        problem,
        places,
        problem.static_nbytes + _weights_nbytes(problem, places.weights) + resident,
        tuple(_update_nbytes(chunk, link) for chunk, link, _ in chunks),
        tuple(fetch_over(link, segment.weight_nbytes) for segment, link in zip(problem.segments, weights, strict=True)),
        tuple(fetch_over(link, chunk.state_nbytes) + _write(link, chunk.state_nbytes) for chunk, link, _ in chunks),
        tuple(fetch_over(link, chunk.weight_nbytes) for chunk, _, link in chunks),
        tuple(_write(link, chunk.weight_nbytes) for chunk, _, link in chunks),
    )


def slab_nbytes(weight_nbytes: int, link: Link) -> int:
    """Bytes on the device for weights that are fetched: twice where one segment is fetched while another is in use."""
    return weight_nbytes * (2 if link.overlaps else 1)


def _update_nbytes(chunk: Chunk, link: Link | None) -> int:
    if link is None:
        return chunk.update_nbytes - chunk.piece_state_nbytes
    # from the largest chunk to the smallest, so the state that comes meanwhile is never larger than that of the chunk at work
    return chunk.update_nbytes + (chunk.piece_state_nbytes if link.overlaps else 0)


def _transfer(link: Link | None, us: int) -> Transfer:
    if link is None:
        return NO_TRANSFER
    return Transfer(hidden_us=us) if link.overlaps else Transfer(exposed_us=us)


def fetch_over(link: Link | None, nbytes: int) -> Transfer:
    """What bringing `nbytes` to the device takes."""
    return _transfer(link, link.read_us(nbytes) if link else 0)


def _write(link: Link | None, nbytes: int) -> Transfer:
    return _transfer(link, link.write_us(nbytes) if link else 0)


def offload(problem: Problem, nbytes: int) -> tuple[Transfer, Transfer]:
    """Saved bytes out to the fastest place, and back."""
    link = problem.links[0]
    return (_write(link, nbytes), fetch_over(link, nbytes)) if nbytes else (NO_TRANSFER, NO_TRANSFER)


def room_on(problem: Problem, link: Link) -> int | None:
    """What a place can hold of state and weights, beside everything that a step may offload to it; None is no limit."""
    if link.capacity_nbytes is None:
        return None
    if link is not problem.links[0]:
        return link.capacity_nbytes
    offloaded = sum(max(cost.offloaded_nbytes for cost in kind.costs) for kind in (problem.kinds[s.kind] for s in problem.segments))
    return max(0, link.capacity_nbytes - offloaded)


def spread(problem: Problem, weights: tuple[Placement, ...], resident: Set[int] = frozenset()) -> Places:
    """Places with the given weights and resident state; other state goes to the fastest link with room, as far as it may leave."""
    order = [place for place in (link.placement for link in problem.links) if place in problem.state] or [Placement.DEVICE]
    free = {link.placement: room_on(problem, link) for link in problem.links}
    for segment, place in zip(problem.segments, weights, strict=True):
        room = free.get(place)
        if room is not None:
            free[place] = room - segment.weight_nbytes
    state = [Placement.DEVICE] * len(problem.chunks)
    leaving = [index for index in range(len(state)) if index not in resident]
    for index in sorted(leaving, key=lambda index: (-problem.chunks[index].state_nbytes, index)):
        state[index] = _first_with_room(order, free, problem.chunks[index].state_nbytes)
    return Places(tuple(state), weights)


def _first_with_room(order: list[Placement], free: dict[Placement, int | None], nbytes: int) -> Placement:
    """The first place that holds `nbytes` more, else the last one; its room is taken."""
    for place in order:
        room = free.get(place)
        if room is None:
            return place
        if room >= nbytes:
            free[place] = room - nbytes
            return place
    return order[-1]


def away_links(problem: Problem) -> list[Link]:
    """The links over which weights may be streamed, fastest first."""
    return [link for link in problem.links if link.placement in problem.weights]


def on_device(problem: Problem) -> tuple[Placement, ...]:
    """All weights on the device."""
    return (Placement.DEVICE,) * len(problem.segments)


def weight_places(problem: Problem) -> Iterator[tuple[Placement, ...]]:
    """Ways to place the weights, from all on the device to all away: for each size, the lowest segments up to it go.

    Low segments go first, since shallow steps never fetch them a second time. Each goes to the fastest link with room.
    """
    links = away_links(problem)
    movable = [s for s, segment in enumerate(problem.segments) if segment.weight_nbytes]
    if Placement.DEVICE not in problem.weights:
        yield _streamed(problem, links, movable)
        return
    yield on_device(problem)
    for size in sorted({problem.segments[s].weight_nbytes for s in movable}) if links else []:
        going = [s for s in movable if problem.segments[s].weight_nbytes <= size]
        for count in range(1, len(going) + 1):
            yield _streamed(problem, links, going[:count])


def _streamed(problem: Problem, links: list[Link], going: list[int]) -> tuple[Placement, ...]:
    order = [link.placement for link in links]
    free = {link.placement: room_on(problem, link) for link in links}
    weights = list(on_device(problem))
    for s in going:
        weights[s] = _first_with_room(order, free, problem.segments[s].weight_nbytes)
    return tuple(weights)


def leanest(problem: Problem) -> Ground:
    """The ground with the fewest bytes: no state on the device unless it must be, and the weights where they leave the most room."""
    weights = min(weight_places(problem), key=lambda weights: _weights_nbytes(problem, weights))
    return settle(problem, spread(problem, weights))


def _weights_nbytes(problem: Problem, weights: tuple[Placement, ...]) -> int:
    """What placing the weights so adds to the static bytes: a slab comes, what is away goes."""
    links = [(segment.weight_nbytes, link_to(problem, place)) for segment, place in zip(problem.segments, weights, strict=True)]
    slab = max((slab_nbytes(nbytes, link) for nbytes, link in links if link), default=0)
    return slab - sum(nbytes for nbytes, link in links if link)
