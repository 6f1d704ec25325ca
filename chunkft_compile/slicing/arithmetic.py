"""Rules for elementwise operators, sums and matrix products."""

from typing import Any

import torch
from torch import fx

from chunkft_compile.slicing.slicer import Rows, Rule, Slicer, args_of, kwargs_of, operand_rows, shape_of

aten = torch.ops.aten


def is_pointwise(node: fx.Node) -> bool:
    """Whether torch says that an operator computes every element from the elements at its place."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def pointwise(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """Elementwise with broadcasting; tied weights end here, in the sum of their partial gradients."""
    count = len(shape_of(node))
    if any(isinstance(argument, list | tuple) for argument in args_of(node)):
        return None
    args = [operand_rows(s, argument, count, rows) for argument in args_of(node)]
    return s.emit(node.target, *args, **kwargs_of(s, node))


def _sum(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    source, dims, *rest = args_of(node)
    count = len(shape_of(source))
    reduced = {int(d) % count for d in dims} if dims else set(range(count))
    keep = bool(rest and rest[0])
    kept = list(range(count)) if keep else [d for d in range(count) if d not in reduced]
    dim = kept[rows.dim]
    if dim in reduced:
        return None
    return s.emit(node.target, s.factor(source, rows.along(dim)), dims, *rest, **kwargs_of(s, node))


def _mm(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    a, b = args_of(node)
    if rows.dim == 0:
        return s.emit(node.target, s.factor(a, rows), s.read(b))
    return s.emit(node.target, s.read(a), s.factor(b, rows))


def _bmm(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    a, b = args_of(node)
    left = s.factor(a, rows) if rows.dim in (0, 1) else s.read(a)
    right = s.factor(b, rows) if rows.dim in (0, 2) else s.read(b)
    return s.emit(node.target, left, right)


def _addmm(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    bias, a, b = args_of(node)
    left = s.factor(a, rows) if rows.dim == 0 else s.read(a)
    right = s.factor(b, rows) if rows.dim == 1 else s.read(b)
    return s.emit(node.target, operand_rows(s, bias, 2, rows), left, right, **kwargs_of(s, node))


ARITHMETIC: dict[Any, Rule] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.sum.dim_IntList: _sum,
}
