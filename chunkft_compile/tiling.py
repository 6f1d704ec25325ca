"""Where a loss over a vocabulary can be computed in token tiles, so that no value of size [tokens, vocab] ever exists.

From the matmul that makes the logits, token dimensions are followed through forward and backward. What lies between it and the
values that have no vocabulary any more is the *region*: every node of it works on each token alone. The nodes that leave it
are its *exits*: per-token values, which tiles fill piece by piece, and sums over all tokens, to which every tile adds its part.

NOTE [the tokens of a value]
Models flatten [batch, length, vocab] to [tokens, vocab] and back. A tile is a range of the flattened tokens: in a tile's value
the token dimensions are one, whatever they are in the whole value. `Tokens` says which ones they are there.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from chunkft_compile.segments import Segment, is_forward

aten = torch.ops.aten

LEAST_TOKENS = 16
"""Fewest tokens of a tile that is offered: below, matmuls are so thin that the weights are read for almost nothing."""

COUNTS = (2, 4, 8, 16, 32)
"""Numbers of tiles that are offered. Each tile is written out in the code, so the list ends."""


class UntiledError(Exception):
    """A segment has no tiled option; the message says why."""


@dataclass(frozen=True)
class Tokens:
    """Dimensions `dim .. dim + count - 1` of a value are its tokens, see NOTE [the tokens of a value]."""

    dim: int
    count: int = 1

    def merged(self, shape: Sequence[int], length: int) -> list[int]:
        """The shape of a tile of `length` tokens."""
        return [*shape[: self.dim], length, *shape[self.dim + self.count :]]


@dataclass(frozen=True)
class Step:
    """How a tile computes a node: where the tokens are in its result (None: it sums over them) and in each operand that has any."""

    result: Tokens | None
    operands: Mapping[fx.Node, Tokens]


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


Tiled = Mapping[fx.Node, Tokens]
Rule = Callable[[fx.Node, Tiled, int], Step | None]
"""From a node, the tokens of its inputs that are tiled, and the number of tokens: its step, or None where it cannot be tiled."""


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's tensor."""
    return tuple(node.meta["val"].shape)


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def _first(node: fx.Node, tiled: Tiled) -> Tokens | None:
    """The tokens of the first argument; None where another one is tiled."""
    source = node.args[0]
    return tiled.get(source) if isinstance(source, fx.Node) and set(tiled) <= {source} else None


def _pointwise(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    """Elementwise with broadcasting: an operand has all tokens or none."""
    count, (known, at) = len(shape_of(node)), next(iter(tiled.items()))
    found = Tokens(at.dim + count - len(shape_of(known)), at.count)
    operands: dict[fx.Node, Tokens] = {}
    for operand in node.all_input_nodes:
        if not _is_tensor(operand):
            return None
        shape = shape_of(operand)
        missing = count - len(shape)
        sizes = [shape[d - missing] if d >= missing else 1 for d in range(found.dim, found.dim + found.count)]
        if sizes == list(shape_of(node)[found.dim : found.dim + found.count]):
            first = max(found.dim - missing, 0)
            operands[operand] = Tokens(first, found.dim + found.count - missing - first)
        elif any(size != 1 for size in sizes) or (found.count > 1 and len(shape) > count - found.dim - found.count):
            return None
        if operand in tiled and operands.get(operand) != tiled[operand]:
            return None
    return Step(found, operands) if not any(isinstance(argument, list | tuple) for argument in node.args) else None


def _same(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    found = _first(node, tiled)
    return Step(found, tiled) if found else None


def _view(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    """A view keeps the tokens where dimensions of the new shape hold exactly them."""
    at = _first(node, tiled)
    if at is None:
        return None
    found = _same_elements(shape_of(node.args[0]), at, shape_of(node), tokens)
    return Step(found, tiled) if found else None


def _same_elements(old: tuple[int, ...], at: Tokens, new: tuple[int, ...], tokens: int) -> Tokens | None:
    before = _product(old[: at.dim])
    for dim in range(len(new)):
        for stop in range(dim + 1, len(new) + 1):
            if _product(new[:dim]) == before and _product(new[dim:stop]) == tokens:
                return Tokens(dim, stop - dim)
    return None


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _t(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    at = _first(node, tiled)
    return Step(Tokens(1 - at.dim), tiled) if at and at.count == 1 and len(shape_of(node)) == 2 else None


def _mm(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    """Tokens of the left rows or the right columns stay, those that are multiplied away are summed over."""
    *bias, a, b = node.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    if bias and (bias[0] in tiled or shape_of(bias[0]) not in ((shape_of(node)[1],), (1, shape_of(node)[1]))):
        return None
    left, right = tiled.get(a), tiled.get(b)
    if left in (None, Tokens(1)) and right in (None, Tokens(0)) and not bias:
        return Step(None, {a: Tokens(1), b: Tokens(0)})
    if left == Tokens(0) and right is None:
        return Step(left, {a: left})
    return Step(right, {b: right}) if right == Tokens(1) and left is None and not bias else None


def _softmax(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    at = _first(node, tiled)
    return Step(at, tiled) if at and _outside(node.args[1], at, len(shape_of(node))) else None


def _softmax_backward(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    grad, output, dim, *_ = node.args
    at = next(iter(tiled.values()))
    assert isinstance(grad, fx.Node) and isinstance(output, fx.Node)
    fits = all(tokens == at for tokens in tiled.values()) and _outside(dim, at, len(shape_of(node)))
    return Step(at, {grad: at, output: at}) if fits else None


def _outside(dim: Any, at: Tokens, count: int) -> bool:
    """Whether a dimension is none of the tokens'."""
    return not at.dim <= dim % count < at.dim + at.count


def _reduce(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    """Over dimensions beside the tokens, or, for a sum, over all of theirs."""
    at = _first(node, tiled)
    if at is None:
        return None
    count = len(shape_of(node.args[0]))
    dims = reduced_dims(node)
    over = [d for d in range(at.dim, at.dim + at.count) if d in dims]
    if over:
        return Step(None, tiled) if len(over) == at.count and node.target is aten.sum.dim_IntList else None
    keeps = len(shape_of(node)) == count
    return Step(at if keeps else Tokens(at.dim - sum(d < at.dim for d in dims), at.count), tiled)


def reduced_dims(node: fx.Node) -> list[int]:
    """The dimensions of its argument that a reduction removes, ascending."""
    source, *rest = node.args
    count = len(shape_of(source))
    dims = rest[0] if rest else None
    given = dims if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    return sorted({d % count for d in given if isinstance(d, int)}) if given else list(range(count))


def _nll_forward(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    """Its result is a tuple of what `_item` says."""
    scores, labels, *_ = node.args
    assert isinstance(scores, fx.Node) and isinstance(labels, fx.Node)
    return Step(Tokens(0), {scores: Tokens(0), labels: Tokens(0)}) if tiled == {scores: Tokens(0)} and len(shape_of(scores)) == 2 else None


def _nll_backward(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    grad, scores, labels, _, reduction, *_ = node.args
    assert isinstance(grad, fx.Node) and isinstance(scores, fx.Node) and isinstance(labels, fx.Node)
    if tiled != {scores: Tokens(0)} or len(shape_of(scores)) != 2:
        return None
    return Step(Tokens(0), {scores: Tokens(0), labels: Tokens(0)} | ({grad: Tokens(0)} if reduction == 0 else {}))


def _item(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    """Item 0 of the loss is per token only without reduction; item 1 is the total weight of the labels."""
    source, index = node.args
    if not isinstance(source, fx.Node) or source.target is not aten.nll_loss_forward.default:
        return None
    return Step(Tokens(0) if index == 0 and source.args[3] == 0 else None, tiled)


RULES: dict[Any, Rule] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten._to_copy.default: _same,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.t.default: _t,
    aten.mm.default: _mm,
    aten.addmm.default: _mm,
    aten._log_softmax.default: _softmax,
    aten._softmax.default: _softmax,
    aten._log_softmax_backward_data.default: _softmax_backward,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.sum.dim_IntList: _reduce,
    aten.amax.default: _reduce,
    aten.mean.dim: _reduce,
    aten.logsumexp.default: _reduce,
    aten.nll_loss_forward.default: _nll_forward,
    aten.nll_loss_backward.default: _nll_backward,
    operator.getitem: _item,
}


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
    loss = max(losses, key=lambda node: _product(shape_of(node.args[0])))
    if {user.args[1] for user in loss.users} != {0, 1}:
        raise UntiledError(f"{loss.name} does not give both the loss and its total weight")
    node: Any = loss.args[0]
    size = _product(shape_of(node))
    while node in segment.position and node.target not in (aten.mm.default, aten.addmm.default):
        sources = [source for source in node.all_input_nodes if _is_tensor(source) and _product(shape_of(source)) == size]
        if len(sources) != 1:
            raise UntiledError(f"the logits are made by {node.name} ({node.target}), which is no matrix product")
        node = sources[0]
    if segment.position.get(node, -1) < 0 or _product(shape_of(node)) != size:
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
            step = _step(node, tiled, tokens)
            if step is not None:
                steps[node] = step
    return steps


def _step(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    rule = RULES.get(node.target) or (_pointwise if pointwise else None)
    return rule(node, tiled, tokens) if rule else None


def _is_large(node: fx.Node, vocabulary: int, tokens: int) -> bool:
    return _is_tensor(node) and _product(shape_of(node)) >= vocabulary * tokens


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
        if _is_large(node, vocabulary, tokens) or not _is_tensor(node):
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
