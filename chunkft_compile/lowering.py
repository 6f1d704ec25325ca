"""Segments made callable: for each kind and demand one forward and one backward that compute nothing else.

A step *demands* gradient slices of some segments. Each backward, lowered for its demands, reads values of the forward (they
become *saved*) and of later segments' backwards (they become demands there). So dX appears only where something below needs
it, and nothing is computed or kept for segments below the depth of the step.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

# Private (2.13.0): generates `forward(self, args)` that empties the list it is given, so that arguments die at their last use.
from torch.fx.graph import _BoxedCodeGen

from chunkft_compile.capture import Capture
from chunkft_compile.liveness import Footprint
from chunkft_compile.offloading import Movable
from chunkft_compile.segments import Segment, is_forward
from chunkft_compile.slicing import Rows, Slicer
from chunkft_compile.tiles import Tiles, Wanted
from chunkft_compile.tiling import Region, UntiledError, find_region

aten = torch.ops.aten
logger = logging.getLogger(__name__)

OPTIONS = ("save", "cheap", "inputs")
"""What a segment keeps for its backward: everything; the results of heavy operators; only what comes in from outside.

`Lowering.options` adds "tiled N" for a segment that ends in a cross entropy: N token tiles in forward and backward, beside them "cheap".
"""

_TILED = "tiled "

_HEAVY = {"mm", "bmm", "addmm", "baddbmm", "convolution", "_grouped_mm", "_scaled_mm", "embedding"}


SERVES = "chunkft_serves"
"""Key in the meta of a lowered backward node: the index of the only demand it serves, or the parameter if that is demanded whole."""


@dataclass(frozen=True, order=True)
class Demand:
    """A backward value of a segment, by position: all of it, or `length` rows from a start given at run time."""

    position: int
    length: int | None = None


@dataclass(frozen=True)
class Read:
    """An argument of a code: the value at `position` of the segment; `demand` is the index of the demand whose rows it is cut to."""

    position: int
    demand: int | None = None


@dataclass(frozen=True, eq=False)
class Code:
    """A callable shared by all segments of a kind.

    `module(args)` takes a list: the tensors of `reads`, then one integer start for every demand with a length. It empties the
    list. It returns one tensor for every entry of `writes` (forward) or of the demands (backward). `dense` are the demands whose
    gradient had to be computed whole.
    """

    module: fx.GraphModule
    reads: tuple[Read, ...]
    writes: tuple[int, ...]
    demands: tuple[Demand, ...]
    dense: tuple[int, ...]

    @cached_property
    def call(self) -> Callable[[list[Any]], tuple[Any, ...]]:
        """The generated function."""
        call: Callable[[list[Any]], tuple[Any, ...]] = self.module.forward
        return call

    @cached_property
    def footprint(self) -> Footprint:
        """Its memory, from the fake values of its graph."""
        return Footprint(self.module.graph)


class Lowering:
    """Codes of one capture, made when first asked for and shared by kind."""

    def __init__(self, capture: Capture, segments: Sequence[Segment]) -> None:
        self.capture = capture
        self.segments = tuple(segments)
        self.owner = {node: segment.number for segment in segments for node in segment.nodes}
        self.partials = _partial_gradients(capture)
        self._codes: dict[object, Code] = {}
        self._regions: dict[int, Region | str] = {}

    def options(self, segment: Segment) -> tuple[str, ...]:
        """The options that `segment` has: `OPTIONS`, and tiled ones where its loss can be computed in token tiles."""
        region = self._region(segment)
        return OPTIONS if isinstance(region, str) else (*OPTIONS, *(f"{_TILED}{count}" for count in region.counts))

    def untiled(self, segment: Segment) -> str | None:
        """Why `segment` has no tiled option; None if it can be tiled."""
        region = self._region(segment)
        return region if isinstance(region, str) else None

    def _region(self, segment: Segment) -> Region | str:
        if segment.number not in self._regions:
            try:
                self._regions[segment.number] = find_region(segment)
            except UntiledError as error:
                self._regions[segment.number] = str(error)
                logger.debug("%s is not tiled: %s", segment.name, error)
        return self._regions[segment.number]

    def has_option(self, segment: Segment, option: str) -> bool:
        """Whether `segment` can be lowered for `option`, offered by `options` or not."""
        return option in OPTIONS or self.untiled(segment) is None

    def tiling(self, segment: Segment, option: str) -> tuple[Region | None, int]:
        """The region that `option` computes in tiles, and in how many; None for an option without tiles. Raises ValueError."""
        if option in OPTIONS:
            return None, 0
        region, count = self._region(segment), option.removeprefix(_TILED)
        if not option.startswith(_TILED) or not count.isdecimal() or int(count) < 1:
            raise ValueError(f"unknown option {option!r}: there are {', '.join(OPTIONS)} and '{_TILED}N'")
        if isinstance(region, str):
            raise ValueError(f"{segment.name} has no option {option!r}: {region}; way out: one of {', '.join(OPTIONS)}")
        return region, int(count)

    def backward(self, segment: Segment, demands: Sequence[Demand], option: str) -> Code:
        """The backward of `segment` that gives exactly `demands`, recomputing what `option` did not save."""
        key = (segment.kind, "backward", tuple(demands), option)
        if key not in self._codes:
            self._codes[key] = _Backward(self, segment, tuple(demands), option).lower()
        return self._codes[key]

    def forward(self, segment: Segment, writes: Iterable[int], option: str = OPTIONS[0]) -> Code:
        """The forward of `segment` that gives the values at positions `writes`. Only tiled options compute it in another way."""
        wanted = tuple(sorted(set(writes)))
        region, count = self.tiling(segment, option)
        key = (segment.kind, "forward", wanted, count)
        if key not in self._codes:
            self._codes[key] = _lower_forward(self.capture, segment, wanted, region, count)
        return self._codes[key]

    @cached_property
    def movable(self) -> Movable:
        """What segments can leave in the store between their forward and their backward."""
        return Movable(self.capture, self.owner)

    @property
    def codes(self) -> tuple[Code, ...]:
        """All codes made so far."""
        return tuple(self._codes.values())

    def exports(self, segment: Segment) -> frozenset[int]:
        """Positions of forward values that later forwards read or that the model returns."""

        def leaves(node: fx.Node) -> bool:
            return any(
                user.op != "output" and is_forward(user) and self.owner.get(user, segment.number) != segment.number for user in node.users
            )

        kept = {node for node in self.capture.outputs if isinstance(node, fx.Node)} | set(self.capture.mutations.values())
        return frozenset(i for i, node in enumerate(segment.nodes) if is_forward(node) and (node in kept or leaves(node)))


def _partial_gradients(capture: Capture) -> dict[fx.Node, str]:
    """Backward nodes that lead to the gradient of one parameter only, with that parameter."""
    reached: dict[fx.Node, set[str]] = {}
    for name, node in capture.gradients.items():
        reached.setdefault(node, set()).add(name)
    for node in reversed(capture.graph.nodes):
        if node.op == "call_function" and not is_forward(node):
            found = reached.setdefault(node, set())
            for user in node.users:
                found |= reached.get(user, set())
    return {node: next(iter(names)) for node, names in reached.items() if len(names) == 1}


def _recomputed(node: fx.Node, option: str) -> bool:
    """Whether a backward recomputes this forward node instead of reading a saved value."""
    if option == "save" or not isinstance(node.target, torch._ops.OpOverload):
        source = node.args[0] if node.args else None  # an item of a tuple goes with the call that made the tuple
        return option != "save" and isinstance(source, fx.Node) and source.op == "call_function" and _recomputed(source, option)
    if torch.Tag.nondeterministic_seeded in node.target.tags and not _without_dropout(node):
        return False
    name = node.target.overloadpacket.__name__
    heavy = name in _HEAVY or "attention" in name or name.endswith("_forward")
    return option == "inputs" or not heavy


def _without_dropout(node: fx.Node) -> bool:
    """Attention is tagged as random because it may drop; with probability 0 it recomputes to the same bits."""
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    if "dropout_p" not in names:
        return False
    place = names.index("dropout_p")
    value = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", schema.arguments[place].default_value)
    return isinstance(value, float) and value == 0.0


def _inside(segment: Segment, option: str, region: Region | None) -> set[fx.Node]:
    """What a backward computes. With tiles: what lies in them again, but no forward exit of theirs; those are small, and saved."""
    if region is None:
        return {node for node in segment.nodes if not is_forward(node) or _recomputed(node, option)}
    again = {node for node in segment.nodes if _recomputed(node, "cheap") and node not in region.exits}
    return again | region.inner | {node for node in segment.nodes if not is_forward(node)}


def _inputs_of(node: fx.Node, region: Region | None) -> list[fx.Node]:
    """Whole values that `node` is computed from."""
    return region.entries(node) if region is not None and node in region.exits else node.all_input_nodes


def _needed(roots: Iterable[fx.Node], inside: set[fx.Node], region: Region | None) -> set[fx.Node]:
    """Nodes computed whole for `roots`; of what tiles compute, only the exits."""
    found: set[fx.Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node in inside and node not in found:
            assert region is None or node not in region.inner or node in region.exits, f"{node} lives within tiles and is read whole"
            found.add(node)
            todo.extend(_inputs_of(node, region))
    return found


def _emit(graph: fx.Graph, capture: Capture, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call with its fake value."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = _fake(node, capture)
    return node


def _fake(node: fx.Node, capture: Capture) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with capture.fake_mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


class _Backward:
    """One backward being lowered: a dry pass finds what must be whole, the real pass emits in the order of the joint graph."""

    def __init__(self, lowering: Lowering, segment: Segment, demands: tuple[Demand, ...], option: str) -> None:
        self.lowering = lowering
        self.capture = lowering.capture
        self.segment = segment
        self.demands = demands
        self.option = option
        self.region, self.count = lowering.tiling(segment, option)
        self.inside = _inside(segment, option, self.region)
        self.sums: dict[tuple[fx.Node, int, int], fx.Node] = {}
        self.dry = False
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.arguments: dict[Read, fx.Node] = {}
        self.starts: dict[int, fx.Node] = {}
        self.whole: set[fx.Node] = set()

    def lower(self) -> Code:
        whole, reads, sliced = self._dry_run()
        self.whole = whole
        self._begin(reads)
        if self.region is not None:
            self._emit_tiles(self.region, sliced)
        dense: list[int] = []
        results: dict[int, fx.Node] = {}
        by_node: dict[fx.Node, list[int]] = {}
        for i, demand in enumerate(self.demands):
            by_node.setdefault(self.segment.at(demand.position), []).append(i)
        for node in self.segment.nodes:
            if node in whole and node not in self.env:
                self._copy(node)
            for i in by_node.get(node, ()):
                before = len(self.graph.nodes)
                results[i] = self._result(i, node, results, dense)
                for new in itertools.islice(reversed(self.graph.nodes), len(self.graph.nodes) - before):
                    new.meta[SERVES] = i
        self.graph.output(tuple(results[i] for i in range(len(self.demands))))
        return Code(_module(self.graph), tuple(reads), (), self.demands, tuple(sorted(set(dense))))

    def _copy(self, node: fx.Node) -> None:
        self.env[node] = self.graph.node_copy(node, self._value)
        self._ask_for_less(node)
        self.env[node].meta[SERVES] = self.lowering.partials.get(node) if not is_forward(node) else None

    def _emit_tiles(self, region: Region, sliced: Sequence[tuple[fx.Node, int, int]]) -> None:
        """What the tiles read, then the tiles."""
        exits = [Wanted(node) for node in self.segment.nodes if node in self.whole and node in region.exits]
        rows = {key: self._wanted_rows(*key) for key in sliced}
        entries = {entry for exit_ in (*exits, *rows.values()) for entry in region.entries(exit_.node)}
        before = _needed(entries, self.inside, region)
        for node in self.segment.nodes:
            if node in before:
                self._copy(node)

        def mark(exit_: Wanted, new: fx.Node) -> None:
            new.meta[SERVES] = exit_.demand if exit_.demand is not None else self.lowering.partials.get(exit_.node)

        tiles = Tiles(region, self.count, self._value, functools.partial(_emit, self.graph, self.capture))
        found = tiles.run([*exits, *rows.values()], mark)
        self.env |= {exit_.node: found[exit_] for exit_ in exits}
        self.sums = {key: found[exit_] for key, exit_ in rows.items()}

    def _wanted_rows(self, node: fx.Node, dim: int, i: int) -> Wanted:
        length = self.demands[i].length
        assert length is not None
        return Wanted(node, Rows(dim, self._start(i), length), i)

    def _dry_run(self) -> tuple[set[fx.Node], list[Read], list[tuple[fx.Node, int, int]]]:
        """What must be computed whole, which arguments are read, and of which sums over tiles only rows are wanted."""
        scratch = _Backward(self.lowering, self.segment, self.demands, self.option)
        scratch.dry = True
        todo: list[fx.Node] = []
        reads: dict[Read, None] = {}

        def read(node: fx.Node) -> fx.Node:
            todo.append(node)
            if node not in scratch.env:
                scratch.env[node] = scratch.graph.placeholder(f"v{len(scratch.env)}")
                scratch.env[node].meta["val"] = node.meta["val"]
            return scratch.env[node]

        for i, demand in enumerate(self.demands):
            node = self.segment.at(demand.position)
            if demand.length is None:
                todo.append(node)
                continue
            slicer = scratch._slicer(i, read)
            slicer.rows_of(node, Rows(0, scratch._start(i), demand.length))
            reads.update(dict.fromkeys(scratch.arguments))
        if self.region is not None:
            todo.extend(entry for node, _, _ in scratch.sums for entry in self.region.entries(node))
        whole = _needed(todo, self.inside, self.region)
        position = self.segment.position
        sources = {source for node in whole for source in _inputs_of(node, self.region)} | {*scratch.env, *todo}
        outside = sorted((position[node] for node in sources if node not in self.inside), key=lambda p: (p < 0, abs(p)))
        return whole, [Read(p) for p in outside] + list(reads), list(scratch.sums)

    def _begin(self, reads: list[Read]) -> None:
        """Placeholders first: tensors in the order of `reads`, then the starts."""
        for read in reads:
            node = self.segment.at(read.position)
            argument = self.graph.placeholder(f"a{len(self.arguments)}")
            argument.meta["val"] = node.meta["val"]
            if read.demand is not None:
                length = self.demands[read.demand].length
                assert length is not None
                argument.meta["val"] = self._fake_rows(node, length)
            self.arguments[read] = argument
        for i, demand in enumerate(self.demands):
            if demand.length is not None:
                self._start(i)

    def _start(self, i: int) -> fx.Node:
        if i not in self.starts:
            self.starts[i] = self.graph.placeholder(f"start{i}")
            self.starts[i].meta["val"] = 0
        return self.starts[i]

    def _ask_for_less(self, node: fx.Node) -> None:
        """Let a call with an output mask make only the results that are read: the others are dense gradients."""
        if node.target is not aten.native_layer_norm_backward.default:
            return
        new, mask = self.env[node], node.args[-1]
        assert isinstance(mask, list | tuple)
        read = {user.args[1] for user in node.users if user in self.whole}
        new.args = (*new.args[:-1], [bool(wanted) and i in read for i, wanted in enumerate(mask)])
        new.meta["val"] = self._fake(new)

    def _value(self, node: fx.Node) -> fx.Node:
        """An old node in the new graph: computed there, or an argument."""
        return self.env[node] if node in self.env else self.arguments[Read(self.segment.position[node])]

    def _slicer(self, i: int, read: Callable[[fx.Node], fx.Node]) -> Slicer:
        partials, position = self.lowering.partials, self.segment.position

        def is_partial(node: fx.Node) -> bool:
            return node in partials and not is_forward(node)

        def foreign(node: fx.Node, rows: Rows) -> fx.Node | None:
            """Another segment's share of a tied weight's gradient: only its rows cross over."""
            if self._is_sum(node):
                return self._sum(node, rows, i)
            if node in self.inside or not is_partial(node) or rows.dim != 0 or node.op != "call_function":
                return None
            if node.meta["val"].shape != self.segment.at(self.demands[i].position).meta["val"].shape:
                return None
            key = Read(position[node], i)
            if key not in self.arguments:
                self.arguments[key] = self.graph.placeholder(f"f{len(self.arguments)}")
                self.arguments[key].meta["val"] = self._fake_rows(node, rows.length)
            return self.arguments[key]

        def is_value(node: fx.Node) -> bool:
            return node not in self.inside or not is_partial(node) or (self.region is not None and node in self.region.exits)

        return Slicer(self.graph, read, is_value, foreign, self._fake)

    def _is_sum(self, node: fx.Node) -> bool:
        """Whether tiles add up this value; of it they make no more rows than are wanted."""
        region = self.region
        return region is not None and node in self.inside and node in region.exits and region.steps[node].result is None

    def _sum(self, node: fx.Node, rows: Rows, i: int) -> fx.Node:
        key = (node, rows.dim, i)
        if self.dry and key not in self.sums:
            self.sums[key] = self.graph.placeholder(f"s{len(self.sums)}")
            self.sums[key].meta["val"] = self._fake_rows(node, rows.length, rows.dim)
        return self.sums[key]

    def _fake_rows(self, node: fx.Node, length: int, dim: int = 0) -> torch.Tensor:
        value = node.meta["val"]
        with self.capture.fake_mode:
            return torch.empty((*value.shape[:dim], length, *value.shape[dim + 1 :]), dtype=value.dtype, device=value.device)

    def _fake(self, node: fx.Node) -> Any:
        return _fake(node, self.capture)

    def _result(self, i: int, node: fx.Node, results: dict[int, fx.Node], dense: list[int]) -> fx.Node:
        """The value of demand `i`; a gradient gets a storage of its own, for the optimizer writes near it and keeps it."""
        demand = self.demands[i]
        if demand.length is None:
            value = self._value(node)
        else:
            slicer = self._slicer(i, self._value)
            value = slicer.rows_of(node, Rows(0, self.starts[i], demand.length))
            if slicer.dense:
                dense.append(i)
        if demand.length is None and node not in self.capture.gradients.values():
            return value
        taken = [*self.arguments.values(), *results.values()]
        if _owns_storage(value.meta["val"], [other.meta["val"] for other in taken if other is not value]) and value not in taken:
            return value
        clone = self.graph.call_function(aten.clone.default, (value,), {"memory_format": torch.contiguous_format})
        clone.meta["val"] = self._fake(clone)
        return clone


def _owns_storage(value: torch.Tensor, others: Sequence[Any]) -> bool:
    """Contiguous, alone in its storage, and wasting at most one row of it."""
    storage = value.untyped_storage()
    nbytes = value.numel() * value.element_size()
    row = nbytes // max(value.shape[0], 1) if value.dim() else 0
    shared = any(isinstance(other, torch.Tensor) and other.untyped_storage()._cdata == storage._cdata for other in others)
    return value.is_contiguous() and not shared and storage.nbytes() <= nbytes + row


def _lower_forward(capture: Capture, segment: Segment, writes: tuple[int, ...], region: Region | None, count: int) -> Code:
    wanted = [segment.nodes[i] for i in writes]
    needed = _needed(wanted, {node for node in segment.nodes if is_forward(node)}, region)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    read = {source for node in needed for source in _inputs_of(node, region)}
    outside = [node for node in segment.externals if node in read]
    for i, node in enumerate(outside):
        env[node] = graph.placeholder(f"a{i}")
        env[node].meta["val"] = node.meta["val"]
    exits = [node for node in segment.nodes if node in needed and region is not None and node in region.exits]
    if region is not None and exits:
        before = _needed({entry for node in exits for entry in region.entries(node)}, needed, region)
        for node in segment.nodes:
            if node in before:
                env[node] = graph.node_copy(node, env.__getitem__)
        tiles = Tiles(region, count, env.__getitem__, functools.partial(_emit, graph, capture))
        found = tiles.run([Wanted(node) for node in exits], lambda exit_, new: None)
        env |= {exit_.node: new for exit_, new in found.items()}
    for node in segment.nodes:
        if node in needed and node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in wanted))
    return Code(_module(graph), tuple(Read(segment.position[node]) for node in outside), writes, (), ())


def _module(graph: fx.Graph) -> fx.GraphModule:
    graph.set_codegen(_BoxedCodeGen())
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)
