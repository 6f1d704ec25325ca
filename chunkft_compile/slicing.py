"""Gradient slices: re-emit the operators that produce a gradient so that they produce only some of its rows.

A rule takes the rows it must produce and says which rows of its inputs it needs; the walk ends at values that already exist
(saved tensors, arriving gradients), of which it takes a view. The dense gradient is never made. Where no rule applies, the
node is computed whole and cut afterwards, and `Slicer.dense` records it.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """`length` positions of dimension `dim`, beginning at `start`: a node of the new graph that holds an integer at run time."""

    dim: int
    start: fx.Node
    length: int

    def along(self, dim: int) -> "Rows":
        """The same rows in another dimension."""
        return Rows(dim, self.start, self.length)


@dataclass
class Slicer:
    """Emits sliced nodes into `graph`.

    `read(node)` gives the whole value of an old node in the new graph, `is_value(node)` says that it exists anyway, and
    `foreign(node, rows)` gives the rows of a value that another segment makes, or None where this segment makes it.
    `fake` runs a call on fake tensors, so that every new node has its `meta["val"]`.
    """

    graph: fx.Graph
    read: Callable[[fx.Node], fx.Node]
    is_value: Callable[[fx.Node], bool]
    foreign: Callable[[fx.Node, Rows], fx.Node | None]
    fake: Callable[[fx.Node], Any]
    dense: list[fx.Node] = field(default_factory=list)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call with its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.fake(node)
        return node

    def rows_of(self, node: fx.Node, rows: Rows) -> fx.Node:
        """The rows of an old node as a node of the new graph."""
        arriving = self.foreign(node, rows)
        if arriving is not None:
            return arriving
        if not self.is_value(node):
            rule = RULES.get(node.target) or (_pointwise if _is_pointwise(node) else None)
            sliced = rule(self, node, rows) if rule else None
            if sliced is not None:
                return sliced
            self.dense.append(node)
            return self.emit(aten.clone.default, self.narrow(self.read(node), rows), memory_format=torch.contiguous_format)
        return self.narrow(self.read(node), rows)

    def narrow(self, node: fx.Node, rows: Rows) -> fx.Node:
        """A view of the rows of a new node."""
        return self.emit(aten.narrow.default, node, rows.dim, rows.start, rows.length)


Rule = Callable[[Slicer, fx.Node, Rows], fx.Node | None]


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _args(node: fx.Node) -> tuple[Any, ...]:
    """Arguments of a call: what they are follows from its target, which the table of rules knows and the type checker does not."""
    return node.args


def _kwargs(s: Slicer, node: fx.Node) -> dict[str, Any]:
    return {key: fx.node.map_arg(value, s.read) for key, value in node.kwargs.items()}


def _same(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """Operators that keep every position where it is: clone, detach, dtype casts."""
    return s.emit(node.target, s.rows_of(_args(node)[0], rows), *_args(node)[1:], **_kwargs(s, node))


def _t(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source = _args(node)[0]
    dim = rows.dim if len(_shape(source)) < 2 else 1 - rows.dim
    return s.emit(node.target, s.rows_of(source, rows.along(dim)))


def _transpose(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source, a, b = _args(node)
    count = len(_shape(source))
    a, b = int(a) % count, int(b) % count
    dim = {a: b, b: a}.get(rows.dim, rows.dim)
    return s.emit(node.target, s.rows_of(source, rows.along(dim)), a, b)


def _permute(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source, order = _args(node)
    count = len(_shape(source))
    return s.emit(node.target, s.rows_of(source, rows.along(int(order[rows.dim]) % count)), order)


def _view(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """A view keeps rows where one input dimension has the same size and the same number of elements before it."""
    source = _args(node)[0]
    old, new = _shape(source), _shape(node)
    before = _product(new[: rows.dim])
    matches = [d for d, size in enumerate(old) if size == new[rows.dim] and _product(old[:d]) == before]
    if not matches:
        return None
    shape = [rows.length if d == rows.dim else size for d, size in enumerate(new)]
    return s.emit(aten.reshape.default, s.rows_of(source, rows.along(matches[-1])), shape)


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _expand(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source = _args(node)[0]
    sliced = _broadcast(s, source, len(_shape(node)), rows)
    shape = [rows.length if d == rows.dim else size for d, size in enumerate(_shape(node))]
    return s.emit(node.target, sliced, shape)


def _broadcast(s: Slicer, operand: Any, count: int, rows: Rows) -> Any:
    """The rows of one operand of a call whose result has `count` dimensions."""
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
        return fx.node.map_arg(operand, s.read)
    shape = _shape(operand)
    dim = rows.dim - (count - len(shape))
    if dim < 0 or shape[dim] == 1:
        return s.read(operand)
    return s.rows_of(operand, rows.along(dim))


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _pointwise(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """Elementwise with broadcasting; tied weights end here, in the sum of their partial gradients."""
    count = len(_shape(node))
    if any(isinstance(argument, list | tuple) for argument in _args(node)):
        return None
    args = [_broadcast(s, argument, count, rows) for argument in _args(node)]
    return s.emit(node.target, *args, **_kwargs(s, node))


def _mm(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    a, b = _args(node)
    if rows.dim == 0:
        return s.emit(node.target, s.rows_of(a, rows), s.read(b))
    return s.emit(node.target, s.read(a), s.rows_of(b, rows))


def _bmm(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    a, b = _args(node)
    left = s.rows_of(a, rows) if rows.dim in (0, 1) else s.read(a)
    right = s.rows_of(b, rows) if rows.dim in (0, 2) else s.read(b)
    return s.emit(node.target, left, right)


def _addmm(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    bias, a, b = _args(node)
    left = s.rows_of(a, rows) if rows.dim == 0 else s.read(a)
    right = s.rows_of(b, rows) if rows.dim == 1 else s.read(b)
    return s.emit(node.target, _broadcast(s, bias, 2, rows), left, right, **_kwargs(s, node))


def _sum(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source, dims, *rest = _args(node)
    count = len(_shape(source))
    reduced = {int(d) % count for d in dims} if dims else set(range(count))
    keep = bool(rest and rest[0])
    kept = list(range(count)) if keep else [d for d in range(count) if d not in reduced]
    dim = kept[rows.dim]
    if dim in reduced:
        return None
    return s.emit(node.target, s.rows_of(source, rows.along(dim)), dims, *rest, **_kwargs(s, node))


def _embedding(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """Rows outside the slice, and the padding row, all go to one extra row behind it, which is dropped.

    The extra row is also named as padding, so nothing is added to it.
    """
    if rows.dim != 0:
        return None
    grad, indices, _, padding, scale = _args(node)
    shifted = s.emit(aten.sub.Tensor, s.read(indices), rows.start)
    outside = s.emit(aten.logical_or.default, s.emit(aten.lt.Scalar, shifted, 0), s.emit(aten.ge.Scalar, shifted, rows.length))
    if int(padding) >= 0:
        outside = s.emit(aten.logical_or.default, outside, s.emit(aten.eq.Scalar, s.read(indices), padding))
    moved = s.emit(aten.masked_fill.Scalar, shifted, outside, rows.length)
    whole = s.emit(node.target, s.read(grad), moved, rows.length + 1, rows.length, scale)
    return s.emit(aten.narrow.default, whole, 0, 0, rows.length)


def _layer_norm(s: Slicer, node: fx.Node, index: int, rows: Rows) -> fx.Node | None:
    """Weight and bias gradients of `native_layer_norm_backward` over one normalised dimension."""
    grad, source, normalized, mean, rstd, *_ = _args(node)
    if len(normalized) != 1 or rows.dim != 0:
        return None
    last = len(_shape(source)) - 1
    leading = list(range(last))
    out = s.narrow(s.read(grad), rows.along(last))
    if index == 1:
        centred = s.emit(aten.sub.Tensor, s.narrow(s.read(source), rows.along(last)), s.read(mean))
        out = s.emit(aten.mul.Tensor, s.emit(aten.mul.Tensor, centred, s.read(rstd)), out)
    return s.emit(aten.sum.dim_IntList, out, leading) if leading else out


def _getitem(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source, index = _args(node)
    if isinstance(source, fx.Node) and source.target is aten.native_layer_norm_backward.default and index in (1, 2):
        return _layer_norm(s, source, int(index), rows)
    return None


RULES: dict[Any, Rule] = {
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.expand.default: _expand,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten._to_copy.default: _same,
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.sum.dim_IntList: _sum,
    aten.embedding_dense_backward.default: _embedding,
    operator.getitem: _getitem,
}
