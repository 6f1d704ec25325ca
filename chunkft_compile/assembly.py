"""One step assembled: active chunks and options in, a `Program` and the codes it calls out.

Walks the segments from the depth upwards to learn what must be computed and saved, then writes the instructions in the order
they run and gives every value its storage, so that `simulate` and the engine read the same list.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from chunkft_compile.costs import OperatorCosts
from chunkft_compile.errors import CaptureError
from chunkft_compile.liveness import storages
from chunkft_compile.lowering import Code, Demand, Lowering
from chunkft_compile.planner.problem import Update as When
from chunkft_compile.planner.program import Instruction, Op, Program
from chunkft_compile.segments import is_forward

Key = tuple[fx.Node, tuple[int, int] | None]
"""A value of a step: a node of the joint graph and, for a slice of a gradient, (start, length)."""


@dataclass(frozen=True)
class Rows:
    """Rows `[start, stop)` of parameter `param`, which has `size` of them."""

    param: str
    start: int
    stop: int
    size: int

    @property
    def demanded(self) -> tuple[int, int] | None:
        """(start, length), or None for all rows."""
        return None if self.stop - self.start == self.size else (self.start, self.stop - self.start)


@dataclass(frozen=True)
class Update:
    """How the optimizer goes through the chunks of a step: groups of chunks stepped together, with the bytes and time of each.

    `when` HELD, all groups come after the backward; IMMEDIATE, each one as soon as its gradients are complete.
    """

    groups: tuple[tuple[int, ...], ...]
    transient_nbytes: tuple[int, ...]
    resident: frozenset[int]
    state_nbytes: Mapping[int, int]
    us_of: Callable[[int], int]
    when: When = When.HELD


@dataclass(frozen=True, eq=False)
class Assembled:
    """A program, the codes that its instructions index, where its outside values come from, and gradients computed whole."""

    program: Program
    codes: tuple[Code, ...]
    bindings: dict[int, fx.Node]
    outputs: dict[fx.Node, int]
    dense: tuple[str, ...]


@dataclass
class _Demands:
    """What segments must compute in one step."""

    backward: dict[int, dict[Key, Demand]] = field(default_factory=lambda: defaultdict(dict))
    forward: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    codes: dict[int, tuple[Code, list[Key], list[Key]]] = field(default_factory=dict)


def assemble(
    lowering: Lowering,
    chunks: Mapping[int, Rows],
    options: Sequence[str],
    *,
    base_nbytes: int,
    grad_nbytes: Mapping[int, int],
    costs: OperatorCosts,
    update: Update,
    accumulating: bool,
) -> Assembled:
    """The program that trains `chunks` with the given option for each segment."""
    demands = propagate(lowering, chunks, options)
    dense = _dense(lowering, chunks, demands)
    writer = _Writer(lowering)
    writer.forwards(demands)
    writer.backwards(demands, {gradient_key(lowering, rows): chunk for chunk, rows in chunks.items()}, accumulating=accumulating)
    writer.finish(costs)
    held = tuple(writer.held())
    program = Program(
        tuple(writer.updated(update, chunks)),
        base_nbytes,
        tuple(writer.storage_of),
        tuple(writer.storage_nbytes),
        held,
        {chunk: grad_nbytes[chunk] for chunk in chunks},
        {chunk: update.state_nbytes[chunk] for chunk in chunks if chunk not in update.resident},
        accumulating,
        update.when,
    )
    outputs = {node: writer.ids[node, None] for node in _results(lowering)}
    return Assembled(program, tuple(writer.codes), writer.bindings, outputs, dense)


def _results(lowering: Lowering) -> list[fx.Node]:
    """What the calls compute for the caller: model outputs and new buffer values (an output may also be an input, unchanged)."""
    capture = lowering.capture
    nodes = [node for node in (*capture.outputs, *capture.mutations.values()) if isinstance(node, fx.Node)]
    return [node for node in nodes if node.op == "call_function"]


def gradient_key(lowering: Lowering, rows: Rows) -> Key:
    return lowering.capture.gradients[rows.param], rows.demanded


def _demand(lowering: Lowering, key: Key) -> tuple[int, Demand]:
    """The segment that computes a backward value, and the demand on it."""
    node, rows = key
    segment = lowering.owner.get(node)
    if segment is None:
        raise CaptureError(f"a gradient is the graph input {node.name} itself; way out: freeze that parameter (requires_grad_(False))")
    return segment, Demand(lowering.segments[segment].position[node], rows[1] if rows else None)


def propagate(lowering: Lowering, chunks: Mapping[int, Rows], options: Sequence[str]) -> _Demands:
    """From the gradients of the chunks to everything they need, segment by segment upwards."""
    found = _Demands()
    for rows in chunks.values():
        key = gradient_key(lowering, rows)
        owner, demand = _demand(lowering, key)
        found.backward[owner][key] = demand
    for segment in lowering.segments:
        wanted = found.backward.get(segment.number)
        if not wanted:
            continue
        keys = sorted(wanted, key=lambda key: (wanted[key].position, wanted[key].length or 0, key[1] or (0, 0)))
        code = lowering.backward(segment, [wanted[key] for key in keys], options[segment.number])
        reads: list[Key] = []
        for read in code.reads:
            node = segment.at(read.position)
            key = (node, keys[read.demand][1] if read.demand is not None else None)
            reads.append(key)
            if node.op == "call_function" and is_forward(node):
                owner = lowering.owner[node]
                found.forward[owner].add(lowering.segments[owner].position[node])
            elif node.op == "call_function":
                owner, demand = _demand(lowering, key)
                found.backward[owner][key] = demand
        found.codes[segment.number] = (code, keys, reads)
    return found


def _dense(lowering: Lowering, chunks: Mapping[int, Rows], demands: _Demands) -> tuple[str, ...]:
    """Parameters for which some segment computes the gradient whole although only rows of it are wanted."""
    nodes = {keys[i][0] for code, keys, _ in demands.codes.values() for i in code.dense}
    return tuple(sorted({lowering.partials[node] for node in nodes if node in lowering.partials}))


def lowest_readers(lowering: Lowering) -> dict[str, int]:
    """For every trained parameter, the lowest segment that reads its memory, be it through a view."""
    found: dict[int, int] = {}
    for node, owner in lowering.owner.items():
        for source in node.all_input_nodes:
            for storage in storages(source.meta.get("val")):
                found[storage] = min(owner, found.get(storage, owner))
    capture = lowering.capture
    readers: dict[str, int] = {}
    for node, name in capture.params.items():
        if name in capture.gradients:
            lowest = min(found.get(storage, len(lowering.segments)) for storage in storages(node.meta["val"]))
            readers[name] = min(lowest, readers.get(name, lowest))
    return readers


def _moves(update: Update, group: tuple[int, ...], transient_nbytes: int, gradients: tuple[tuple[int, int], ...]) -> list[Instruction]:
    """State in, optimizer, state out for one group; what stays on the device does not move. `gradients` are freed by the update."""
    moving = tuple(chunk for chunk in group if chunk not in update.resident)
    us = sum(update.us_of(chunk) for chunk in moving)
    frees = tuple(value for value, _ in gradients)
    step = Instruction(Op.UPDATE, frees=frees, gradients=gradients, chunks=group, transient_nbytes=transient_nbytes)
    if not moving:
        return [step]
    return [Instruction(Op.FETCH, chunks=moving, us=us // 2), step, Instruction(Op.EVICT, chunks=moving, us=us - us // 2)]


class _Writer:
    """Numbers values, storages and codes, and appends instructions; `finish` adds what only the whole list can tell."""

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        self.instructions: list[Instruction] = []
        self.codes: list[Code] = []
        self.ids: dict[Key, int] = {}
        self.storage_of: list[int] = []
        self.storage_nbytes: list[int] = []
        self.bindings: dict[int, fx.Node] = {}
        self.kept: set[int] = set()
        self.bases: dict[int, frozenset[int]] = {}  # value that owns no bytes of the step -> storages it lies in

    def held(self) -> list[int]:
        """Values that outlive the calls: model outputs and new buffer values."""
        return sorted({self.ids[node, None] for node in _results(self.lowering)})

    def forwards(self, demands: _Demands) -> None:
        """All segments forward, keeping what the backwards of this step read."""
        for segment in self.lowering.segments:
            writes = self.lowering.exports(segment) | demands.forward.get(segment.number, set())
            if writes:
                code = self.lowering.forward(segment, writes)
                reads: list[Key] = [(segment.at(read.position), None) for read in code.reads]
                self._call(Op.FORWARD, segment.number, code, reads, [(segment.nodes[i], None) for i in code.writes])

    def backwards(self, demands: _Demands, gradients: Mapping[Key, int], *, accumulating: bool) -> None:
        """From the head down to the depth of the step."""
        for number in sorted(demands.codes, reverse=True):
            code, keys, reads = demands.codes[number]
            starts = tuple(key[1][0] for key in keys if key[1] is not None)
            emitted = tuple((key, gradients[key]) for key in keys if key in gradients)
            self._call(Op.BACKWARD, number, code, reads, keys, starts, emitted)
            own = [self.ids[key] for key, _ in emitted]
            if accumulating and own:
                self.instructions.append(Instruction(Op.FREE, segment=number, frees=tuple(own)))
            else:
                self.kept.update(own)

    def _call(
        self,
        op: Op,
        segment: int,
        code: Code,
        reads: Sequence[Key],
        writes: Sequence[Key],
        starts: tuple[int, ...] = (),
        gradients: Sequence[tuple[Key, int]] = (),
    ) -> None:
        sources = tuple(self._value(key) for key in reads)
        made: dict[int, int] = {}
        results = []
        for key, (group, nbytes) in zip(writes, code.footprint.outputs, strict=True):
            if group >= 0:
                storage = self.storage_of[sources[code.footprint.inputs.index(group)]]
            elif group in made:
                storage = made[group]
            else:
                storage = made[group] = len(self.storage_nbytes)
                self.storage_nbytes.append(nbytes)
            self.ids[key] = len(self.storage_of)
            results.append(self.ids[key])
            self.storage_of.append(storage)
            if storage < 0:
                self.bases[self.ids[key]] = frozenset(storages(key[0].meta["val"]))
        if code not in self.codes:
            self.codes.append(code)
        pairs = tuple((self.ids[key], chunk) for key, chunk in gradients)
        number = self.codes.index(code)
        self.instructions.append(Instruction(op, segment, number, sources, tuple(results), (), starts, pairs))

    def _value(self, key: Key) -> int:
        """The number of a value; one that no call wrote comes from outside."""
        if key not in self.ids:
            assert key[0].op != "call_function", f"{key} is read before it is written"
            self.ids[key] = len(self.storage_of)
            self.storage_of.append(-1)
            self.bindings[self.ids[key]] = key[0]
            self.bases[self.ids[key]] = frozenset(storages(key[0].meta["val"]))
        return self.ids[key]

    def updated(self, update: Update, chunks: Mapping[int, Rows]) -> list[Instruction]:
        """The finished list with the updates in their places.

        An IMMEDIATE one comes when the gradients of its group are there and no later call reads the weights that it overwrites.
        """
        if update.when is When.HELD:
            moves = zip(update.groups, update.transient_nbytes, strict=True)
            return [*self.instructions, *(instruction for group, nbytes in moves for instruction in _moves(update, group, nbytes, ()))]
        value_of = {chunk: value for instruction in self.instructions for value, chunk in instruction.gradients}
        ready: dict[int, list[Instruction]] = defaultdict(list)
        for group, nbytes in zip(update.groups, update.transient_nbytes, strict=True):
            gradients = tuple((value_of[chunk], chunk) for chunk in group)
            place = max(self._last_call(value, chunks[chunk].param) for value, chunk in gradients)
            ready[place] += _moves(update, group, nbytes, gradients)
        return [out for number, instruction in enumerate(self.instructions) for out in (instruction, *ready[number])]

    def _last_call(self, gradient: int, param: str) -> int:
        """The number of the last call that writes this gradient or reads this parameter."""
        params = self.lowering.capture.params
        memory = {storage for node, name in params.items() if name == param for storage in storages(node.meta["val"])}

        def touches(instruction: Instruction) -> bool:
            return gradient in instruction.writes or any(memory & self.bases.get(value, frozenset()) for value in instruction.reads)

        return max(number for number, instruction in enumerate(self.instructions) if touches(instruction))

    def finish(self, costs: OperatorCosts) -> None:
        """Lifetimes: each value is freed by the last call that reads it, and each call learns which storages die in it."""
        costs.measure(code.module.graph for code in self.codes)
        last: dict[int, int] = {}
        for number, instruction in enumerate(self.instructions):
            for value in (*instruction.writes, *instruction.reads):
                last[value] = number
        free_elsewhere = {value for instruction in self.instructions for value in instruction.frees}
        kept = self.kept | set(self.held()) | free_elsewhere
        alive: dict[int, set[int]] = defaultdict(set)
        for number, old in enumerate(self.instructions):
            if old.op is Op.FREE:
                for value in old.frees:
                    alive[self.storage_of[value]].discard(value)
                continue
            code = self.codes[old.code]
            frees = tuple(
                v for v in dict.fromkeys((*old.reads, *old.writes)) if last[v] == number and v not in kept and v not in self.bindings
            )
            groups = set()
            for value, group in zip(old.reads, code.footprint.inputs, strict=True):
                storage = self.storage_of[value]
                if storage >= 0 and alive[storage] <= set(frees):
                    groups.add(group)
            transient = code.footprint.transient_nbytes(frozenset(groups), costs.temporary_nbytes)
            self.instructions[number] = Instruction(
                old.op,
                old.segment,
                old.code,
                old.reads,
                old.writes,
                frees,
                old.starts,
                old.gradients,
                (),
                transient,
                costs.graph_us(code.module.graph),
            )
            for value in old.writes:
                alive[self.storage_of[value]].add(value)
            for value in frees:
                alive[self.storage_of[value]].discard(value)
