"""Calls that give several gradients at once, written as calls that give one each, so that each is made only where it is wanted."""

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_compile.operators import group_products
from chunkft_compile.passes.rewriting import Rewriter

aten = torch.ops.aten

_EXPERTS_BACKWARD = "transformers.grouped_mm_fallback_backward.default"
"""Known by its name: transformers registers it when it is imported, and need not be there."""


def sum_biases(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """The bias gradient of a convolution as a sum of its own: oneDNN (2.13.0) makes the dense weight gradient along with it."""
    for item, call in _items(graph, str(aten.convolution_backward.default), 2):
        grad: Any = call.args[0]
        rewriter = Rewriter(graph, fake_mode, item)
        dims = [dim for dim in range(grad.meta["val"].dim()) if dim != 1]
        rewriter.replace(rewriter.emit(aten.sum.dim_IntList, grad, dims))


def split_experts(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Both gradients of a product in groups of tokens, one group for each expert: with each other they cannot be sliced.

    [tokens, in] x [experts, in, out]: that of the tokens is the same product with the transposed weights.
    """
    for index in (0, 1):
        for item, call in _items(graph, _EXPERTS_BACKWARD, index):
            tokens, weight, ends, grad = call.args
            rewriter = Rewriter(graph, fake_mode, item)
            if index == 0:
                transposed = rewriter.emit(aten.transpose.int, weight, -2, -1)
                new = rewriter.emit(torch.ops.transformers.grouped_mm_fallback.default, grad, transposed, ends)
            else:
                new = rewriter.emit(group_products, tokens, grad, ends, 0, item.meta["val"].shape[0])
            rewriter.replace(new)
    graph.eliminate_dead_code(lambda node: str(node.target) != _EXPERTS_BACKWARD)


def _items(graph: fx.Graph, target: str, index: int) -> list[tuple[fx.Node, fx.Node]]:
    """Every use of one result of such a call, and the call."""
    calls = [node for node in graph.nodes if node.op == "call_function" and str(node.target) == target]
    return [(user, call) for call in calls for user in list(call.users) if user.target is operator.getitem and user.args[1] == index]
