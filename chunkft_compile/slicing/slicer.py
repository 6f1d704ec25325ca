"""What the rules for slices work with: the rows that are wanted, and the graph that they emit into."""

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
    `fake` runs a call on fake tensors, so that every new node has its `meta["val"]`; `rule_of` looks up the rule for a node's operator.
    """

    graph: fx.Graph
    read: Callable[[fx.Node], fx.Node]
    is_value: Callable[[fx.Node], bool]
    foreign: Callable[[fx.Node, Rows], fx.Node | None]
    fake: Callable[[fx.Node], Any]
    rule_of: Callable[[fx.Node], "Rule | None"]
    dense: list[fx.Node] = field(default_factory=list)
    _of_factor: bool = False

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
        if self.is_value(node):
            return self.narrow(self.read(node), rows)
        rule = self.rule_of(node)
        sliced = rule(self, node, rows) if rule else None
        if sliced is not None:
            return sliced
        if self._of_factor:
            return self.narrow(self.read(node), rows)
        self.dense.append(node)
        return self.emit(aten.clone.default, self.narrow(self.read(node), rows), memory_format=torch.contiguous_format)

    def factor(self, node: fx.Node, rows: Rows) -> fx.Node:
        """The rows of a factor of the gradient: an activation, or the gradient of one.

        Where no rule applies to it, it is computed whole like any other activation, which does not make the parameter's gradient dense.
        """
        before, self._of_factor = self._of_factor, True
        try:
            return self.rows_of(node, rows)
        finally:
            self._of_factor = before

    def moved(self, rows: Rows, by: int) -> Rows:
        """Rows that begin `by` later."""
        if not by:
            return rows
        start = self.graph.call_function(operator.add, (rows.start, by))
        start.meta["val"] = rows.start.meta["val"] + by
        return Rows(rows.dim, start, rows.length)

    def narrow(self, node: fx.Node, rows: Rows) -> fx.Node:
        """A view of the rows of a new node."""
        return self.emit(aten.narrow.default, node, rows.dim, rows.start, rows.length)


Rule = Callable[[Slicer, fx.Node, Rows], fx.Node | None]


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's tensor."""
    return tuple(node.meta["val"].shape)


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """Arguments of a call: what they are follows from its target, which the table of rules knows and the type checker does not."""
    return node.args


def kwargs_of(s: Slicer, node: fx.Node) -> dict[str, Any]:
    """Keyword arguments of a call, in the new graph."""
    return {key: fx.node.map_arg(value, s.read) for key, value in node.kwargs.items()}


def operand_rows(s: Slicer, operand: Any, count: int, rows: Rows) -> Any:
    """The rows of one operand, with broadcasting, of a call whose result has `count` dimensions."""
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
        return fx.node.map_arg(operand, s.read)
    shape = shape_of(operand)
    dim = rows.dim - (count - len(shape))
    if dim < 0 or shape[dim] == 1:
        return s.read(operand)
    return s.rows_of(operand, rows.along(dim))
