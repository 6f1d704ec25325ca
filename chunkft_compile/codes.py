"""Codes: what lowering makes of a segment, and the small steps every code is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

# Private (2.13.0): generates `forward(self, args)` that empties the list it is given, so that arguments die at their last use.
from torch.fx.graph import _BoxedCodeGen

from chunkft_compile.capture import Capture
from chunkft_compile.fakes import fake_value
from chunkft_compile.liveness import Footprint
from chunkft_compile.sizes import Expression

SERVES = "chunkft_serves"
"""Key in the meta of a lowered backward node: the index of the only demand it serves, or the parameter if that is demanded whole."""


@dataclass(frozen=True, order=True)
class Demand:
    """A backward value of a segment, by position: all of it, or `length` rows from a start given at run time."""

    position: int
    length: int | None = None


@dataclass(frozen=True)
class Read:
    """An argument of a code: the value at `position` of the segment; `demand` is the index of the demand whose rows it is cut to."""

    position: int
    demand: int | None = None


@dataclass(frozen=True, eq=False)
class Code:
    """A callable shared by all segments of a kind. Its Python is written when it is first asked for.

    `call(args)` takes a list: the tensors of `reads`, then one integer start for every demand with a length, then a number for each of
    `sizes`. It empties the list. It returns one tensor for every entry of `writes` (forward) or of the demands (backward). `dense` are
    the demands whose gradient had to be computed whole; `option` is what it was lowered for.
    """

    graph: fx.Graph
    reads: tuple[Read, ...]
    writes: tuple[int, ...]
    demands: tuple[Demand, ...]
    dense: tuple[int, ...]
    option: str = ""
    sizes: tuple[Expression, ...] = ()

    @cached_property
    def module(self) -> fx.GraphModule:
        """The graph made callable. Symbolic sizes must be its inputs by now, see `take_sizes`."""
        self.graph.set_codegen(_BoxedCodeGen())
        self.graph.lint()
        return fx.GraphModule(torch.nn.Module(), self.graph)

    @cached_property
    def call(self) -> Callable[[list[Any]], tuple[Any, ...]]:
        """The generated function."""
        call: Callable[[list[Any]], tuple[Any, ...]] = self.module.forward
        return call

    @cached_property
    def footprint(self) -> Footprint:
        """Its memory, from the fake values of its graph."""
        return Footprint(self.graph)


def emit(graph: fx.Graph, capture: Capture, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call with its fake value."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = fake_value(node, capture.fake_mode)
    return node
