"""Captures with symbolic sizes: the same graph as one with numbers, what they hold for, and codes that take sizes as arguments."""

import functools
from typing import Any

import pytest
import torch
from torch import fx, nn

from chunkft_compile.capture import Capture, capture, capture_symbolic
from chunkft_compile.errors import CaptureError
from chunkft_compile.segments import cut
from chunkft_compile.sizes import Symbols, expression_of, is_symbolic, symbols_allowed, take_sizes
from chunkft_compile.twins import Twin, is_same_graph
from tests.models import Mlp, llama, token_batch

aten = torch.ops.aten


class Branching(nn.Module):
    """Another graph for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return torch.relu(y) if x.shape[0] > 20 else torch.tanh(y)


class Counting(nn.Module):
    """A result whose size depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y[y > 0]


@functools.cache
def _llama() -> tuple[Capture, Twin]:
    model = llama().train()
    numbers = capture(model, (), token_batch(rows=4, tokens=9) | {"use_cache": False})
    traced = capture_symbolic(model, (), token_batch(rows=37, tokens=17) | {"use_cache": False}, [["rows", "tokens"]] * 2, numbers.graph)
    return numbers, Twin(*traced)


def _rows(model: nn.Module, rows: int) -> Twin:
    numbers = capture(model, (torch.zeros(rows, 6),), {})
    return Twin(*capture_symbolic(model, (torch.zeros(rows, 6),), {}, [["rows", None]], numbers.graph))


def _batch(rows: int, tokens: int) -> list[torch.Tensor]:
    return list(token_batch(rows=rows, tokens=tokens).values())


def test_a_twin_at_some_sizes_is_the_capture_of_these_sizes() -> None:
    numbers, twin = _llama()
    sizes = twin.sizes(_batch(4, 9))
    assert sizes is not None
    found = twin.at(sizes)
    assert is_same_graph(numbers, found, cut(numbers), cut(found))
    shapes = [tuple(node.meta["val"].shape) for graph in (numbers.graph, found.graph) for node in graph.find_nodes(op="placeholder")]
    assert shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :]


def test_other_sizes_are_another_graph() -> None:
    numbers, twin = _llama()
    sizes = twin.sizes(_batch(4, 8))
    assert sizes is not None
    found = twin.at(sizes)
    assert not is_same_graph(numbers, found, cut(numbers), cut(found))


@pytest.mark.parametrize("strange", ["labels", "strides", "one row"])
def test_a_twin_refuses_what_it_does_not_hold_for(strange: str) -> None:
    _, twin = _llama()
    ids, labels = _batch(4, 9)
    batch = {"labels": [ids, labels[:, :-1]], "strides": [ids[:, ::2], labels[:, ::2]], "one row": [ids[:1], labels[:1]]}[strange]
    assert twin.sizes(batch) is None


def test_a_branch_on_a_size_is_a_guard() -> None:
    twin = _rows(Branching(), 37)
    assert twin.sizes([torch.zeros(21, 6)]) is not None
    assert twin.sizes([torch.zeros(20, 6)]) is None


def test_sizes_that_depend_on_data_are_refused() -> None:
    with pytest.raises(CaptureError):
        capture_symbolic(Counting(), (torch.zeros(37, 6),), {}, [["rows", None]], fx.Graph())


def test_codes_take_sizes_after_their_other_arguments() -> None:
    twin = _rows(Mlp(), 37)
    graph = fx.Graph()
    x = graph.placeholder("x")
    (source,) = twin.capture.inputs
    rows = source.meta["val"].shape[0]
    assert is_symbolic(rows)
    with symbols_allowed():
        once: Any = graph.call_function(aten.view.default, (x, [rows * 2, 3]))
        again: Any = graph.call_function(aten.view.default, (once, [rows, 6]))
    graph.output((once, again))
    assert take_sizes(graph) == (expression_of(rows * 2), expression_of(rows))
    call = fx.GraphModule(nn.Module(), graph)
    assert [tuple(value.shape) for value in call(torch.zeros(5, 6), 10, 5)] == [(10, 3), (5, 6)]


def test_symbols_are_read_where_they_stand() -> None:
    twin = _rows(Mlp(), 37)
    sizes = twin.sizes([torch.zeros(5, 6)])
    assert sizes is not None
    assert sizes.of([source.meta["val"].shape[0] for source in twin.capture.inputs]) == [5]
    assert Symbols().read([]).key == ()
