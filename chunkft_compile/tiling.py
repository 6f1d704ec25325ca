"""Where a loss over a vocabulary can be computed in token tiles, so that no value of size [tokens, vocab] ever exists.

From the matmul that makes the logits, token dimensions are followed through forward and backward. What lies between it and the
values that have no vocabulary any more is the *region*: every node of it works on each token alone. The nodes that leave it
are its *exits*: per-token values, which tiles fill piece by piece, and sums over all tokens, to which every tile adds its part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from chunkft_compile.segments import Segment, is_forward
from chunkft_compile.tokens import Step, Tokens, is_tensor, product, shape_of, step_of

aten = torch.ops.aten

LEAST_TOKENS = 16
"""Fewest tokens of a tile that is offered: below, matmuls are so thin that the weights are read for almost nothing."""

COUNTS = (2, 4, 8, 16, 32)
"""Numbers of tiles that are offered. Each tile is written out in the code, so the list ends."""


class UntiledError(Exception):
    """A segment has no tiled option; the message says why."""


@dataclass(frozen=True, eq=False)
class Region:
    """What is computed tile by tile. `steps` has the nodes `inner`, which live within a tile, and the `exits`."""

    tokens: int
    steps: Mapping[fx.Node, Step]
    inner: frozenset[fx.Node]
    exits: frozenset[fx.Node]

    def entries(self, node: fx.Node) -> list[fx.Node]:
        """Whole values that the tiles read to compute `node`."""
        found: dict[fx.Node, None] = {}
        seen = {node}
        todo = [node]
        while todo:
            for operand in todo.pop().all_input_nodes:
                if operand not in self.inner:
                    found[operand] = None
                elif operand not in seen:
                    seen.add(operand)
                    todo.append(operand)
        return list(found)

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of tiles worth offering."""
        return tuple(count for count in COUNTS if self.tokens // count >= LEAST_TOKENS)


def find_region(segment: Segment) -> Region:
    """The region of a segment.

    Raises `UntiledError` where there is no loss over a vocabulary, where a whole value of its size is read by somebody else, or
    where an operator on it has no rule.
    """
    logits = _logits(segment)
    tokens, vocabulary = shape_of(logits)
    inner_size = shape_of(logits.args[-2])[1]
    if vocabulary <= inner_size:
        raise UntiledError(f"the vocabulary ({vocabulary}) is not larger than the hidden size ({inner_size}): tiles would save little")
    steps = _spread(segment, logits, tokens)
    inner = _inner(segment, steps, vocabulary, tokens)
    _exits(segment, steps, inner, vocabulary, tokens)  # refuses readers of the logits, before anything that follows from them
    _pull(segment, steps, inner, vocabulary, tokens)
    exits = _exits(segment, steps, inner, vocabulary, tokens)
    _refuse_second_pass(segment, steps, inner, exits)
    _refuse_views(exits)
    return Region(tokens, {node: steps[node] for node in inner | exits}, frozenset(inner), frozenset(exits))


def _logits(segment: Segment) -> fx.Node:
    """The matmul under the largest cross entropy of the segment."""
    losses = [node for node in segment.nodes if node.target is aten.nll_loss_forward.default]
    if not losses:
        raise UntiledError("there is no cross entropy")
    loss = max(losses, key=lambda node: product(shape_of(node.args[0])))
    node: Any = loss.args[0]
    size = product(shape_of(node))
    while node in segment.position and node.target not in (aten.mm.default, aten.addmm.default):
        sources = [source for source in node.all_input_nodes if is_tensor(source) and product(shape_of(source)) == size]
        if len(sources) != 1:
            raise UntiledError(f"the logits are made by {node.name} ({node.target}), which is no matrix product")
        node = sources[0]
    if segment.position.get(node, -1) < 0 or product(shape_of(node)) != size:
        raise UntiledError(f"the logits come from another segment ({node.name})")
    return node  # type: ignore[no-any-return]


def _spread(segment: Segment, logits: fx.Node, tokens: int) -> dict[fx.Node, Step]:
    """Steps of all nodes that rules lead to from the logits."""
    *_, hidden, _ = logits.args
    assert isinstance(hidden, fx.Node)
    steps = {logits: Step(Tokens(0), {hidden: Tokens(0)})}
    for node in segment.nodes:
        tiled: dict[fx.Node, Tokens] = {}
        for source in node.all_input_nodes:
            at = steps[source].result if source in steps else None
            if at is not None:
                tiled[source] = at
        if tiled and node not in steps:
            step = step_of(node, tiled, tokens)
            if step is not None:
                steps[node] = step
    return steps


def _is_large(node: fx.Node, vocabulary: int, tokens: int) -> bool:
    return is_tensor(node) and product(shape_of(node)) >= vocabulary * tokens


def _inner(segment: Segment, steps: Mapping[fx.Node, Step], vocabulary: int, tokens: int) -> set[fx.Node]:
    """Large values, and smaller ones that lead to large ones of the same direction."""
    inner: set[fx.Node] = set()
    for node in reversed(segment.nodes):
        if node not in steps or steps[node].result is None:
            continue
        leads = any(user in inner and is_forward(user) == is_forward(node) for user in node.users)
        if leads or _is_large(node, vocabulary, tokens) or node.target is aten.nll_loss_forward.default:
            inner.add(node)
    return inner


def _pull(segment: Segment, steps: dict[fx.Node, Step], inner: set[fx.Node], vocabulary: int, tokens: int) -> None:
    """Large values that the region reads and that do not come from the logits: a tile can expand its own, the rest is refused."""
    for node in [node for node in segment.nodes if node in steps]:
        for operand in steps[node].operands if node in inner or any(source in inner for source in node.all_input_nodes) else ():
            if operand in inner or not _is_large(operand, vocabulary, tokens):
                continue
            step = _pulled(operand, steps[node].operands[operand]) if operand in segment.position else None
            if step is None:
                raise UntiledError(f"{node.name} ({node.target}) reads {operand.name} ({operand.target}) of size [tokens, vocab]")
            steps[operand] = step
            inner.add(operand)


def _pulled(node: fx.Node, at: Tokens) -> Step | None:
    """An expanded value whose source has all the tokens, or none."""
    source = node.args[0] if node.args else None
    if node.target is not aten.expand.default or not isinstance(source, fx.Node):
        return None
    missing = len(shape_of(node)) - len(shape_of(source))
    if at.count > 1 or at.dim < missing:
        return None
    all_tokens = shape_of(source)[at.dim - missing] == shape_of(node)[at.dim]
    return Step(at, {source: Tokens(at.dim - missing)} if all_tokens else {})


def _exits(segment: Segment, steps: Mapping[fx.Node, Step], inner: set[fx.Node], vocabulary: int, tokens: int) -> set[fx.Node]:
    """Nodes outside of `inner` that a tile computes, and small ones inside that somebody else reads whole."""
    exits = {node for node in steps if node not in inner and any(source in inner for source in node.all_input_nodes)}
    for node in inner:
        strangers = [user for user in node.users if user not in inner and user not in exits]
        if not strangers:
            continue
        if _is_large(node, vocabulary, tokens) or not is_tensor(node):
            raise UntiledError(f"{_reader(strangers[0], segment)} reads {node.name} ({node.target}) whole, and has no rule for tiles")
        exits.add(node)
    return exits


def _reader(node: fx.Node, segment: Segment) -> str:
    if node.op == "output":
        return "the caller"
    return f"{node.name} ({node.target})" + ("" if node in segment.position else " of another segment")


def _refuse_second_pass(segment: Segment, steps: Mapping[fx.Node, Step], inner: set[fx.Node], exits: set[fx.Node]) -> None:
    """A tile must not need what is only known after all tiles of its direction."""
    late: set[fx.Node] = set()
    for node in segment.nodes:
        waits = [source for source in node.all_input_nodes if source in late and is_forward(source) == is_forward(node)]
        if waits and (node in inner or node in exits):
            raise UntiledError(f"{node.name} ({node.target}) reads {waits[0].name}, which needs all tokens first")
        if waits or (node in exits and node not in inner):
            late.add(node)


def _refuse_views(exits: set[fx.Node]) -> None:
    """An exit gets a storage of its own, which must be what it had."""
    seen: set[int] = set()
    for node in exits:
        value = node.meta["val"]
        storage = value.untyped_storage()
        if not value.is_contiguous() or storage.nbytes() != value.numel() * value.element_size() or storage._cdata in seen:
            raise UntiledError(f"{node.name} ({node.target}) is a view of another value")
        seen.add(storage._cdata)


def tile_ranges(tokens: int, count: int) -> Iterator[tuple[int, int]]:
    """(start, length) of every tile: `count` of equal length, the last one shorter, fewer where there are not enough tokens."""
    size = -(-tokens // count)
    for start in range(0, tokens, size):
        yield start, min(size, tokens - start)


@dataclass(frozen=True)
class Tiling:
    """`count` tiles: all but the last one of `length` tokens, the last one of `rest`."""

    count: int
    length: int
    rest: int


def fit_tiles(tokens: int, longest: int, most: int) -> Tiling | None:
    """Tiles of 2 to `longest` tokens, at most `most` of them; None where that is not possible.

    Their number is a power of two where it can be, so that many lengths have it in common. One token is not enough for a code whose sizes
    are symbols.
    """
    fewest = -(-tokens // longest)
    powers = [2**power for power in range(most.bit_length()) if fewest <= 2**power <= most]
    for count in [*powers, *range(fewest, most + 1)]:
        length = min(-(-tokens // count), (tokens - 2) // (count - 1)) if count > 1 else 2
        rest = tokens - (count - 1) * length
        if 2 <= length <= max(longest, 2) and 2 <= rest <= longest:
            return Tiling(count, length, rest)
    return None
