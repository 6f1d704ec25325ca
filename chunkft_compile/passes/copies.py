"""Copies into a part of a tensor, as functionalisation writes them."""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_compile.passes.rewriting import Rewriter, refresh

aten = torch.ops.aten


def write_copies_anew(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """`copy(into, source)` as the values of `source` alone: nothing of `into` is left, but the kernel clones its whole storage first.

    That storage may be much larger than the part that is written, and fake kernels (2.13.0) do not say so.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.copy.default:
            continue
        source: Any = node.args[1]
        like: torch.Tensor = node.meta["val"]
        rewriter = Rewriter(graph, fake_mode, node)
        new = source
        if new.meta["val"].shape != like.shape:
            new = rewriter.emit(aten.expand.default, new, list(like.shape))
        if new.meta["val"].dtype != like.dtype:
            new = rewriter.emit(aten._to_copy.default, new, dtype=like.dtype)
        new = rewriter.emit(aten.clone.default, new, memory_format=torch.contiguous_format)
        rewriter.replace(new)
        refresh(new, fake_mode)
