"""The backward of a segment for given demands: a dry pass finds what must be whole, the real pass emits in the order of the graph."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from chunkft_compile.codes import SERVES, Code, Demand, Read, emit
from chunkft_compile.fakes import fake_value
from chunkft_compile.recomputing import inputs_of, inside_of, needed_for
from chunkft_compile.segments import Segment, is_forward
from chunkft_compile.sizes import take_sizes
from chunkft_compile.slicing import Rows, Slicer, rule_of
from chunkft_compile.tiles import Tiles, Wanted
from chunkft_compile.tiling import Region

if TYPE_CHECKING:
    from chunkft_compile.lowering import Lowering

aten = torch.ops.aten


class Backward:
    """One backward being lowered: a dry pass finds what must be whole, the real pass emits in the order of the joint graph."""

    def __init__(self, lowering: "Lowering", segment: Segment, demands: tuple[Demand, ...], option: str) -> None:
        self.lowering = lowering
        self.capture = lowering.capture
        self.segment = segment
        self.demands = demands
        self.option = option
        self.region, self.count = lowering.tiling(segment, option)
        self.inside = inside_of(segment, option, self.region)
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
        sizes = take_sizes(self.graph)
        return Code(self.graph, tuple(reads), (), self.demands, tuple(sorted(set(dense))), self.option, sizes)

    def _copy(self, node: fx.Node) -> None:
        self.env[node] = self.graph.node_copy(node, self._value)
        self._ask_for_less(node)
        self.env[node].meta[SERVES] = self.lowering.partials.get(node) if not is_forward(node) else None

    def _emit_tiles(self, region: Region, sliced: Sequence[tuple[fx.Node, int, int]]) -> None:
        """What the tiles read, then the tiles."""
        exits = [Wanted(node) for node in self.segment.nodes if node in self.whole and node in region.exits]
        rows = {key: self._wanted_rows(*key) for key in sliced}
        entries = {entry for exit_ in (*exits, *rows.values()) for entry in region.entries(exit_.node)}
        before = needed_for(entries, self.inside, region)
        for node in self.segment.nodes:
            if node in before:
                self._copy(node)

        def mark(exit_: Wanted, new: fx.Node) -> None:
            new.meta[SERVES] = exit_.demand if exit_.demand is not None else self.lowering.partials.get(exit_.node)

        ranges = self.lowering.ranges(region, self.count, self.graph)
        tiles = Tiles(region, ranges, self._value, functools.partial(emit, self.graph, self.capture))
        found = tiles.run([*exits, *rows.values()], mark)
        self.env |= {exit_.node: found[exit_] for exit_ in exits}
        self.sums = {key: found[exit_] for key, exit_ in rows.items()}

    def _wanted_rows(self, node: fx.Node, dim: int, i: int) -> Wanted:
        length = self.demands[i].length
        assert length is not None
        return Wanted(node, Rows(dim, self._start(i), length), i)

    def _dry_run(self) -> tuple[set[fx.Node], list[Read], list[tuple[fx.Node, int, int]]]:
        """What must be computed whole, which arguments are read, and of which sums over tiles only rows are wanted."""
        scratch = Backward(self.lowering, self.segment, self.demands, self.option)
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
        whole = needed_for(todo, self.inside, self.region)
        position = self.segment.position
        sources = {source for node in whole for source in inputs_of(node, self.region)} | {*scratch.env, *todo}
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
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.arguments[-1].name != "output_mask":
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
            if rows.start is not self._start(i):
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

        return Slicer(self.graph, read, is_value, foreign, self._fake, rule_of)

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
        return fake_value(node, self.capture.fake_mode)

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
