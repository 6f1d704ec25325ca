"""Rules for operators that give several gradients at once: norms, convolutions, mixtures of experts."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from chunkft_compile.operators import group_products
from chunkft_compile.slicing.slicer import Rows, Rule, Slicer, args_of, shape_of

aten = torch.ops.aten

ItemRule = Callable[[Slicer, fx.Node, int, Rows], fx.Node | None]
"""From the call, the number of the result and the rows wanted of it."""


def _layer_norm(s: Slicer, call: fx.Node, index: int, rows: Rows) -> fx.Node | None:
    """Weight (1) and bias (2) gradients over one normalised dimension."""
    grad, source, normalized, mean, rstd, *_ = args_of(call)
    if len(normalized) != 1 or rows.dim != 0:
        return None
    last = len(shape_of(source)) - 1
    return _affine(s, grad, source, rows.along(last), None if index == 2 else (s.read(mean), s.read(rstd)))


def _group_norm(s: Slicer, call: fx.Node, index: int, rows: Rows) -> fx.Node | None:
    """Weight (1) and bias (2) gradients; every channel has the mean and the deviation of its group."""
    grad, source, mean, rstd, _, batch, channels, _, groups, _ = args_of(call)

    def of_channel(value: fx.Node) -> fx.Node:
        spread = s.emit(aten.reshape.default, s.read(value), [batch, groups, 1])
        spread = s.emit(aten.expand.default, spread, [batch, groups, channels // groups])
        cut = s.narrow(s.emit(aten.reshape.default, spread, [batch, channels]), rows.along(1))
        return s.emit(aten.reshape.default, cut, [batch, rows.length, *([1] * (len(shape_of(source)) - 2))])

    return _affine(s, grad, source, rows.along(1), None if index == 2 else (of_channel(mean), of_channel(rstd)))


def _batch_norm(s: Slicer, call: fx.Node, index: int, rows: Rows) -> fx.Node | None:
    """Weight (1) and bias (2) gradients from the statistics of the batch, which training uses."""
    grad, source, _, _, _, mean, rstd, train, _, _ = args_of(call)
    if not train:
        return None

    def of_channel(value: fx.Node) -> fx.Node:
        return s.emit(aten.reshape.default, s.narrow(s.read(value), rows), [rows.length, *([1] * (len(shape_of(source)) - 2))])

    return _affine(s, grad, source, rows.along(1), None if index == 2 else (of_channel(mean), of_channel(rstd)))


def _affine(s: Slicer, grad: fx.Node, source: fx.Node, rows: Rows, statistics: tuple[fx.Node, fx.Node] | None) -> fx.Node:
    """Sums over every dimension but that of `rows`: of the gradient, or of it times the normalised input, where there are statistics."""
    out = s.narrow(s.read(grad), rows)
    if statistics is not None:
        mean, rstd = statistics
        centred = s.emit(aten.sub.Tensor, s.narrow(s.read(source), rows), mean)
        out = s.emit(aten.mul.Tensor, s.emit(aten.mul.Tensor, centred, rstd), out)
    others = [dim for dim in range(len(shape_of(source))) if dim != rows.dim]
    return s.emit(aten.sum.dim_IntList, out, others) if others else out


def _convolution(s: Slicer, call: fx.Node, index: int, rows: Rows) -> fx.Node | None:
    """Weight gradient (1).

    Rows of the weight are output channels (input channels of a transposed one). With groups, rows of input and output must go
    together: so they do where every group has one of each, which is a depthwise convolution.
    """
    grad, source, weight, _, stride, padding, dilation, transposed, output_padding, groups, _ = args_of(call)
    depthwise = groups > 1 and shape_of(weight)[0] == groups and shape_of(weight)[1] == 1
    if rows.dim > 1 or (groups > 1 and not (depthwise and rows.dim == 0)):
        return None
    of_output = (rows.dim == 0) != transposed or depthwise
    of_input = (rows.dim == 1) != transposed or depthwise
    return s.emit(
        operator.getitem,
        s.emit(
            call.target,
            s.factor(grad, rows.along(1)) if of_output else s.read(grad),
            s.factor(source, rows.along(1)) if of_input else s.read(source),
            s.narrow(s.read(weight), rows),
            None,
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            rows.length if depthwise else groups,
            [False, True, False],
        ),
        1,
    )


def _weight_norm(s: Slicer, call: fx.Node, index: int, rows: Rows) -> fx.Node | None:
    """Gradients of the direction (0) and the length (1) where each row has a length of its own."""
    grad, direction, length, norms, dim = args_of(call)
    if dim != 0 or rows.dim != 0:
        return None
    args = (s.rows_of(grad, rows), *(s.narrow(s.read(value), rows) for value in (direction, length, norms)), 0)
    return s.emit(operator.getitem, s.emit(call.target, *args), index)


def _group_products(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """Weight gradient [experts, in, out] of a product in groups: of some experts, or of some of their inputs or outputs."""
    source, grad, ends, first, count = args_of(node)
    if rows.dim == 0:
        return s.emit(node.target, s.read(source), s.read(grad), s.read(ends), s.moved(rows, first).start, rows.length)
    left = s.factor(source, rows.along(1)) if rows.dim == 1 else s.read(source)
    right = s.factor(grad, rows.along(1)) if rows.dim == 2 else s.read(grad)
    return s.emit(node.target, left, right, s.read(ends), first, count)


def _grouped_mm(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    """`[in, tokens] x [tokens, out]` in groups of tokens, one result for each expert: the weight gradient of `torch._grouped_mm`."""
    a, b, *rest = args_of(node)
    ends, bias = [*rest, *[None] * 2][:2]
    if ends is None or len(shape_of(a)) != 2 or len(shape_of(b)) != 2 or bias is not None:
        return None
    left = s.factor(a, rows.along(0)) if rows.dim == 1 else s.read(a)
    right = s.factor(b, rows.along(1)) if rows.dim == 2 else s.read(b)
    begin, count = (rows.start, rows.length) if rows.dim == 0 else (0, shape_of(node)[0])
    return s.emit(group_products, s.emit(aten.t.default, left), right, s.read(ends), begin, count)


ITEMS: dict[Any, tuple[ItemRule, tuple[int, ...]]] = {
    aten.native_layer_norm_backward.default: (_layer_norm, (1, 2)),
    aten.native_group_norm_backward.default: (_group_norm, (1, 2)),
    aten.native_batch_norm_backward.default: (_batch_norm, (1, 2)),
    aten.convolution_backward.default: (_convolution, (1,)),
    aten._weight_norm_interface_backward.default: (_weight_norm, (0, 1)),
}
"""The rules, and of which results."""


def _getitem(s: Slicer, node: fx.Node, rows: Rows) -> fx.Node | None:
    call, index = args_of(node)
    if not isinstance(call, fx.Node):
        return None
    rule, results = ITEMS.get(call.target, (None, ()))
    return rule(s, call, int(index), rows) if rule is not None and index in results else None


CALLS: dict[Any, Rule] = {operator.getitem: _getitem, aten._grouped_mm.default: _grouped_mm, group_products: _group_products}
