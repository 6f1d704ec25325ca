"""One step assembled: active chunks and options in, a `Program` and the codes it calls out.

Walks the segments from the depth upwards to learn what must be computed and saved, then writes the instructions in the order
they run and gives every value its storage, so that `simulate` and the engine read the same list.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from chunkft_compile.codes import Code, Demand
from chunkft_compile.costs import Costs
from chunkft_compile.errors import CaptureError
from chunkft_compile.liveness import storages
from chunkft_compile.lowering import Lowering
from chunkft_compile.offloading import lowered_option
from chunkft_compile.planner.prefetching import overlap
from chunkft_compile.planner.problem import Link
from chunkft_compile.planner.problem import Update as When
from chunkft_compile.planner.program import Instruction, Op, Program
from chunkft_compile.segments import is_forward
from chunkft_compile.streaming import NO_STREAMS, Streams, with_weights
from chunkft_compile.updating import Update, with_updates

__all__ = ["Assembled", "Key", "Rows", "Update", "assemble", "gradient_key", "propagate"]

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


@dataclass(frozen=True, eq=False)
class Assembled:
    """A program, the codes that its instructions index, where its outside values come from, and gradients computed whole.

    `nodes` says for each value which node of the joint graph it is (rows of it, for a gradient slice), `streamed` which values are
    weights that live beside the device.
    """

    program: Program
    codes: tuple[Code, ...]
    bindings: dict[int, fx.Node]
    outputs: dict[fx.Node, int]
    dense: tuple[str, ...]
    nodes: dict[int, fx.Node]
    streamed: dict[int, str]


@dataclass
class Demands:
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
    costs: Costs,
    update: Update,
    accumulating: bool,
    link: Link | None = None,
    streams: Streams = NO_STREAMS,
    limit_nbytes: int = 0,
) -> Assembled:
    """The program that trains `chunks` with the given option for each segment.

    `link` gives the time of moving saved values, `streams` the weights that live beside the device. Copies are spread out in at most
    `limit_nbytes`.
    """
    lowered = [lowered_option(option) for option in options]
    demands = propagate(lowering, chunks, lowered)
    dense = dense_parameters(lowering, demands)
    writer = _Writer(lowering)
    writer.forwards(demands, lowered)
    writer.backwards(demands, {gradient_key(lowering, rows): chunk for chunk, rows in chunks.items()}, accumulating=accumulating)
    writer.offload([number for number, option in enumerate(options) if option != lowered[number]])
    writer.finish(costs, link)
    held = tuple(writer.held())
    streamed = writer.values_in(streams.names)
    params = {chunk: rows.param for chunk, rows in chunks.items()}
    updated = with_updates(writer.instructions, update, writer.memory_of(params))
    homes = streams.homes(params) if update.when is When.IMMEDIATE else {}
    program = Program(
        tuple(with_weights(updated, streams, streamed, homes)),
        base_nbytes,
        tuple(writer.storage_of),
        tuple(writer.storage_nbytes),
        held,
        {chunk: grad_nbytes[chunk] for chunk in chunks},
        {chunk: nbytes for chunk, nbytes in update.state_nbytes.items() if chunk in chunks},
        accumulating,
        update.when,
        streams.nbytes_of(streamed),
        homes,
        overlaps=link.overlaps if link else False,
    )
    program = overlap(program, limit_nbytes)
    outputs = {node: writer.ids[node, None] for node in _results(lowering)}
    nodes = {value: key[0] for key, value in writer.ids.items()}
    return Assembled(program, tuple(writer.codes), writer.bindings, outputs, dense, nodes, streamed)


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


def propagate(lowering: Lowering, chunks: Mapping[int, Rows], options: Sequence[str]) -> Demands:
    """From the gradients of the chunks to everything they need, segment by segment upwards."""
    found = Demands()
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


def dense_parameters(lowering: Lowering, demands: Demands) -> tuple[str, ...]:
    """Parameters for which some segment computes the gradient whole although only rows of it are wanted."""
    nodes = {keys[i][0] for code, keys, _ in demands.codes.values() for i in code.dense}
    return tuple(sorted({lowering.partials[node] for node in nodes if node in lowering.partials}))


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

    def forwards(self, demands: Demands, options: Sequence[str]) -> None:
        """All segments forward, keeping what the backwards of this step read."""
        for segment in self.lowering.segments:
            writes = self.lowering.exports(segment) | demands.forward.get(segment.number, set())
            if writes:
                code = self.lowering.forward(segment, writes, options[segment.number])
                reads: list[Key] = [(segment.at(read.position), None) for read in code.reads]
                self._call(Op.FORWARD, segment.number, code, reads, [(segment.nodes[i], None) for i in code.writes])

    def backwards(self, demands: Demands, gradients: Mapping[Key, int], *, accumulating: bool) -> None:
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

    def memory_of(self, params: Mapping[int, str]) -> dict[int, frozenset[int]]:
        """For each chunk, the values that lie in the memory of its parameter."""
        found = {}
        for chunk, param in params.items():
            nodes = [node for node, name in self.lowering.capture.params.items() if name == param]
            memory = {storage for node in nodes for storage in storages(node.meta["val"])}
            found[chunk] = frozenset(value for value, lies_in in self.bases.items() if memory & lies_in)
        return found

    def values_in(self, names: Mapping[str, int]) -> dict[int, str]:
        """Values that are these weights, as far as some call reads them. No result of a call lies in their memory: it would outlive it."""
        capture = self.lowering.capture
        name_of = {node: name for node, name in (*capture.params.items(), *capture.buffers.items()) if name in names}
        memory = {storage for node in name_of for storage in storages(node.meta["val"])}
        views = [value for value, lies_in in self.bases.items() if memory & lies_in and value not in self.bindings]
        assert not views, f"values {views} are views of weights that are not always on the device"
        return {value: name_of[node] for value, node in self.bindings.items() if node in name_of}

    def offload(self, numbers: Sequence[int]) -> None:
        """After the forward of each of these segments, what only its backward still reads goes to the store, until then."""
        for number in numbers:
            backward = next((i for i in self.instructions if i.op is Op.BACKWARD and i.segment == number), None)
            if backward is None:
                continue
            away = self.lowering.movable.of(self.lowering.segments[number])
            nodes = {value: key[0] for key, value in self.ids.items()}
            values = tuple(v for v in backward.reads if self._nbytes([v]) and away.issuperset(storages(nodes[v].meta["val"])))
            forward = max(i for i, made in enumerate(self.instructions) if made.op is Op.FORWARD and made.segment <= number)
            if values:
                self.instructions.insert(self.instructions.index(backward), Instruction(Op.FETCH, number, writes=values))
                moves = Instruction(Op.EVICT, number, reads=values), Instruction(Op.FREE, number, frees=values)
                self.instructions[forward + 1 : forward + 1] = moves

    def _nbytes(self, values: Sequence[int]) -> int:
        """Bytes that the step owns behind these values."""
        return sum(self.storage_nbytes[storage] for storage in {self.storage_of[value] for value in values} if storage >= 0)

    def finish(self, costs: Costs, link: Link | None) -> None:
        """Lifetimes: each value is freed by the last call that reads it, and each call learns which storages die in it."""
        costs.measure(code.graph for code in self.codes)
        last: dict[int, int] = {}
        for number, instruction in enumerate(self.instructions):
            for value in (*instruction.writes, *instruction.reads):
                last[value] = number
        evicted = {value for instruction in self.instructions if instruction.op is Op.EVICT for value in instruction.reads}
        freed = {value for instruction in self.instructions if instruction.op is Op.FREE for value in instruction.frees} - evicted
        kept = self.kept | set(self.held()) | freed | set(self.bindings)
        alive: dict[int, set[int]] = defaultdict(set)
        for number, old in enumerate(self.instructions):
            match old.op:
                case Op.FORWARD | Op.BACKWARD:
                    frees = tuple(v for v in dict.fromkeys((*old.reads, *old.writes)) if last[v] == number and v not in kept)
                    new = self._timed(old, frees, alive, costs)
                case Op.FETCH | Op.EVICT:
                    nbytes = self._nbytes((*old.reads, *old.writes))
                    us = (link.read_us(nbytes) if old.op is Op.FETCH else link.write_us(nbytes)) if link else 0
                    new = replace(old, us=us)
                case _:
                    new = old
            self.instructions[number] = new
            for value in new.writes:
                alive[self.storage_of[value]].add(value)
            for value in new.frees:
                alive[self.storage_of[value]].discard(value)

    def _timed(self, old: Instruction, frees: tuple[int, ...], alive: Mapping[int, set[int]], costs: Costs) -> Instruction:
        """A call with what it frees, the bytes it needs and the time it takes."""
        code = self.codes[old.code]
        groups = set()
        for value, group in zip(old.reads, code.footprint.inputs, strict=True):
            storage = self.storage_of[value]
            if storage >= 0 and alive[storage] <= set(frees):
                groups.add(group)
        transient = code.footprint.transient_nbytes(frozenset(groups), costs.temporary_nbytes)
        return replace(old, frees=frees, transient_nbytes=transient, us=costs.graph_us(code.graph))
