"""The region of a segment emitted tile after tile: only one tile's logits and their gradient live at a time.

Every exit that is wanted takes its share of a tile before the next one begins. Per-token exits are copied into a result made
with the first tile; sums over the tokens start as the first tile's part, and the others are added in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from chunkft_compile.slicing import Rows
from chunkft_compile.tiling import Region
from chunkft_compile.tokens import Tokens, reduced_dims, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Wanted:
    """An exit: whole, or, of one that sums over the tokens, the `rows` that demand number `demand` is about."""

    node: fx.Node
    rows: Rows | None = None
    demand: int | None = None


Range = tuple[int | fx.Node, int]
"""First token and number of tokens of a tile. The first one may be a node that holds an integer at run time, the number symbolic."""


class Tiles:
    """Emits a region in tiles. `read(node)` gives a whole value, `emit(target, *args, **kwargs)` a new call."""

    def __init__(self, region: Region, ranges: Sequence[Range], read: Callable[[fx.Node], fx.Node], emit: Callable[..., fx.Node]) -> None:
        self.region = region
        self.ranges = ranges
        self.read = read
        self.emit = emit
        self._flat: dict[tuple[fx.Node, Tokens], fx.Node] = {}

    def run(self, wanted: Sequence[Wanted], mark: Callable[[Wanted, fx.Node], None]) -> dict[Wanted, fx.Node]:
        """All tiles, one after the other; `mark` is told the calls that serve one exit only."""
        exits = list(dict.fromkeys([*wanted, *self._weights(wanted)]))
        results: dict[Wanted, fx.Node] = {}
        for start, length in self.ranges:
            tile = _Tile(self, start, length)
            for exit_ in exits:
                tile.prepare(exit_.node)
                results[exit_] = self._add(tile, exit_, results.get(exit_), mark)
        return {exit_: self._finish(exit_, results) for exit_ in wanted}

    def entry(self, node: fx.Node, tokens: Tokens) -> fx.Node:
        """A whole value with its token dimensions merged into one."""
        if (node, tokens) not in self._flat:
            shape = tokens.merged(shape_of(node), self.region.tokens)
            whole = self.read(node)
            self._flat[node, tokens] = whole if tokens.count == 1 else self.emit(aten.reshape.default, whole, shape)
        return self._flat[node, tokens]

    def _add(self, tile: "_Tile", exit_: Wanted, found: fx.Node | None, mark: Callable[[Wanted, fx.Node], None]) -> fx.Node:
        emit = self.emit

        def marking(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            node = emit(target, *args, **kwargs)
            mark(exit_, node)
            return node

        self.emit = marking
        try:
            return tile.add(exit_, found)
        finally:
            self.emit = emit

    def _weights(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """A mean loss is a sum over its total weight."""
        return [Wanted(weight) for exit_ in wanted if (weight := self._weight(exit_.node)) is not None]

    def _weight(self, node: fx.Node) -> fx.Node | None:
        """The total weight of a mean loss; None for any other exit."""
        call = node.args[0] if node.args else None
        if not isinstance(call, fx.Node) or call.target is not aten.nll_loss_forward.default or node.args[1] != 0 or call.args[3] != 1:
            return None
        return next(item for item in call.users if item.args[1] == 1)

    def _finish(self, exit_: Wanted, results: dict[Wanted, fx.Node]) -> fx.Node:
        """The exit itself, out of what the tiles put together: sums over the tokens become means, dtype and shape its own."""
        found, value, shape = results[exit_], exit_.node.meta["val"], list(shape_of(exit_.node))
        weight = self._weight(exit_.node)
        if weight is not None:
            found = self.emit(aten.div_.Tensor, found, results[Wanted(weight)])
        if found.meta["val"].dtype != value.dtype:
            found = adopt(self.emit(aten._to_copy.default, found, dtype=value.dtype), exit_.node)
        if exit_.rows is not None:
            shape[exit_.rows.dim] = exit_.rows.length
        return found if list(shape_of(found)) == shape else self.emit(aten.view.default, found, shape)


def adopt(new: fx.Node, old: fx.Node) -> fx.Node:
    """Give a fresh whole value the storage of the one it stands for, whose views are copied with theirs."""
    value = old.meta["val"]
    new.meta["val"] = value if new.meta["val"].shape == value.shape else value.view(new.meta["val"].shape)
    return new


class _Tile:
    """The values of one tile."""

    def __init__(self, tiles: Tiles, start: int | fx.Node, length: int) -> None:
        self.tiles = tiles
        self.region = tiles.region
        self.start = start
        self.length = length
        self._values: dict[object, fx.Node] = {}

    def prepare(self, node: fx.Node) -> None:
        """Emit what `node` is made of."""
        for operand in node.all_input_nodes:
            self.operand(node, operand)

    def operand(self, node: fx.Node, operand: fx.Node) -> fx.Node:
        """One argument of `node` in this tile."""
        tokens = self.region.steps[node].operands.get(operand)
        if operand in self.region.inner:
            return self._inner(operand)
        if tokens is None:
            return self.tiles.read(operand)
        if (operand, tokens) not in self._values:
            whole = self.tiles.entry(operand, tokens)
            self._values[operand, tokens] = self.emit(aten.narrow.default, whole, tokens.dim, self.start, self.length)
        return self._values[operand, tokens]

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.tiles.emit(target, *args, **kwargs)

    def add(self, exit_: Wanted, found: fx.Node | None) -> fx.Node:
        """This tile's part of an exit, put to that of the tiles before."""
        node = exit_.node
        if self.region.steps[node].result is not None:
            return self._gather(node, found)
        if node.target is aten.mm.default:
            a, b = (self.operand(node, operand) for operand in node.args if isinstance(operand, fx.Node))
            if exit_.rows is not None:
                a, b = (self._cut(a, exit_.rows), b) if exit_.rows.dim == 0 else (a, self._cut(b, exit_.rows))
            if found is not None:
                return self.emit(aten.addmm_.default, found, a, b)
            return self._first(self.emit(aten.mm.default, a, b), exit_)
        if node.target is aten.sum.dim_IntList:
            part = self._sum(exit_)
            return self.emit(aten.add_.Tensor, found, part) if found is not None else self._first(part, exit_)
        return self.emit(aten.add_.Tensor, self._zero(exit_) if found is None else found, self._inner(node))

    def _first(self, part: fx.Node, exit_: Wanted) -> fx.Node:
        return adopt(part, exit_.node) if exit_.rows is None else part

    def _zero(self, exit_: Wanted) -> fx.Node:
        """Where losses, or weights of labels, are added up: a scalar of at least float32."""
        value = exit_.node.meta["val"]
        dtype = torch.promote_types(value.dtype, torch.float32)
        zero = self.emit(aten.full.default, [], 0.0, dtype=dtype, device=value.device)
        return adopt(zero, exit_.node) if dtype == value.dtype else zero

    def _cut(self, value: fx.Node, rows: Rows) -> fx.Node:
        return self.emit(aten.narrow.default, value, rows.dim, rows.start, rows.length)

    def _gather(self, node: fx.Node, found: fx.Node | None) -> fx.Node:
        tokens = self.region.steps[node].result
        assert tokens is not None
        part, value = self._inner(node), node.meta["val"]
        if found is None:
            shape = tokens.merged(shape_of(node), self.region.tokens)
            found = adopt(self.emit(aten.empty.memory_format, shape, dtype=value.dtype, device=value.device), node)
        self.emit(aten.copy_.default, self.emit(aten.narrow.default, found, tokens.dim, self.start, self.length), part)
        return found

    def _sum(self, exit_: Wanted) -> fx.Node:
        """A sum over dimensions among which all tokens are, of the rows wanted."""
        node, rows = exit_.node, exit_.rows
        source, _, *keep = node.args
        assert isinstance(source, fx.Node)
        tokens, value = self.region.steps[node].operands[source], self.operand(node, source)
        dims = reduced_dims(node)
        if rows is not None:
            kept = [d for d in range(len(shape_of(source))) if (keep and keep[0]) or d not in dims]
            value = self._cut(value, rows.along(_merged_dim(kept[rows.dim], tokens)))
        return self.emit(aten.sum.dim_IntList, value, sorted({_merged_dim(d, tokens) for d in dims}), *keep, **node.kwargs)

    def _inner(self, node: fx.Node) -> fx.Node:
        """The value of a node within this tile."""
        if node not in self._values:
            self._values[node] = _EMIT.get(node.target, _plain)(self, node)
        return self._values[node]

    def args(self, node: fx.Node) -> list[Any]:
        """The arguments of a node, in this tile."""
        args: Any = fx.node.map_arg(node.args, lambda operand: self.operand(node, operand))
        return list(args)

    def tokens(self, node: fx.Node) -> Tokens:
        """Where the tokens of a node are, if it were whole."""
        tokens = self.region.steps[node].result
        assert tokens is not None, f"{node} sums over the tokens"
        return tokens


def _merged_dim(dim: int, tokens: Tokens) -> int:
    """A dimension of a whole value, in a tile's."""
    return dim if dim < tokens.dim else max(tokens.dim, dim - tokens.count + 1)


Emit = Callable[[_Tile, fx.Node], fx.Node]


def _plain(tile: _Tile, node: fx.Node) -> fx.Node:
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda operand: tile.operand(node, operand))
    return tile.emit(node.target, *tile.args(node), **kwargs)


def _through(tile: _Tile, node: fx.Node) -> fx.Node:
    """The same value: within a tile nobody needs another name for it."""
    first: fx.Node = tile.args(node)[0]
    return first


def _view(tile: _Tile, node: fx.Node) -> fx.Node:
    source = tile.args(node)[0]
    shape = tile.tokens(node).merged(shape_of(node), tile.length)
    same = list(source.meta["val"].shape) == shape
    return source if same else tile.emit(aten.reshape.default, source, shape)


def _expand(tile: _Tile, node: fx.Node) -> fx.Node:
    return tile.emit(aten.expand.default, tile.args(node)[0], tile.tokens(node).merged(shape_of(node), tile.length))


def _softmax(tile: _Tile, node: fx.Node) -> fx.Node:
    source, dim, *rest = tile.args(node)
    return tile.emit(node.target, source, _merged_dim(dim % len(shape_of(node)), tile.tokens(node)), *rest)


def _softmax_backward(tile: _Tile, node: fx.Node) -> fx.Node:
    grad, output, dim, *rest = tile.args(node)
    return tile.emit(node.target, grad, output, _merged_dim(dim % len(shape_of(node)), tile.tokens(node)), *rest)


def _reduce(tile: _Tile, node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    tokens = tile.region.steps[node].operands[source]
    value, _, *rest = tile.args(node)
    return tile.emit(node.target, value, [_merged_dim(d, tokens) for d in reduced_dims(node)], *rest, **node.kwargs)


def _nll_forward(tile: _Tile, node: fx.Node) -> fx.Node:
    """A mean over all tokens is no sum of means: tiles give sums."""
    scores, labels, weight, reduction, ignored = tile.args(node)
    return tile.emit(node.target, scores, labels, weight, 2 if reduction == 1 else reduction, ignored)


_EMIT: dict[Any, Emit] = {
    aten.detach.default: _through,
    aten.alias.default: _through,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.expand.default: _expand,
    aten._log_softmax.default: _softmax,
    aten._softmax.default: _softmax,
    aten._log_softmax_backward_data.default: _softmax_backward,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.sum.dim_IntList: _reduce,
    aten.amax.default: _reduce,
    aten.mean.dim: _reduce,
    aten.logsumexp.default: _reduce,
    aten.nll_loss_forward.default: _nll_forward,
}
