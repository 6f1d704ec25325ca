"""The rows of a tiny graph's output, by `Slicer` and densely."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_compile.slicing import Rows, Slicer, rule_of

Build = Callable[[fx.Graph, list[fx.Node]], fx.Node]


class Sliced:
    """An output node over inputs, sliced by `Slicer` with nothing computed beforehand but the inputs."""

    def __init__(self, inputs: Sequence[torch.Tensor], build: Build, rows: tuple[int, int, int]) -> None:
        self.inputs = list(inputs)
        self.mode = FakeTensorMode()
        dim, start, length = rows
        self._fill(build)
        self.wanted = _evaluate(self.old, *self.inputs).narrow(dim, start, length)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        for node in self.old.nodes:
            if node.op == "placeholder":
                self.env[node] = self.graph.placeholder(node.name)
                self.env[node].meta["val"] = node.meta["val"]
        begin = self.graph.placeholder("start")
        begin.meta["val"] = 0
        self.slicer = Slicer(self.graph, self._read, lambda node: node.op == "placeholder", lambda node, rows: None, self._fake, rule_of)
        new = self.slicer.rows_of(self.output, Rows(dim, begin, length))
        self.graph.output(new)
        self.got = _evaluate(self.graph, *self.inputs, start)
        calls = (node for node in self.graph.nodes if node.op == "call_function")
        self.made = [node for node in calls if isinstance(node.meta["val"], torch.Tensor)]  # the others are positions

    def _fill(self, build: Build) -> None:
        self.old = fx.Graph()
        nodes = []
        for i, tensor in enumerate(self.inputs):
            node = self.old.placeholder(f"x{i}")
            node.meta["val"] = self.mode.from_tensor(tensor)
            nodes.append(node)
        self.output = build(self.old, nodes)
        self.old.output(self.output)
        for node in self.old.nodes:
            if node.op == "call_function":
                node.meta["val"] = self._fake(node)

    def _fake(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        with self.mode:
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _read(self, node: fx.Node) -> fx.Node:
        """The whole value, computed where it is not an input: what an operand that is not sliced needs."""
        if node not in self.env:
            self.env[node] = self.graph.node_copy(node, self._read)
        return self.env[node]

    def check(self) -> None:
        """Equal rows, no dense fallback, and no node of the dense output's size unless the range is everything."""
        assert self.slicer.dense == []
        assert self.got.dtype == self.wanted.dtype
        tolerance = 2e-2 if self.wanted.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(self.got, self.wanted, rtol=tolerance, atol=tolerance)
        dense = self.output.meta["val"].shape
        if self.wanted.shape != dense:
            assert [node.name for node in self.made if node.meta["val"].shape == dense] == []


def _evaluate(graph: fx.Graph, *arguments: Any) -> torch.Tensor:
    module = torch.nn.Module()
    result: torch.Tensor = fx.Interpreter(module, graph=graph).run(*arguments)
    return result
