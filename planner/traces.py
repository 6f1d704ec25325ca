"""What happens in one step, byte by byte and instruction by instruction, as reports show it.

A trace is a list of instants and a list of lifetimes: which bytes are there from which instant to which. Those of a program are exact,
those of a step that was never lowered are the planner's bound. The lifetimes and the workspace of an instant add up to its peak.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from chunkft_compile.planner.bounds import Load, arriving_below, costs_of, depth_of, loads, roles_of
from chunkft_compile.planner.grounds import NO_TRANSFER, Ground, Transfer, link_to, offload, settle
from chunkft_compile.planner.problem import Places, Problem, Role, Step, Update
from chunkft_compile.planner.program import Instruction, Op, Program, Timeline, Values
from chunkft_compile.planner.times import work_of


class Category(StrEnum):
    """What bytes are, in the order in which reports stack them."""

    WEIGHTS = "weights"  # with buffers, the batch and step counters: there at every instant
    STATE = "optimizer state"
    GRADIENTS = "gradients"
    SAVED = "saved values"  # with what segments pass to each other
    STAGING = "staging"  # weights that come from the store for a while
    WORKSPACE = "workspace"  # what an instruction takes on top while it runs, its own results included


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Bytes that are there during the instants `first` to `last`, both included."""

    name: str
    category: Category
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Instant:
    """One instruction: `us` until the next one begins, of which `waited_us` are spent on copies, and its peak."""

    op: Op
    name: str
    us: int
    waited_us: int
    peak_nbytes: int


@dataclass(frozen=True, slots=True)
class Trace:
    """One step. `moving_us` is the time of all its copies, waited for or not; `recompute_us` that of what backwards compute again."""

    instants: tuple[Instant, ...]
    lifetimes: tuple[Lifetime, ...]
    moving_us: int
    recompute_us: int

    @property
    def peak_nbytes(self) -> int:
        """The most bytes at any instant."""
        return max(instant.peak_nbytes for instant in self.instants)

    @property
    def binding(self) -> int:
        """The number of the instant at the peak."""
        return max(range(len(self.instants)), key=lambda number: self.instants[number].peak_nbytes)

    def live_at(self, number: int) -> list[Lifetime]:
        """What is there at an instant, the largest first, its workspace included."""
        there = [lifetime for lifetime in self.lifetimes if lifetime.first <= number <= lifetime.last]
        instant = self.instants[number]
        own = instant.peak_nbytes - sum(lifetime.nbytes for lifetime in there)
        assert own >= 0, f"lifetimes at {instant.name} are {-own} bytes above its peak"
        workspace = [Lifetime(f"workspace of {instant.name}", Category.WORKSPACE, own, number, number)] if own else []
        return sorted([*there, *workspace], key=lambda lifetime: -lifetime.nbytes)

    def stacks(self) -> dict[Category, list[int]]:
        """Bytes of each category at every instant; they add up to the peaks."""
        changes = {category: [0] * (len(self.instants) + 1) for category in Category}
        for lifetime in self.lifetimes:
            changes[lifetime.category][lifetime.first] += lifetime.nbytes
            changes[lifetime.category][lifetime.last + 1] -= lifetime.nbytes
        found: dict[Category, list[int]] = {}
        for category, change in changes.items():
            live, found[category] = 0, []
            for nbytes in change[:-1]:
                live += nbytes
                found[category].append(live)
        for number, instant in enumerate(self.instants):
            found[Category.WORKSPACE][number] = instant.peak_nbytes - sum(stack[number] for stack in found.values())
        return found

    def time_split(self) -> dict[str, int]:
        """Microseconds of the step by what it does, and, beside them, those of copies that compute hides."""
        by_op = {op: sum(instant.us - instant.waited_us for instant in self.instants if instant.op is op) for op in Op}
        waited = sum(instant.waited_us for instant in self.instants)
        return {
            "forward": by_op[Op.FORWARD],
            "recompute": self.recompute_us,
            "backward": by_op[Op.BACKWARD] - self.recompute_us,
            "update": by_op[Op.UPDATE],
            "exposed transfers": waited,
            "hidden transfers": max(0, self.moving_us - waited),
        }


def recompute_us(problem: Problem, step: Step) -> int:
    """Microseconds that the backwards of a step take longer than with the option that computes least again.

    An option that the problem does not know, since another beats it by the times measured here, counts as one that computes nothing again.
    """
    total = 0
    for s, (role, option) in enumerate(zip(roles_of(problem, step.chunks), step.options, strict=True)):
        by_name = {cost.option: cost.backward_us for cost in problem.costs(s, role)}
        if role is not Role.FROZEN and option in by_name:
            total += by_name[option] - min(by_name.values())
    return total


def trace_program(problem: Problem, step: Step, places: Places, program: Program, timeline: Timeline) -> Trace:
    """The exact trace of a lowered step. `timeline` is what `simulate` says of `program`."""
    recorder = _Recorder(problem, program, sum(problem.chunks[index].state_nbytes for index in places.resident))
    for number, instruction in enumerate(program.instructions):
        recorder.run(number, instruction)
    instants = [
        Instant(moment.op, title_of(problem, instruction), moment.us, moment.waited_us, moment.peak_nbytes)
        for moment, instruction in zip(timeline.moments, program.instructions, strict=True)
    ]
    recompute = min(recompute_us(problem, step), sum(instant.us for instant in instants if instant.op is Op.BACKWARD))
    trace = Trace(tuple(instants), recorder.lifetimes(), timeline.moving_us, recompute)
    for number, (workspace, moment) in enumerate(zip(trace.stacks()[Category.WORKSPACE], timeline.moments, strict=True)):
        expected = moment.peak_nbytes - (moment.after_nbytes if moment.op is Op.FETCH else moment.before_nbytes)
        assert workspace == expected, f"instruction {number} has {workspace - expected} bytes too few in lifetimes"
    return trace


class _Recorder:
    """Follows the bytes of a program as `simulate` does, and notes when which come and go."""

    def __init__(self, problem: Problem, program: Program, resident_nbytes: int) -> None:
        self._problem, self._program = problem, program
        self._values = Values(program)
        self._gradients = {value: chunk for step in program.instructions for value, chunk in step.gradients}
        self._open: dict[object, tuple[str, Category, int, int]] = {}
        self._closed: dict[tuple[str, Category, int, int], int] = {}
        self._start("weights", "weights, buffers and batch", Category.WEIGHTS, program.base_nbytes - resident_nbytes, 0)
        self._start("resident", "optimizer state that stays", Category.STATE, resident_nbytes, 0)
        for chunk, nbytes in program.grad_nbytes.items() if program.accumulating else ():
            name = f"gradient of {problem.chunks[chunk].name}, earlier micro-batches"
            self._start(("accumulated", chunk), name, Category.GRADIENTS, nbytes, 0)

    def run(self, number: int, instruction: Instruction) -> None:
        """One instruction. What a call writes is in its workspace while it runs, and there from the next one on."""
        fetching = instruction.op is Op.FETCH
        if instruction.op in (Op.FORWARD, Op.BACKWARD) or fetching:
            come = self._values.fetch if fetching and not instruction.weights else self._values.write
            for value in instruction.writes:
                if nbytes := come(value):
                    storage = self._program.storage_of[value]
                    self._start(storage, *self._named(value, instruction), nbytes, number if fetching else number + 1)
        for value in instruction.frees:
            if self._values.free(value):
                self._stop(self._program.storage_of[value], number)
        if instruction.op is Op.EVICT:
            for value in instruction.reads:
                self._values.evict(value)
        for what, index in sorted(name for name in instruction.moved if name[0] != "value"):
            if fetching:
                self._start((what, index), *self._moved(what, index), self._program.nbytes_of([(what, index)]), number)
            elif instruction.op is Op.FREE:
                self._stop((what, index), number)

    def lifetimes(self) -> tuple[Lifetime, ...]:
        """Those of the whole step; what is still there stays to its end."""
        for key in list(self._open):
            self._stop(key, len(self._program.instructions) - 1)
        found = [Lifetime(name, category, nbytes, first, last) for (name, category, first, last), nbytes in self._closed.items()]
        return tuple(sorted(found, key=lambda lifetime: (lifetime.first, lifetime.last, lifetime.category, lifetime.name)))

    def _start(self, key: object, name: str, category: Category, nbytes: int, first: int) -> None:
        self._open[key] = (name, category, nbytes, first)

    def _stop(self, key: object, last: int) -> None:
        """Those of one name that come and go together are one."""
        name, category, nbytes, first = self._open.pop(key)
        if nbytes and first <= last:
            whole = (name, category, first, last)
            self._closed[whole] = self._closed.get(whole, 0) + nbytes

    def _named(self, value: int, instruction: Instruction) -> tuple[str, Category]:
        if value in self._gradients:
            return f"gradient of {self._problem.chunks[self._gradients[value]].name}", Category.GRADIENTS
        what = "values of forward" if instruction.op is Op.FORWARD else "passed down by"
        if instruction.segment < 0:
            return "values from the store", Category.SAVED
        return f"{what} {self._problem.segments[instruction.segment].name}", Category.SAVED

    def _moved(self, what: str, index: int) -> tuple[str, Category]:
        if what == "state":
            return f"optimizer state of {self._problem.chunks[index].name}", Category.STATE
        return f"weights of {self._problem.segments[index].name}", Category.STAGING


def title_of(problem: Problem, instruction: Instruction) -> str:
    """`backward block 3`, `update 4 chunks`, `fetch weights of block 2`."""
    if instruction.op in (Op.FORWARD, Op.BACKWARD):
        return f"{instruction.op} {problem.segments[instruction.segment].name}"
    parts = []
    if instruction.chunks:
        state = "" if instruction.op is Op.UPDATE else "state of "
        count = len(instruction.chunks)
        parts.append(f"{state}{problem.chunks[instruction.chunks[0]].name}" if count == 1 else f"{state}{count} chunks")
    if instruction.weights:
        parts.append("weights of " + ", ".join(problem.segments[index].name for index in instruction.weights))
    if not parts:
        parts.append("values")
    return f"{instruction.op} {' and '.join(parts)}"


def trace_bound(problem: Problem, step: Step, places: Places) -> Trace:
    """The trace of a step that was never lowered: the moments of NOTE [memory of a step], the times of NOTE [time of a step]."""
    ground = settle(problem, places)
    moments = loads(ground, step.chunks, step.options, step.update)
    at = {load.name: number for number, load in enumerate(moments)}
    copies, inside = _copies(ground, step), _updates_inside(problem, step)
    instants = []
    for load in moments:
        compute_us, transfer = copies.get(load.name, (0, NO_TRANSFER))
        us = transfer.with_compute(compute_us)
        own_us = inside[load.name] if load.name in inside else us - inside.get(load.name.replace("backward ", "update in ", 1), 0)
        instants.append(Instant(Op(load.name.split()[0]), load.name, own_us, us - compute_us, load.nbytes))
    moving = sum(transfer.hidden_us + transfer.exposed_us for _, transfer in copies.values())
    lifetimes = tuple(lifetime for lifetime in _lifetimes(ground, step, moments, at) if lifetime.nbytes)
    return Trace(tuple(instants), lifetimes, moving, recompute_us(problem, step))


def _copies(ground: Ground, step: Step) -> dict[str, tuple[int, Transfer]]:
    """Compute and copies of every moment that has some. Those of IMMEDIATE updates are with the backward before them."""
    problem, work = ground.problem, work_of(ground, step.chunks, step.update)
    depth, found = depth_of(problem, step.chunks), dict[str, tuple[int, Transfer]]()
    for s, (segment, cost) in enumerate(zip(problem.segments, costs_of(problem, step.chunks, step.options), strict=True)):
        out, back = offload(problem, cost.offloaded_nbytes)
        found[f"forward {segment.name}"] = cost.forward_us, ground.fetch[s] + out
        if s >= depth:
            found[f"backward {segment.name}"] = cost.backward_us + work.compute_us[s], ground.fetch[s] + back + work.transfers[s]
    if step.update is Update.HELD:
        found["update"] = work.update_us, work.update_moves
    return found


def _updates_inside(problem: Problem, step: Step) -> dict[str, int]:
    """The compute of IMMEDIATE updates, which the notes count with the backward of their segment, by the names of their moments."""
    found: dict[str, int] = {}
    for index in step.chunks if step.update is Update.IMMEDIATE else ():
        name = f"update in {problem.segments[problem.chunks[index].segment].name}"
        found[name] = found.get(name, 0) + problem.chunks[index].update_us
    return found


def _lifetimes(ground: Ground, step: Step, moments: Sequence[Load], at: dict[str, int]) -> Iterator[Lifetime]:
    problem, last = ground.problem, len(moments) - 1
    resident = sum(problem.chunks[index].state_nbytes for index in ground.places.resident)
    moving = sum(s.weight_nbytes for s, place in zip(problem.segments, ground.places.weights, strict=True) if link_to(problem, place))
    still = problem.static_nbytes - moving
    yield Lifetime("weights, buffers and batch", Category.WEIGHTS, still, 0, last)
    yield Lifetime("optimizer state that stays", Category.STATE, resident, 0, last)
    yield Lifetime("weights that come and go", Category.STAGING, ground.base_nbytes - still - resident, 0, last)
    yield from _value_lifetimes(problem, step, at, last - 1 if step.update is Update.HELD else last)
    yield from _gradient_lifetimes(problem, step, at, last)
    yield from _state_lifetimes(ground, step, at)


def _value_lifetimes(problem: Problem, step: Step, at: dict[str, int], ends: int) -> Iterator[Lifetime]:
    """`ends` is the last instant of the backward."""
    depth = depth_of(problem, step.chunks)
    for s, (segment, cost) in enumerate(zip(problem.segments, costs_of(problem, step.chunks, step.options), strict=True)):
        forward = at[f"forward {segment.name}"]
        yield Lifetime(f"enters {segment.name}", Category.SAVED, segment.entry_nbytes, forward, forward)
        if s < depth:
            yield Lifetime(f"saved by {segment.name}", Category.SAVED, cost.saved_nbytes, forward + 1, ends)
            continue
        backward = at[f"backward {segment.name}"]
        yield Lifetime(f"saved by {segment.name}", Category.SAVED, cost.saved_nbytes, forward + 1, backward)
        yield Lifetime(f"arrives at {segment.name}", Category.SAVED, segment.arriving_nbytes, backward, backward)
        yield Lifetime(f"offloaded by {segment.name}", Category.SAVED, cost.offloaded_nbytes, backward, backward)
        update = at.get(f"update in {segment.name}")
        if update is not None:
            below = arriving_below(problem, s, depth)
            yield Lifetime(f"passed down by {segment.name}", Category.SAVED, below, update, update)


def _gradient_lifetimes(problem: Problem, step: Step, at: dict[str, int], last: int) -> Iterator[Lifetime]:
    for index in step.chunks:
        chunk = problem.chunks[index]
        first, final = (at[f"backward {problem.segments[s].name}"] for s in (chunk.first, chunk.segment))
        if problem.accumulating:
            yield Lifetime(f"gradient of {chunk.name}, earlier micro-batches", Category.GRADIENTS, chunk.grad_nbytes, 0, last)
        else:
            final = last if step.update is Update.HELD else at[f"update in {problem.segments[chunk.segment].name}"]
        yield Lifetime(f"gradient of {chunk.name}", Category.GRADIENTS, chunk.grad_nbytes, first, final)


def _state_lifetimes(ground: Ground, step: Step, at: dict[str, int]) -> Iterator[Lifetime]:
    """The state of the largest update of each moment; what else it takes is workspace."""
    problem = ground.problem
    groups: dict[str, list[int]] = {}
    for index in step.chunks:
        inside = f"update in {problem.segments[problem.chunks[index].segment].name}"
        groups.setdefault("update" if step.update is Update.HELD else inside, []).append(index)
    for name, indices in groups.items():
        index = max(indices, key=lambda index: ground.update_nbytes[index])
        chunk, link = problem.chunks[index], link_to(problem, ground.places.state[index])
        if link is not None:
            nbytes = chunk.piece_state_nbytes * (2 if link.overlaps else 1)
            yield Lifetime(f"optimizer state of {chunk.name}", Category.STATE, nbytes, at[name], at[name])
