"""The fastest sweep by trying everything: partitions of the chunks, options, updates, places. Shares nothing with the planner."""

from collections.abc import Iterator, Sequence
from itertools import product

from chunkft_compile.planner.problem import Cost, Link, Placement, Problem, Role, Update

Menu = list[tuple[Role, Cost]]


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to divide `items` into non-empty parts."""
    if not items:
        yield []
        return
    for parts in partitions(items[1:]):
        yield [[items[0]], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [items[0], *part], *parts[i + 1 :]]


class World:
    """A problem with a place for the state of every chunk and the weights of every segment; None is the device."""

    def __init__(self, problem: Problem, state: Sequence[Link | None], weights: Sequence[Link | None]) -> None:
        self.problem, self.state, self.weights = problem, state, weights
        self.base = problem.static_nbytes
        slabs = [0]
        for segment, link in zip(problem.segments, weights, strict=True):
            if link is not None:
                self.base -= segment.weight_nbytes
                slabs.append(segment.weight_nbytes * (2 if link.overlaps else 1))
        self.base += max(slabs)
        self.base += sum(chunk.state_nbytes for chunk, link in zip(problem.chunks, state, strict=True) if link is None)
        self.known: dict[tuple[int, ...], int | None] = {}

    def fastest_step(self, chunks: list[int]) -> int | None:
        """Microseconds of the fastest options and update that fit, None where none do."""
        key = tuple(sorted(chunks))
        if key not in self.known:
            times = []
            for update in self.problem.updates:
                choices = [c for c in product(*self.menus(chunks)) if self.peak(chunks, c, update) <= self.problem.budget_nbytes]
                times += [self.time(chunks, choice, update) for choice in choices]
            self.known[key] = min(times, default=None)
        return self.known[key]

    def menus(self, chunks: list[int]) -> list[Menu]:
        active = [self.problem.chunks[index] for index in chunks]
        depth = min(chunk.segment for chunk in active)
        menus: list[Menu] = []
        for s in range(len(self.problem.segments)):
            if s < depth:
                role = Role.FROZEN
            elif s == depth:
                role = Role.LAST
            else:
                role = Role.ACTIVE if any(s in {chunk.segment, chunk.first} for chunk in active) else Role.PASS
            menus.append([(role, cost) for cost in self.problem.costs(s, role)])
        return menus

    def window(self, index: int) -> int:
        chunk, link = self.problem.chunks[index], self.state[index]
        if link is None:
            return chunk.update_nbytes - chunk.state_nbytes
        return chunk.update_nbytes + (chunk.state_nbytes if link.overlaps else 0)

    def peak(self, chunks: list[int], choice: Sequence[tuple[Role, Cost]], update: Update) -> int:
        problem = self.problem
        active = [problem.chunks[index] for index in chunks]
        everything = sum(chunk.grad_nbytes for chunk in active)
        peaks = [everything + max(self.window(index) for index in chunks)] if update is Update.HELD else []
        before = everything if problem.accumulating else 0
        saved = 0
        for s, (role, cost) in enumerate(choice):
            segment = problem.segments[s]
            peaks.append(before + saved + segment.entry_nbytes + cost.forward_peak_nbytes)
            here = sum(chunk.grad_nbytes for chunk in active if chunk.segment <= s <= chunk.first)
            if problem.accumulating:
                slices = everything + here
            elif update is Update.IMMEDIATE:
                slices = here
            else:
                slices = sum(chunk.grad_nbytes for chunk in active if chunk.first >= s)
            if update is Update.IMMEDIATE:
                arriving = problem.segments[s - 1].arriving_nbytes if s and choice[s - 1][0] != Role.FROZEN else 0
                own = [index for index in chunks if problem.chunks[index].segment == s]
                peaks += [saved + arriving + slices + self.window(index) for index in own]
            saved += cost.saved_nbytes
            if role != Role.FROZEN:
                peaks.append(saved + segment.arriving_nbytes + slices + cost.backward_peak_nbytes + cost.offloaded_nbytes)
        return self.base + max(peaks)

    def time(self, chunks: list[int], choice: Sequence[tuple[Role, Cost]], update: Update) -> int:
        problem, us = self.problem, 0
        for s, (role, cost) in enumerate(choice):
            weights, saved = problem.segments[s].weight_nbytes, cost.offloaded_nbytes
            fast = problem.links[0]
            us += _longer(cost.forward_us, (self.weights[s], weights, 0), (fast, 0, saved))
            if role == Role.FROZEN:
                continue
            own = [index for index in chunks if problem.chunks[index].segment == s]
            compute = cost.backward_us + sum(problem.chunks[index].grad_us for index in own)
            moves = [(self.weights[s], weights, 0), (fast, saved, 0)]
            if update is Update.IMMEDIATE:
                compute += sum(problem.chunks[index].update_us for index in own)
                moves += [move for index in own for move in self.moves(index, fetched=False)]
            us += _longer(compute, *moves)
        if update is Update.HELD:
            held = [move for index in chunks for move in self.moves(index, fetched=True)]
            us += _longer(sum(problem.chunks[index].update_us for index in chunks), *held)
        return us

    def moves(self, index: int, *, fetched: bool) -> list[tuple[Link | None, int, int]]:
        chunk = self.problem.chunks[index]
        state = (self.state[index], chunk.state_nbytes, chunk.state_nbytes)
        return [state, (self.weights[chunk.segment], chunk.weight_nbytes if fetched else 0, chunk.weight_nbytes)]


def _longer(compute: int, *moves: tuple[Link | None, int, int]) -> int:
    hidden = exposed = 0
    for link, read, write in moves:
        if link is not None:
            us = -(-read * 10**6 // link.read_bytes_per_s) + -(-write * 10**6 // link.write_bytes_per_s)
            hidden, exposed = (hidden + us, exposed) if link.overlaps else (hidden, exposed + us)
    return exposed + max(compute, hidden)


def _worlds(problem: Problem) -> Iterator[World]:
    links: list[Link | None] = [None, *problem.links]
    state = [link for link in links if (link.placement if link else Placement.DEVICE) in problem.state]
    weights = [link for link in links if (link.placement if link else Placement.DEVICE) in problem.weights]
    movable = [weights if segment.weight_nbytes else [None] for segment in problem.segments]
    for some in product(state, repeat=len(problem.chunks)):
        for others in product(*movable):
            if all(link.capacity_nbytes is None or _stored(problem, some, others, link) <= link.capacity_nbytes for link in problem.links):
                yield World(problem, some, others)


def _stored(problem: Problem, state: Sequence[Link | None], weights: Sequence[Link | None], link: Link) -> int:
    nbytes = sum(chunk.state_nbytes for chunk, place in zip(problem.chunks, state, strict=True) if place is link)
    return nbytes + sum(segment.weight_nbytes for segment, place in zip(problem.segments, weights, strict=True) if place is link)


def fastest_sweep(problem: Problem) -> int | None:
    """Microseconds of the fastest sweep, None where no sweep fits."""
    best: int | None = None
    for world in _worlds(problem):
        for parts in partitions(list(range(len(problem.chunks)))):
            times = [world.fastest_step(part) for part in parts]
            us = sum(time for time in times if time is not None)
            if None not in times and (best is None or us < best):
                best = us
    return best
