"""Token rules: which dimensions of a value are its tokens, operator by operator.

NOTE [the tokens of a value]
Models flatten [batch, length, vocab] to [tokens, vocab] and back. A tile is a range of the flattened tokens: in a tile's value
the token dimensions are one, whatever they are in the whole value. `Tokens` says which ones they are there.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


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


Tiled = Mapping[fx.Node, Tokens]
Rule = Callable[[fx.Node, Tiled, int], Step | None]
"""From a node, the tokens of its inputs that are tiled, and the number of tokens: its step, or None where it cannot be tiled."""


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's tensor."""
    return tuple(node.meta["val"].shape)


def is_tensor(argument: Any) -> bool:
    """Whether an argument is a node whose value is one tensor."""
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
        if not is_tensor(operand):
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
    before = product(old[: at.dim])
    for dim in range(len(new)):
        for stop in range(dim + 1, len(new) + 1):
            if product(new[:dim]) == before and product(new[dim:stop]) == tokens:
                return Tokens(dim, stop - dim)
    return None


def product(sizes: Sequence[int]) -> int:
    """The number of elements of a shape."""
    return math.prod(sizes)


def _t(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    at = _first(node, tiled)
    return Step(Tokens(1 - at.dim), tiled) if at and at.count == 1 and len(shape_of(node)) == 2 else None


def _mm(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    """Tokens of the left rows or the right columns stay, those that are multiplied away are summed over."""
    *bias, a, b = node.args
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
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
    assert isinstance(grad, fx.Node)
    assert isinstance(output, fx.Node)
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
    """Its result is a tuple of what `_item` says. Tiles need both items: a mean is the sum of losses over that of weights."""
    scores, labels, *_ = node.args
    operands = _loss_operands(scores, labels, tiled)
    return Step(Tokens(0), operands) if operands and {user.args[1] for user in node.users} == {0, 1} else None


def _nll_backward(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    grad, scores, labels, _, reduction, *_ = node.args
    operands = _loss_operands(scores, labels, tiled)
    if operands is None:
        return None
    assert isinstance(grad, fx.Node)
    return Step(Tokens(0), operands | ({grad: Tokens(0)} if reduction == 0 else {}))


def _loss_operands(scores: Any, labels: Any, tiled: Tiled) -> dict[fx.Node, Tokens] | None:
    fits = tiled == {scores: Tokens(0)} and len(shape_of(scores)) == 2
    return {scores: Tokens(0), labels: Tokens(0)} if fits else None


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


def step_of(node: fx.Node, tiled: Tiled, tokens: int) -> Step | None:
    """How tiles compute `node`, some of whose inputs are `tiled`; None where no rule says so."""
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    rule = RULES.get(node.target) or (_pointwise if pointwise else None)
    return rule(node, tiled, tokens) if rule else None
