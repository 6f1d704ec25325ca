"""The planner's tables from lowered code: what each role and option of each kind saves, needs and takes.

Each kind is lowered once per role and option with all its chunks demanded. Liveness of fewer demands is never larger, so these
are upper bounds for any step; gradient slices are left out of them and counted per chunk.

NOTE [two of equal chunks]
Chunks of one parameter that are equally long are computed behind each other, in the same way. All but the last leave what they read
to the next one, and the last may free it. So two of them take as many bytes beside their gradients as two hundred, and no more are lowered.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from chunkft_compile.assembly import Rows, gradient_key, propagate
from chunkft_compile.codes import SERVES, Code, Demand
from chunkft_compile.costs import Costs
from chunkft_compile.liveness import storages
from chunkft_compile.lowering import Lowering
from chunkft_compile.offloading import OFFLOAD, lowered_option
from chunkft_compile.planner.problem import Cost, Kind
from chunkft_compile.planner.problem import Segment as SizedSegment
from chunkft_compile.runtime.chunks import BLOCK_NBYTES
from chunkft_compile.segments import Segment, is_forward
from chunkft_compile.weights import Weights

_FEW = 2
"""How many of equal chunks are lowered, see NOTE [two of equal chunks]."""


@dataclass(frozen=True)
class ChunkCost:
    """Where the gradient of a chunk is made, what it costs, and whether its weights can move with those of its segment."""

    segment: int
    first: int
    grad_nbytes: int
    grad_us: int
    moving: bool


@dataclass(frozen=True)
class Probe:
    """The tables of one capture. `shared_nbytes` are values that several segments read, counted as always live."""

    kinds: tuple[Kind, ...]
    segments: tuple[SizedSegment, ...]
    chunks: tuple[ChunkCost, ...]
    shared_nbytes: int


@dataclass
class _Wanted:
    """Demands on one segment when everything is trained: from below, of its own chunks, and shares of tied weights."""

    passing: list[Demand] = field(default_factory=list)
    own: list[tuple[Demand, int]] = field(default_factory=list)
    partial: list[tuple[Demand, int]] = field(default_factory=list)

    @property
    def active(self) -> list[Demand]:
        """All of them, in the order of lowering; equal ones as in `slices`."""
        return _in_order([*self.passing, *self.slices])

    @property
    def slices(self) -> list[Demand]:
        """Demands that give (parts of) gradients. Of equal ones `_FEW`."""
        counts = Counter(demand for demand, _ in self.own + self.partial)
        return _in_order(demand for demand, count in counts.items() for _ in range(min(count, _FEW)))


def probe(lowering: Lowering, rows: Sequence[Rows], costs: Costs) -> Probe:
    """Lower every kind in every role and option, measure its operators, and tabulate."""
    wanted = _wanted(lowering, rows)
    base = _base(lowering)
    shared = _shared(lowering, base)
    weights = Weights(lowering)
    outside = base | set(shared)
    backwards = {(s.number, role, option): code for s in lowering.segments for role, option, code in _codes(lowering, s, wanted[s.number])}
    forwards = {key: _forward(lowering, lowering.segments[key[0]], code, key[2]) for key, code in backwards.items()}
    costs.measure(code.graph for code in {*backwards.values(), *forwards.values()})
    kinds: dict[Kind, int] = {}
    segments = []
    for s in lowering.segments:
        table: dict[str, list[Cost]] = defaultdict(list)
        for option in lowering.options(s):
            for role in ("frozen", "passing", "active", "last"):
                key = (s.number, role, option)
                if key in backwards:
                    table[role].append(_cost(s, wanted[s.number], option, backwards[key], forwards[key], outside, costs))
                    table[role] += _offloaded(table[role][-1], lowering, s, backwards[key], outside)
        kind = Kind(*(_pareto(table[role]) for role in ("frozen", "passing", "active", "last")))
        number = kinds.setdefault(kind, len(kinds))
        entry, arriving = _boundary(lowering, s, backwards[s.number, "active", "save"], shared)
        segments.append(SizedSegment(s.name, number, entry, arriving, weights.nbytes(s.number)))
    chunks = _chunk_costs(lowering, rows, wanted, backwards, costs, weights)
    return Probe(tuple(kinds), tuple(segments), chunks, sum(shared.values()))


def _wanted(lowering: Lowering, rows: Sequence[Rows]) -> list[_Wanted]:
    """Demands per segment with every chunk active, found by the same walk that assembles a step.

    Chunks of one parameter that are equally long make the same demands, so the first of them stands for all.
    """
    alike: dict[tuple[str, int | None], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        alike[row.param, row.demanded and row.demanded[1]].append(number)
    few = {number: rows[number] for numbers in alike.values() for number in numbers[:_FEW]}
    found = propagate(lowering, few, ["save"] * len(lowering.segments))
    gradients = {gradient_key(lowering, row) for row in few.values()}
    chunks_of = {gradient_key(lowering, rows[numbers[0]]): numbers for numbers in alike.values()}  # the first stands for all
    wanted = [_Wanted() for _ in lowering.segments]
    for segment, demands in found.backward.items():
        for key, demand in demands.items():
            if key in gradients:
                wanted[segment].own += [(demand, number) for number in chunks_of.get(key, ())]
            elif _is_share(lowering, key[0]):
                param = lowering.partials[key[0]]
                numbers = chunks_of.get((lowering.capture.gradients[param], key[1]), [])
                if key[1] is None and not numbers:  # rows need it whole: it is counted to the first of them
                    numbers = [next(n for n, row in enumerate(rows) if row.param == param)]
                wanted[segment].partial += [(demand, number) for number in numbers]
            else:
                wanted[segment].passing.append(demand)
    return wanted


def _codes(lowering: Lowering, segment: Segment, wanted: _Wanted) -> list[tuple[str, str, Code]]:
    """(role, option, backward code) of a segment. Without parameters, or with nothing below, roles fall together."""
    passing = _in_order(wanted.passing)
    roles = {"frozen": [], "passing": passing, "active": wanted.active, "last": wanted.slices or passing}
    found = []
    for role, demands in roles.items():
        options = lowering.options(segment) if demands else lowering.options(segment)[:1]
        found += [(role, option, lowering.backward(segment, demands, option)) for option in options]
    return found


def _in_order(demands: Iterable[Demand]) -> list[Demand]:
    """The order in which demands are lowered: that of the segment's nodes."""
    return sorted(demands, key=lambda demand: (demand.position, demand.length or 0))


def _forward(lowering: Lowering, segment: Segment, backward: Code, option: str) -> Code:
    """The forward that saves what `backward` reads of its own segment."""
    saved = {read.position for read in backward.reads if read.position >= 0 and is_forward(segment.nodes[read.position])}
    return lowering.forward(segment, lowering.exports(segment) | saved, option)


def _shared(lowering: Lowering, base: set[int]) -> dict[int, int]:
    """Storage -> bytes of values that do not just go to the neighbour: rotary tables, masks, skips over several segments."""
    found: dict[int, int] = {}
    for node, owner in lowering.owner.items():
        neighbour = owner + 1 if is_forward(node) else owner - 1
        readers = {lowering.owner[user] for user in node.users if user in lowering.owner} - {owner}
        whole = is_forward(node) or not _is_share(lowering, node)
        if readers - {neighbour} and whole:
            found |= storages(node.meta["val"])
    return {storage: nbytes for storage, nbytes in found.items() if storage not in base}


def _is_share(lowering: Lowering, node: fx.Node) -> bool:
    """Whether a backward value is a part of one parameter's gradient, which only ever crosses segments in slices."""
    name, value = lowering.partials.get(node), node.meta["val"]
    return name is not None and isinstance(value, torch.Tensor) and value.shape == lowering.capture.gradients[name].meta["val"].shape


def _boundary(lowering: Lowering, segment: Segment, code: Code, shared: Mapping[int, int]) -> tuple[int, int]:
    """Bytes that arrive from below before forward and from above before backward, shared values left out."""
    entry: dict[int, int] = {}
    arriving: dict[int, int] = {}
    for node in segment.externals:
        if node.op == "call_function" and is_forward(node) and any(is_forward(user) for user in node.users if user in segment.position):
            entry |= storages(node.meta["val"])
    for read in code.reads:
        node = segment.at(read.position)
        if node.op == "call_function" and not is_forward(node) and not _is_share(lowering, node):
            arriving |= storages(node.meta["val"])
    return (
        sum(nbytes for storage, nbytes in entry.items() if storage not in shared),
        sum(nbytes for storage, nbytes in arriving.items() if storage not in shared),
    )


def _cost(segment: Segment, wanted: _Wanted, option: str, backward: Code, forward: Code, outside: set[int], costs: Costs) -> Cost:
    """`outside` are storages that live whatever the segment does: weights, inputs, values shared by several segments."""
    saved, groups = _saved(segment, backward, outside)
    slices = frozenset(i for i, demand in enumerate(backward.demands) if demand in set(wanted.slices))
    # A tied weight's share from above is counted as its gradient; where the shares are added, the sum is there beside it.
    tied = {backward.demands[read.demand] for read in backward.reads if read.demand is not None}
    sums = max((_nbytes(segment, demand) for demand in tied), default=0)
    peak = backward.footprint.transient_nbytes(groups, costs.temporary_nbytes, gradients=slices) if backward.demands else 0
    own_us = sum(costs.us(node) for node in backward.graph.nodes if node.meta.get(SERVES) is not None)
    return Cost(
        option,
        sum(saved.values()),
        forward.footprint.transient_nbytes(frozenset(), costs.temporary_nbytes),
        peak + (sums if slices else 0),
        costs.graph_us(forward.graph),
        costs.graph_us(backward.graph) - own_us,
    )


def _offloaded(cost: Cost, lowering: Lowering, segment: Segment, backward: Code, outside: set[int]) -> list[Cost]:
    """The cost of "inputs" with what can wait in the store, where there is any."""
    if cost.option != lowered_option(OFFLOAD):
        return []
    saved, _ = _saved(segment, backward, outside)
    away = lowering.movable.of(segment)
    moved = sum(nbytes for storage, nbytes in saved.items() if storage in away)
    return [replace(cost, option=OFFLOAD, saved_nbytes=cost.saved_nbytes - moved, offloaded_nbytes=moved)] if moved else []


def _base(lowering: Lowering) -> set[int]:
    """Storages of weights, buffers, inputs and constants."""
    capture = lowering.capture
    nodes = [*capture.params, *capture.buffers, *capture.inputs, *capture.tangents, *capture.constants]
    return {storage for node in nodes for storage in storages(node.meta.get("val"))}


def _saved(segment: Segment, backward: Code, outside: set[int]) -> tuple[dict[int, int], frozenset[int]]:
    """Storages this backward keeps alive from the forward on, and its argument groups that die in it."""
    saved: dict[int, int] = {}
    groups = set()
    for read, group in zip(backward.reads, backward.footprint.inputs, strict=True):
        node = segment.at(read.position)
        if node.op != "call_function":
            continue
        own = {storage: nbytes for storage, nbytes in storages(node.meta["val"]).items() if storage not in outside}
        if is_forward(node):
            saved |= own
        if own and read.demand is None:
            groups.add(group)
    return saved, frozenset(groups)


def _nbytes(segment: Segment, demand: Demand) -> int:
    value = segment.at(demand.position).meta["val"]
    nbytes = int(value.numel() * value.element_size())
    return BLOCK_NBYTES + (nbytes if demand.length is None else nbytes // value.shape[0] * (demand.length + 1))


def _pareto(options: Sequence[Cost]) -> tuple[Cost, ...]:
    """Options that no other beats in everything."""

    def figures(cost: Cost) -> tuple[int, ...]:
        us = cost.forward_us + cost.backward_us
        return cost.saved_nbytes, cost.forward_peak_nbytes, cost.backward_peak_nbytes + cost.offloaded_nbytes, us, cost.offloaded_nbytes

    kept: list[Cost] = []
    for cost in options:
        if not any(all(a <= b for a, b in zip(figures(other), figures(cost), strict=True)) for other in kept):
            kept.append(cost)
    return tuple(kept)


def _chunk_costs(
    lowering: Lowering,
    rows: Sequence[Rows],
    wanted: Sequence[_Wanted],
    backwards: Mapping[tuple[int, str, str], Code],
    costs: Costs,
    weights: Weights,
) -> tuple[ChunkCost, ...]:
    segment_of = {number: s for s, w in enumerate(wanted) for _, number in w.own}
    first_of = {number: s for s, w in enumerate(wanted) for _, number in w.partial}
    us: dict[int, int] = defaultdict(int)
    nbytes: dict[int, int] = {}
    for s, w in enumerate(wanted):
        code = backwards[s, "active", "save"]
        demand_us = _demand_us(code, costs)
        for demand, number in w.own + w.partial:
            i = code.demands.index(demand)
            us[number] += demand_us[i] if demand.length is not None else demand_us[i] + demand_us[rows[number].param]
            group, made = code.footprint.outputs[i]
            assert group < 0, f"the gradient of {rows[number].param} lies in an argument's storage"
            nbytes[number] = max(nbytes.get(number, 0), made)
    moving = [weights.segment_of.get(row.param) is not None for row in rows]
    return tuple(ChunkCost(segment_of[n], max(first_of.get(n, 0), segment_of[n]), nbytes[n], us[n], moving[n]) for n in range(len(rows)))


def _demand_us(code: Code, costs: Costs) -> dict[int | str, int]:
    """Time of the nodes that serve one demand (by index) or one whole gradient (by parameter) only."""
    found: dict[int | str, int] = defaultdict(int)
    for node in code.graph.nodes:
        serves = node.meta.get(SERVES)
        if serves is not None:
            found[serves] += costs.us(node)
    return found
