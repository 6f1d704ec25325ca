"""Segments made callable: for each kind and demand one forward and one backward that compute nothing else.

A step *demands* gradient slices of some segments. Each backward, lowered for its demands, reads values of the forward (they
become *saved*) and of later segments' backwards (they become demands there). So dX appears only where something below needs
it, and nothing is computed or kept for segments below the depth of the step.
"""

import functools
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property

from torch import fx

from chunkft_compile.backwards import Backward
from chunkft_compile.capture import Capture
from chunkft_compile.codes import Code, Demand, Read, emit
from chunkft_compile.offloading import Movable
from chunkft_compile.recomputing import inputs_of, needed_for
from chunkft_compile.segments import Segment, is_forward
from chunkft_compile.sizes import Sizes, SymbolicTiles, take_sizes
from chunkft_compile.tiles import Range, Tiles, Wanted
from chunkft_compile.tiling import Region, UntiledError, find_region, fit_tiles, tile_ranges

logger = logging.getLogger(__name__)

OPTIONS = ("save", "cheap", "inputs")
"""What a segment keeps for its backward: everything; the results of heavy operators; only what comes in from outside.

`Lowering.options` adds "tiled N" for a segment that ends in a cross entropy: N token tiles in forward and backward, beside them "cheap".
"""

_TILED = "tiled "


class Lowering:
    """Codes of one capture, made when first asked for and shared by kind. One with symbolic sizes needs `tiles` for its tiled options."""

    def __init__(self, capture: Capture, segments: Sequence[Segment], tiles: SymbolicTiles | None = None) -> None:
        self.capture = capture
        self._tiles = tiles  # for a capture with symbolic sizes
        self.segments = tuple(segments)
        self.owner = {node: segment.number for segment in segments for node in segment.nodes}
        self.partials = _partial_gradients(capture)
        self._codes: dict[object, Code] = {}
        self._regions: dict[int, Region | str] = {}
        self._exports: dict[int, frozenset[int]] = {}

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

    def retiled(self, segment: Segment, option: str, planned: Sizes, sizes: Sizes) -> tuple[str, Sizes]:
        """The option that does for `sizes` what `option` does for `planned`, and its sizes: tiles that are no longer, and few of them.

        Raises ValueError where there is no such option.
        """
        region, count = self.tiling(segment, option)
        if region is None or self._tiles is None:
            return option, sizes
        tokens = [int(found.of(region.tokens)) for found in (planned, sizes)]
        found = fit_tiles(tokens[1], -(-tokens[0] // count), count)
        if found is None:
            raise ValueError(f"{tokens[1]} tokens do not come in {count} tiles or fewer of {-(-tokens[0] // count)} tokens")
        return f"{_TILED}{found.count}", self._tiles.sizes(sizes, found.length, found.rest)

    def ranges(self, region: Region, count: int, graph: fx.Graph) -> list[Range]:
        """The tiles of a region, as a code with this graph has them."""
        return list(tile_ranges(region.tokens, count)) if self._tiles is None else self._tiles.ranges(graph, count)

    def backward(self, segment: Segment, demands: Sequence[Demand], option: str) -> Code:
        """The backward of `segment` that gives exactly `demands`, recomputing what `option` did not save."""
        key = (segment.kind, "backward", tuple(demands), option)
        if key not in self._codes:
            self._codes[key] = Backward(self, segment, tuple(demands), option).lower()
        return self._codes[key]

    def forward(self, segment: Segment, writes: Iterable[int], option: str = OPTIONS[0]) -> Code:
        """The forward of `segment` that gives the values at positions `writes`. Only tiled options compute it in another way."""
        wanted = tuple(sorted(set(writes)))
        region, count = self.tiling(segment, option)
        key = (segment.kind, "forward", wanted, count)
        if key not in self._codes:
            self._codes[key] = self._lower_forward(segment, wanted, option, region, count)
        return self._codes[key]

    def _lower_forward(self, segment: Segment, writes: tuple[int, ...], option: str, region: Region | None, count: int) -> Code:
        wanted = [segment.nodes[i] for i in writes]
        needed = needed_for(wanted, {node for node in segment.nodes if is_forward(node)}, region)
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        read = {source for node in needed for source in inputs_of(node, region)}
        outside = [node for node in segment.externals if node in read]
        for i, node in enumerate(outside):
            env[node] = graph.placeholder(f"a{i}")
            env[node].meta["val"] = node.meta["val"]
        exits = [node for node in segment.nodes if node in needed and region is not None and node in region.exits]
        if region is not None and exits:
            before = needed_for({entry for node in exits for entry in region.entries(node)}, needed, region)
            for node in segment.nodes:
                if node in before:
                    env[node] = graph.node_copy(node, env.__getitem__)
            tiles = Tiles(region, self.ranges(region, count, graph), env.__getitem__, functools.partial(emit, graph, self.capture))
            found = tiles.run([Wanted(node) for node in exits], lambda exit_, new: None)
            env |= {exit_.node: new for exit_, new in found.items()}
        for node in segment.nodes:
            if node in needed and node not in env:
                env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(tuple(env[node] for node in wanted))
        sizes, reads = take_sizes(graph), tuple(Read(segment.position[node]) for node in outside)
        return Code(graph, reads, writes, (), (), option, sizes)

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
        if segment.number not in self._exports:
            self._exports[segment.number] = self._find_exports(segment)
        return self._exports[segment.number]

    def _find_exports(self, segment: Segment) -> frozenset[int]:
        def leaves(node: fx.Node) -> bool:
            return any(
                user.op != "output" and is_forward(user) and self.owner.get(user, segment.number) != segment.number for user in node.users
            )

        capture = self.capture
        kept = {node for node in (*capture.outputs, *capture.mutations.values()) if isinstance(node, fx.Node)}
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
