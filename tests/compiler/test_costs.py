"""Operator costs: known temporaries, views for nothing, one run per distinct call."""

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chunkft_compile import costs as costs_module
from chunkft_compile.costs import OperatorCosts
from chunkft_compile.runtime.meter import CallCost

aten = torch.ops.aten
CPU = torch.device("cpu")


def _graph(shape: tuple[int, ...], dtype: torch.dtype, *calls: tuple[Any, ...]) -> tuple[fx.Graph, list[fx.Node]]:
    """A placeholder and calls on it: (target, more arguments)."""
    graph, mode = fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(shape, dtype=dtype)
    nodes = []
    for target, *more in calls:
        node = graph.call_function(target, (x, *more))
        with mode:
            node.meta["val"] = target(x.meta["val"], *more)
        nodes.append(node)
    graph.output(tuple(nodes))
    return graph, nodes


def _measured(graph: fx.Graph) -> OperatorCosts:
    found = OperatorCosts(CPU)
    found.measure([graph])
    return found


def test_a_bf16_mean_copies_its_input_to_fp32() -> None:
    graph, (mean, double) = _graph((64, 256), torch.bfloat16, (aten.mean.dim, [-1]), (aten.mul.Tensor, 2.0))
    found = _measured(graph)
    assert found.temporary_nbytes(mean) >= 64 * 256 * 4
    assert found.temporary_nbytes(double) < 64  # the number as a tensor


def test_views_take_no_bytes_and_a_little_time() -> None:
    graph, nodes = _graph((4, 6), torch.float32, (aten.t.default,), (aten.view.default, [24]), (aten.detach.default,))
    found = _measured(graph)
    assert [found.temporary_nbytes(node) for node in nodes] == [0, 0, 0]
    assert all(0 < found.us(node) < 100 for node in nodes)


def test_time_grows_with_work() -> None:
    graph, (small, large) = _graph((256, 512), torch.float32, (aten.sum.default,), (aten.exp.default,))
    found = _measured(graph)
    assert found.us(large) > 0
    assert found.graph_us(graph) == found.us(small) + found.us(large)


def test_equal_calls_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def count(calls: list[Any], device: torch.device) -> list[CallCost]:
        counts.append(len(calls))
        return [CallCost(0, 0, 0.0)] * len(calls)

    monkeypatch.setattr(costs_module, "measure_calls", count)
    graph, _ = _graph((4, 6), torch.float32, (aten.exp.default,), (aten.exp.default,), (aten.mul.Tensor, 2.0), (aten.mul.Tensor, 3.0))
    found = OperatorCosts(CPU)
    found.measure([graph, graph])
    found.measure([_graph((4, 6), torch.float32, (aten.exp.default,))[0]])
    found.measure([_graph((4, 7), torch.float32, (aten.exp.default,))[0]])
    assert counts == [3, 1]


def test_calls_that_write_are_measured_wherever_they_write(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def count(calls: list[Any], device: torch.device) -> list[CallCost]:
        measured.append(len(calls))
        return [CallCost(700, 0, 1.0)] * len(calls)

    monkeypatch.setattr(costs_module, "measure_calls", count)
    graph, mode = fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(6, 4)
    written = []
    for start in (0, 2, 4):
        rows = graph.call_function(aten.narrow.default, (x, 0, start, 2))
        written.append(graph.call_function(aten.add_.Tensor, (rows, 1.0)))
        with mode:
            rows.meta["val"] = x.meta["val"].narrow(0, start, 2)
            written[-1].meta["val"] = rows.meta["val"].add_(1.0)
    graph.output((x,))
    found = _measured(graph)
    assert measured == [1]
    assert [found.temporary_nbytes(node) for node in written] == [700] * 3
    assert all(found.us(node) == 10**6 for node in written)


def test_measuring_draws_nothing() -> None:
    graph, _ = _graph((4, 6), torch.float32, (aten.native_dropout.default, 0.5, True))
    torch.manual_seed(0)
    wanted = torch.rand(4)
    torch.manual_seed(0)
    _measured(graph)
    assert torch.equal(torch.rand(4), wanted)


def test_indices_are_valid_in_a_measured_call() -> None:
    graph, mode = fx.Graph(), FakeTensorMode()
    table, indices = graph.placeholder("table"), graph.placeholder("indices")
    with mode:
        table.meta["val"], indices.meta["val"] = torch.empty(5, 3), torch.empty(7, dtype=torch.int64)
        node = graph.call_function(aten.embedding.default, (table, indices))
        node.meta["val"] = torch.empty(7, 3)
    graph.output((node,))
    assert _measured(graph).temporary_nbytes(node) == 0
