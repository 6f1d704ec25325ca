"""Rules for operators that move values and compute nothing: views, copies, pieces and their gradients."""

import math
from typing import Any

import torch
from torch import fx

from chunkft_compile.slicing.slicer import Rows, Rule, Slicer, args_of, kwargs_of, operand_rows, shape_of

aten = torch.ops.aten


def _same(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """Operators that keep every position where it is: clone, detach, dtype casts."""
    return s.emit(node.target, s.rows_of(args_of(node)[0], rows), *args_of(node)[1:], **kwargs_of(s, node))


def _t(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source = args_of(node)[0]
    dim = rows.dim if len(shape_of(source)) < 2 else 1 - rows.dim
    return s.emit(node.target, s.rows_of(source, rows.along(dim)))


def _transpose(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source, a, b = args_of(node)
    count = len(shape_of(source))
    a, b = int(a) % count, int(b) % count
    dim = {a: b, b: a}.get(rows.dim, rows.dim)
    return s.emit(node.target, s.rows_of(source, rows.along(dim)), a, b)


def _permute(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source, order = args_of(node)
    count = len(shape_of(source))
    return s.emit(node.target, s.rows_of(source, rows.along(int(order[rows.dim]) % count)), order)


def _view(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """A view keeps rows where one input dimension has the same size and the same number of elements before it."""
    source = args_of(node)[0]
    old, new = shape_of(source), shape_of(node)
    before = math.prod(new[: rows.dim])
    matches = [d for d, size in enumerate(old) if size == new[rows.dim] and math.prod(old[:d]) == before]
    if not matches:
        return None
    shape = [rows.length if d == rows.dim else size for d, size in enumerate(new)]
    return s.emit(aten.reshape.default, s.rows_of(source, rows.along(matches[-1])), shape)


def _expand(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source = args_of(node)[0]
    sliced = operand_rows(s, source, len(shape_of(node)), rows)
    shape = [rows.length if d == rows.dim else size for d, size in enumerate(shape_of(node))]
    return s.emit(node.target, sliced, shape)


def _unsqueeze(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source, dim = args_of(node)
    dim = int(dim) % len(shape_of(node))
    if rows.dim == dim:
        return None
    return s.emit(node.target, s.rows_of(source, rows.along(rows.dim - (rows.dim > dim))), dim)


def _squeeze(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source, dims = args_of(node)
    count = len(shape_of(source))
    gone = {int(d) % count for d in (dims if isinstance(dims, list | tuple) else [dims])}
    gone = {d for d in gone if shape_of(source)[d] == 1}
    kept = [d for d in range(count) if d not in gone]
    return s.emit(aten.squeeze.dims, s.rows_of(source, rows.along(kept[rows.dim])), sorted(gone))


def _slice(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """A range of a dimension, with its step. Along the rows they begin so much later."""
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    source, dim, begin, end, step = args_of(node) + defaults[len(args_of(node)) :]
    dim, size = int(dim) % len(shape_of(source)), shape_of(source)[int(dim)]
    first, _, step = slice(begin, end, step).indices(size)
    if rows.dim != dim:
        return s.emit(node.target, s.rows_of(source, rows), dim, begin, end, step)
    if step != 1:
        return None
    return s.rows_of(source, s.moved(rows, first))


def _select(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source, dim, index = args_of(node)
    dim = int(dim) % len(shape_of(source))
    return s.emit(node.target, s.rows_of(source, rows.along(rows.dim + (rows.dim >= dim))), dim, index)


def _cat(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """Along another dimension. Where the parts follow each other along the rows, which part a row is in is known at run time only."""
    parts, dim = (*args_of(node), 0)[:2]
    count = len(shape_of(node))
    if int(dim) % count == rows.dim or any(len(shape_of(part)) != count for part in parts):
        return None
    return s.emit(node.target, [s.rows_of(part, rows) for part in parts], dim)


def _slice_backward(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """Zeros with the gradient of a slice in it."""
    grad, sizes, dim, begin, end, step = args_of(node)
    dim = int(dim) % len(sizes)
    if rows.dim != dim:
        return s.emit(node.target, s.rows_of(grad, rows), _cut(sizes, rows), dim, begin, end, step)
    first, stop, step = slice(begin, end, step).indices(sizes[dim])
    return _placed(s, grad, rows, first, stop) if step == 1 else None


def _select_backward(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """Zeros with the gradient of one position in it."""
    grad, sizes, dim, index = args_of(node)
    dim = int(dim) % len(sizes)
    if rows.dim != dim:
        return s.emit(node.target, s.rows_of(grad, rows.along(rows.dim - (rows.dim > dim))), _cut(sizes, rows), dim, index)
    return None


def _placed(s: Slicer, grad: fx.Node, rows: Rows, first: int, stop: int) -> fx.Node:
    """Rows of zeros in which the rows of `grad` stand at `first .. stop - 1`: those that meet are gathered, the others are masked."""
    value = grad.meta["val"]
    at = s.emit(aten.add.Tensor, s.emit(aten.arange.start, 0, rows.length, dtype=torch.int64, device=value.device), rows.start)
    inside = s.emit(aten.logical_and.default, s.emit(aten.ge.Scalar, at, first), s.emit(aten.lt.Scalar, at, stop))
    index = s.emit(aten.clamp.default, s.emit(aten.sub.Tensor, at, first), 0, stop - first - 1)
    found = s.emit(aten.index_select.default, s.read(grad), rows.dim, index)
    shape = [rows.length if d == rows.dim else 1 for d in range(value.dim())]
    outside = s.emit(aten.reshape.default, s.emit(aten.logical_not.default, inside), shape)
    return s.emit(aten.masked_fill.Scalar, found, outside, 0)


def _cut(sizes: Any, rows: Rows) -> list[int]:
    return [rows.length if d == rows.dim else int(size) for d, size in enumerate(sizes)]


VIEWS: dict[Any, Rule] = {
    aten.t.default: _t,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.expand.default: _expand,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.slice_backward.default: _slice_backward,
    aten.select_backward.default: _select_backward,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten._to_copy.default: _same,
}
