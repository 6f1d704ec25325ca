"""Everything compiled for one input signature: the planner's `Problem`, and the exact `Program` of any step."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx, nn

from chunkft_compile.assembly import Assembled, Rows, Update, assemble
from chunkft_compile.capture import Capture
from chunkft_compile.costs import Costs
from chunkft_compile.liveness import Footprint, storages
from chunkft_compile.lowering import Lowering
from chunkft_compile.offloading import lowered_option
from chunkft_compile.planner.problem import Chunk as SizedChunk
from chunkft_compile.planner.problem import Link, Placement, Places, Problem, Schedule, Step
from chunkft_compile.planner.problem import Update as When
from chunkft_compile.planner.program import Timeline, simulate
from chunkft_compile.planner.traces import Trace, trace_program
from chunkft_compile.probing import Probe, probe
from chunkft_compile.runtime.chunks import Chunk, rows_nbytes, storage_nbytes
from chunkft_compile.runtime.optimizers import OptimizerCost
from chunkft_compile.runtime.precision import Precision
from chunkft_compile.segments import Segment, cut
from chunkft_compile.streaming import Streams
from chunkft_compile.updating import lowest_readers
from chunkft_compile.weights import Weights


@dataclass(frozen=True)
class Setting:
    """What does not depend on the batch: chunks, the optimizer's costs, links to the stores, the budget, when to update, the device."""

    budget_nbytes: int
    chunks: tuple[Chunk, ...]
    optimizer: OptimizerCost
    links: tuple[Link, ...]
    updates: tuple[When, ...] = (When.HELD,)
    device: str = "cpu"
    precision: Precision = Precision.PLAIN

    def state_nbytes(self, number: int) -> int:
        """Optimizer state of a chunk that can leave the device."""
        return self.optimizer.of_layout[_layout(self.chunks[number])].state_nbytes

    def link(self, place: Placement) -> Link:
        """The way to a place beside the device."""
        return next(link for link in self.links if link.placement is place)

    def absent_nbytes(self, without_state: Iterable[int], resident: Sequence[int]) -> int:
        """Bytes that every program counts from its start, of the state that these chunks have yet to get."""
        costs = ((number, self.optimizer.of_layout[_layout(self.chunks[number])]) for number in without_state)
        return sum(cost.counter_nbytes + (cost.state_nbytes if number in resident else 0) for number, cost in costs)

    @property
    def counter_nbytes(self) -> int:
        """Optimizer state that stays: step counters of all chunks, and tables that they share."""
        return self.optimizer.table_nbytes + sum(self.optimizer.of_layout[_layout(chunk)].counter_nbytes for chunk in self.chunks)


class Compiled:
    """One captured signature. `fixed_nbytes` live throughout a step: see `fixed_nbytes()`. `inputs` describes the batch, leaf by leaf."""

    def __init__(
        self,
        capture: Capture,
        fixed_nbytes: int,
        costs: Costs,
        setting: Setting,
        inputs: tuple[str, ...] = (),
        lowering: Lowering | None = None,
    ) -> None:
        self.capture = capture
        self.inputs = inputs
        self.setting = setting
        self.base_nbytes = fixed_nbytes + setting.counter_nbytes
        self._fixed_nbytes = fixed_nbytes
        self._costs = costs
        self._lowering = Lowering(capture, cut(capture)) if lowering is None else lowering
        self._programs: dict[object, Assembled] = {}
        self._timelines: dict[Assembled, Timeline] = {}

    def under(self, setting: Setting) -> "Compiled":
        """The same signature with other chunks, and with the codes made so far: they are not bound to chunks."""
        return Compiled(self.capture, self._fixed_nbytes, self._costs, setting, self.inputs, self._lowering)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments of its joint graph."""
        return self._lowering.segments

    @property
    def codes(self) -> int:
        """How many codes were made for it."""
        return len(self._lowering.codes)

    def temporary_nbytes(self, node: fx.Node) -> int:
        """Bytes that an operator takes and gives back while it runs."""
        return self._costs.temporary_nbytes(node)

    def rows(self, number: int) -> Rows:
        """A chunk as assembly wants it."""
        chunk = self.setting.chunks[number]
        return Rows(chunk.param, chunk.start, chunk.stop, chunk.size)

    @cached_property
    def _probe(self) -> Probe:
        return probe(self._lowering, [self.rows(i) for i in range(len(self.setting.chunks))], self._costs)

    def problem(self, *, accumulating: bool, weights: tuple[Placement, ...] = (Placement.DEVICE,), overlaps: bool = True) -> Problem:
        """The planner's question for this signature, with weights at these places.

        Without `overlaps` it keeps no bytes free for copies beside calls, where the device could make them.
        """
        found, setting = self._probe, self.setting
        chunks = []
        for number, chunk in enumerate(setting.chunks):
            cost = setting.optimizer.of_layout[_layout(chunk)]
            sized = found.chunks[number]
            chunks.append(
                SizedChunk(
                    chunk.name,
                    sized.segment,
                    sized.first,
                    sized.grad_nbytes,
                    cost.state_nbytes,
                    setting.optimizer.alone_nbytes(_layout(chunk)),
                    sized.grad_us,
                    cost.us,
                    chunk.nbytes if sized.moving else 0,
                )
            )
        static = self.base_nbytes + found.shared_nbytes + _outputs_nbytes(self.capture)
        links = tuple(replace(link, overlaps=link.overlaps and overlaps) for link in setting.links)
        updates = (When.HELD,) if accumulating else setting.updates
        if When.IMMEDIATE in updates:
            static += self._late_nbytes(chunks)
        return Problem(
            setting.budget_nbytes, static, found.kinds, found.segments, tuple(chunks), accumulating, links, updates, weights=weights
        )

    def _late_nbytes(self, chunks: Sequence[SizedChunk]) -> int:
        """At most what IMMEDIATE updates hold that wait for a lower segment to read the weight; the planner knows no such wait."""
        readers = lowest_readers(self._lowering)
        late = [sized for chunk, sized in zip(self.setting.chunks, chunks, strict=True) if readers[chunk.param] < sized.segment]
        return sum(sized.grad_nbytes for sized in late) + max((sized.update_nbytes for sized in late), default=0)

    def offers(self, step: Step) -> bool:
        """Whether this signature has the segments and options of a step that was planned for another."""
        segments = self._lowering.segments
        return len(segments) == len(step.options) and all(map(self._lowering.has_option, segments, map(lowered_option, step.options)))

    def program(self, step: Step, places: Places, *, accumulating: bool) -> Assembled:
        """The exact program of a step."""
        key = (step.chunks, step.options, step.update, places, accumulating)
        if key not in self._programs:
            self._programs[key] = self._assemble(step, places, accumulating=accumulating)
        return self._programs[key]

    def timeline(self, step: Step, places: Places, *, accumulating: bool) -> Timeline:
        """The exact memory and time of a step."""
        assembled = self.program(step, places, accumulating=accumulating)
        if assembled not in self._timelines:
            self._timelines[assembled] = simulate(assembled.program)
        return self._timelines[assembled]

    def trace(self, problem: Problem, step: Step, places: Places) -> Trace:
        """What happens in a step, for reports; `problem` names the parts."""
        accumulating = problem.accumulating
        program = self.program(step, places, accumulating=accumulating).program
        return trace_program(problem, step, places, program, self.timeline(step, places, accumulating=accumulating))

    def exact(self, schedule: Schedule, *, accumulating: bool) -> Schedule:
        """`schedule` with the exact peak and time of every step in place of the planner's bound."""
        steps = []
        for step in schedule.steps:
            timeline = self.timeline(step, schedule.places, accumulating=accumulating)
            steps.append(replace(step, peak_nbytes=timeline.peak_nbytes, us=timeline.us))
        return replace(schedule, steps=tuple(steps))

    def plain_peak_nbytes(self) -> int:
        """Peak of plain training on the same graph: all gradients dense, all state of the same optimizer on the device."""
        graph = self.capture.graph
        self._costs.measure([graph])
        setting = self.setting
        layouts = layouts_of(setting.chunks)
        state = sum(setting.state_nbytes(i) for i in range(len(layouts)))
        gradients = sum(sum(storages(node.meta["val"]).values()) for node in set(self.capture.gradients.values()))
        backward = Footprint(graph).transient_nbytes(frozenset(), self._costs.temporary_nbytes)
        return self.base_nbytes + state + max(backward, gradients + setting.optimizer.transient_nbytes(layouts))

    def weight_places(self, places: Places) -> dict[str, Placement]:
        """Where each weight lives that one segment alone reads."""
        return {name: places.weights[segment] for name, segment in self._weights.segment_of.items()}

    @cached_property
    def _weights(self) -> Weights:
        return Weights(self._lowering)

    def _streams(self, places: Places, chunks: Sequence[int]) -> Streams:
        """The weights that are away, and what moving them takes."""
        away = {name: place for name, place in self.weight_places(places).items() if place is not Placement.DEVICE}
        names = {name: self._weights.segment_of[name] for name in away}
        nbytes = {name: self._weights.nbytes_of(name) for name in away}
        fetch_us = {name: self.setting.link(place).read_us(nbytes[name]) for name, place in away.items()}
        changed = [(number, self.setting.chunks[number]) for number in chunks if self.setting.chunks[number].param in away]
        evict_us = {number: self.setting.link(away[chunk.param]).write_us(chunk.nbytes) for number, chunk in changed}
        return Streams(names, nbytes, fetch_us, evict_us)

    def _assemble(self, step: Step, places: Places, *, accumulating: bool) -> Assembled:
        setting = self.setting
        streams = self._streams(places, step.chunks)
        moves = {number: self._move(number, places, streams, step.update) for number in step.chunks}
        groups = self._groups(step, {number: move.nbytes for number, move in moves.items()})
        layouts = [[_layout(setting.chunks[number]) for number in group] for group in groups]
        moving = {number: move for number, move in moves.items() if move.nbytes or not self._stays(number, places)}
        update = Update(
            groups,
            tuple(setting.optimizer.transient_nbytes(group) for group in layouts),
            {number: move.nbytes for number, move in moving.items()},
            {number: move.fetch_us for number, move in moving.items()},
            {number: move.evict_us for number, move in moving.items()},
            tuple(setting.optimizer.us(group) for group in layouts),
            step.update,
        )
        return assemble(
            self._lowering,
            {number: self.rows(number) for number in step.chunks},
            step.options,
            base_nbytes=self.base_nbytes + sum(map(setting.state_nbytes, places.resident)) - sum(streams.nbytes.values()),
            grad_nbytes={number: self._probe.chunks[number].grad_nbytes for number in step.chunks},
            costs=self._costs,
            update=update,
            accumulating=accumulating,
            link=setting.links[0],
            streams=streams,
            limit_nbytes=setting.budget_nbytes,
        )

    def _stays(self, number: int, places: Places) -> bool:
        return places.state[number] is Placement.DEVICE

    def _move(self, number: int, places: Places, streams: Streams, when: When) -> "_Move":
        """What comes and goes for the update of a chunk: state that is away, and its rows where they are and no segment brings them."""
        chunk, place = self.setting.chunks[number], places.state[number]
        nbytes = fetch_us = evict_us = 0
        if place is not Placement.DEVICE:
            nbytes, link = self.setting.state_nbytes(number), self.setting.link(place)
            fetch_us, evict_us = link.read_us(nbytes), link.write_us(nbytes)
        if number in streams.evict_us and when is When.HELD:
            nbytes += rows_nbytes(chunk, torch.device(self.setting.device))
            fetch_us += streams.fetch_us[chunk.param] * chunk.nbytes // max(1, streams.nbytes[chunk.param])
            evict_us += streams.evict_us[number]
        return _Move(nbytes, fetch_us, evict_us)

    def _groups(self, step: Step, moving: Mapping[int, int]) -> tuple[tuple[int, ...], ...]:
        """Chunks stepped together: as many as fit in the bytes that the largest one needs alone. `moving` are bytes that come with each.

        IMMEDIATE updates go segment by segment, from the highest down.
        """
        if step.update is When.HELD:
            return self._packed(step.chunks, moving)
        by_segment: dict[int, list[int]] = defaultdict(list)
        for number in step.chunks:
            by_segment[self._probe.chunks[number].segment].append(number)
        return tuple(group for segment in sorted(by_segment, reverse=True) for group in self._packed(by_segment[segment], moving))

    def _packed(self, numbers: Sequence[int], moving: Mapping[int, int]) -> tuple[tuple[int, ...], ...]:
        setting = self.setting

        def nbytes(group: Sequence[int]) -> int:
            return sum(moving[number] for number in group) + setting.optimizer.transient_nbytes(
                [_layout(setting.chunks[number]) for number in group]
            )

        window = max(nbytes([number]) for number in numbers)
        groups: list[list[int]] = [[]]
        for number in numbers:
            if groups[-1] and nbytes([*groups[-1], number]) > window:
                groups.append([])
            groups[-1].append(number)
        return tuple(tuple(group) for group in groups)


@dataclass(frozen=True)
class _Move:
    """Bytes that come and go for the update of one chunk, and the time each way."""

    nbytes: int
    fetch_us: int
    evict_us: int


def fixed_nbytes(model_nbytes: int, capture: Capture, batch: Sequence[torch.Tensor]) -> int:
    """Weights and buffers (`model_nbytes`), the batch, constants of the graph, and the gradients that arrive for the outputs."""
    return model_nbytes + storage_nbytes([*batch, *capture.constants.values()]) + _outputs_nbytes(capture)


def model_nbytes(model: nn.Module, device: torch.device | None = None) -> int:
    """Weights and buffers of a model, all on its device or on `device`."""
    return storage_nbytes([*model.parameters(), *model.buffers()], device)


def _layout(chunk: Chunk) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(chunk.leaf.shape), chunk.weight.dtype


def _outputs_nbytes(capture: Capture) -> int:
    """Model outputs and new buffer values: both are held through the whole step."""
    found: dict[int, int] = {}
    for node in (*capture.outputs, *capture.mutations.values()):
        if isinstance(node, fx.Node) and node.op == "call_function":
            found |= storages(node.meta["val"])
    return sum(found.values())


def layouts_of(chunks: Sequence[Chunk]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the weights of each chunk."""
    return [_layout(chunk) for chunk in chunks]
