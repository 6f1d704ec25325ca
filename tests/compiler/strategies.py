"""Shapes, ranges and calls that tests of slicing rules draw."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx

from tests.compiler.sliced import Build

sizes = st.integers(2, 6)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@st.composite
def ranges(draw: st.DrawFn, size: int) -> tuple[int, int]:
    """Start and length of a non-empty range."""
    start = draw(st.integers(0, size - 1))
    return start, draw(st.integers(1, size - start))


@st.composite
def rows_in(draw: st.DrawFn, shape: Sequence[int]) -> tuple[int, int, int]:
    """A dimension and a range of it."""
    dim = draw(st.integers(0, len(shape) - 1))
    return (dim, *draw(ranges(shape[dim])))


def call_of(target: Any, *more: Any, **kwargs: Any) -> Build:
    """One call of `target` over the negative of each input, so that inputs of the call are not values yet."""

    def build(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        made = [graph.call_function(torch.ops.aten.neg.default, (node,)) for node in nodes]
        return graph.call_function(target, (*made, *more), kwargs)

    return build
