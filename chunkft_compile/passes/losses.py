"""Losses whose kernels keep a storage as large as their inputs for a result of one element."""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_compile.passes.rewriting import Rewriter, refresh

aten = torch.ops.aten

_REDUCTION = {
    aten.mse_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
    aten.soft_margin_loss.default: 2,
    aten.binary_cross_entropy.default: 3,
}
"""Operator -> the place of `reduction` among its arguments. All reduced losses of torch 2.13.0 were tried; these four reduce in place."""

_NONE, _MEAN = 0, 1  # of at::Reduction; 2 is the sum


def reduce_losses(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """The mean or sum of a loss as a call of its own, as the kernel does inside: the storage of all elements then ends with it.

    The kernel gives its result the storage in which the elements were, which fake kernels (2.13.0) do not say.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _REDUCTION:
            continue
        place = _REDUCTION[node.target]
        reduction: Any = node.args[place] if len(node.args) > place else _MEAN
        if reduction == _NONE:
            continue
        inputs = (*node.args[:place], *([None] * (place - len(node.args))), _NONE, *node.args[place + 1 :])
        rewriter = Rewriter(graph, fake_mode, node)
        elements = rewriter.emit(node.target, *inputs, **node.kwargs)
        new = rewriter.emit(aten.mean.default if reduction == _MEAN else aten.sum.default, elements)
        rewriter.replace(new)
        refresh(new, fake_mode)
