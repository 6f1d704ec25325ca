"""Rules for gradients of lookups: rows of a table that indices at run time choose.

Rows outside the slice all go to one extra row behind it, which is dropped.
"""

from typing import Any

import torch
from torch import fx

from chunkft_compile.slicing.slicer import Rows, Rule, Slicer, args_of, shape_of

aten = torch.ops.aten


def _shifted(s: Slicer, indices: fx.Node, rows: Rows) -> tuple[fx.Node, fx.Node]:
    """Indices counted from the first row of the slice, and which of them are outside."""
    shifted = s.emit(aten.sub.Tensor, indices, rows.start)
    return shifted, s.emit(aten.logical_or.default, s.emit(aten.lt.Scalar, shifted, 0), s.emit(aten.ge.Scalar, shifted, rows.length))


def _embedding(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """The padding row goes to the extra row too, and that one is named as padding, so nothing is added to it."""
    if rows.dim != 0:
        return None
    grad, indices, _, padding, scale = args_of(node)
    shifted, outside = _shifted(s, s.read(indices), rows)
    if int(padding) >= 0:
        outside = s.emit(aten.logical_or.default, outside, s.emit(aten.eq.Scalar, s.read(indices), padding))
    moved = s.emit(aten.masked_fill.Scalar, shifted, outside, rows.length)
    whole = s.emit(node.target, s.read(grad), moved, rows.length + 1, rows.length, scale)
    return s.emit(aten.narrow.default, whole, 0, 0, rows.length)


def _index_put(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """`table[indices]` read forward: values added up into a table of zeros, whose first dimension is looked up in."""
    table, indices, values, accumulate = (*args_of(node), False)[:4]
    if not accumulate or len(indices) != 1 or indices[0] is None or not _is_zeros(table):
        return None
    index, value = indices[0], table.meta["val"]
    if index.meta["val"].dtype not in (torch.int32, torch.int64):  # a mask chooses how many rows there are
        return None
    shape, dtype, device = list(shape_of(table)), value.dtype, value.device
    if rows.dim != 0:
        shape[rows.dim] = rows.length
        zeros = s.emit(aten.zeros.default, shape, dtype=dtype, device=device)
        return s.emit(node.target, zeros, [s.read(index)], _value_rows(s, values, index, rows), True)
    positive = s.emit(aten.remainder.Scalar, s.read(index), shape[0])  # indices may count from the end
    shifted, outside = _shifted(s, positive, rows)
    moved = s.emit(aten.masked_fill.Scalar, shifted, outside, rows.length)
    zeros = s.emit(aten.zeros.default, [rows.length + 1, *shape[1:]], dtype=dtype, device=device)
    whole = s.emit(node.target, zeros, [moved], s.read(values), True)
    return s.emit(aten.narrow.default, whole, 0, 0, rows.length)


def _value_rows(s: Slicer, values: fx.Node, index: fx.Node, rows: Rows) -> fx.Node:
    dim = rows.dim - 1 + len(shape_of(index))
    return s.factor(values, rows.along(dim))


def _is_zeros(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target in {aten.full.default, aten.new_full.default, aten.full_like.default}:
        return bool(node.args[-1] == 0)
    return node.target in {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}


GATHERS: dict[Any, Rule] = {
    aten.embedding_dense_backward.default: _embedding,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
}
