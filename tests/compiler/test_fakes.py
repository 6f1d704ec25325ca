"""Results of calls on fake tensors: made again where an equal call was made before, and then the same as if asked for."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from chunkft_compile import fakes
from chunkft_compile.fakes import fake_value
from chunkft_compile.sizes import is_symbolic

aten = torch.ops.aten

Shapes = Sequence[Sequence[int]]
CALLS: dict[str, tuple[Any, Shapes, tuple[Any, ...]]] = {
    "view": (aten.view.default, [(4, 6)], ([2, 12],)),
    "transposed": (aten.t.default, [(4, 6)], ()),
    "rows": (aten.narrow.default, [(4, 6)], (0, 1, 2)),
    "product": (aten.mm.default, [(4, 6), (6, 3)], ()),
    "sum": (aten.sum.dim_IntList, [(4, 6)], ([0], True)),
    "other dtype": (aten._to_copy.default, [(4, 6)], ()),
    "rows of a table": (aten.embedding_dense_backward.default, [(4, 6)], (torch.int64, 9)),
    "joined": (aten.cat.default, [(4, 6), (2, 6)], ()),
}


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes, "_KNOWN", {})


def build_node(mode: FakeTensorMode, what: str, strides: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> fx.Node:
    """A call on new fake tensors."""
    target, shapes, rest = CALLS[what]
    graph = fx.Graph()
    tensors = []
    for number, shape in enumerate(shapes):
        with mode:
            value = strides(torch.empty(*shape))
        tensors.append(_placeholder(graph, f"a{number}", value))
    if what == "rows of a table":
        with mode:
            index = torch.empty(4, dtype=torch.int64)
        return graph.call_function(target, (tensors[0], _placeholder(graph, "index", index), rest[1], -1, False))
    if what == "joined":
        return graph.call_function(target, (tensors,))
    return graph.call_function(target, (*tensors, *rest), {"dtype": torch.bfloat16} if what == "other dtype" else {})


def _placeholder(graph: fx.Graph, name: str, value: torch.Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _seen(node: fx.Node, value: torch.Tensor) -> object:
    """All that is known of a result: its layout, its bytes, and whose storage it lies in."""
    lies_in = [
        source.name for source in node.all_input_nodes if source.meta["val"].untyped_storage()._cdata == value.untyped_storage()._cdata
    ]
    layout = tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device
    return layout, value.untyped_storage().nbytes(), value.requires_grad, lies_in


@pytest.mark.parametrize("what", CALLS)
def test_made_again_is_as_asked(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = FakeTensorMode()
    asked = fake_value(build_node(mode, what), mode)
    node, other = build_node(mode, what), FakeTensorMode()
    monkeypatch.setattr(fakes, "how_made", Mock(side_effect=AssertionError("asked again")))
    again = fake_value(node, mode)
    assert _seen(node, again) == _seen(node, fx.Interpreter.call_function(Mock(), node.target, *_given(node, mode)))
    assert again is not asked
    if CALLS[what][0] not in (aten.view.default, aten.t.default, aten.narrow.default):
        assert again.untyped_storage()._cdata != asked.untyped_storage()._cdata
    assert fake_value(build_node(other, what), other).fake_mode is other  # what is known is of no mode


def _given(node: fx.Node, mode: FakeTensorMode) -> tuple[Any, Any]:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    return args, kwargs


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), start=st.integers(0, 4), transposed=st.booleans())
def test_rows_of_any_layout(rows: int, columns: int, start: int, transposed: bool) -> None:
    mode = FakeTensorMode()
    found = []
    for _ in range(2):
        with mode:
            base = torch.empty(columns, rows).t() if transposed else torch.empty(rows, columns)
        graph = fx.Graph()
        argument = _placeholder(graph, "a", base)
        node = graph.call_function(aten.narrow.default, (argument, 0, min(start, rows - 1), 1))
        found.append(_seen(node, fake_value(node, mode)))
        expected = base.narrow(0, min(start, rows - 1), 1)
        assert found[-1] == _seen(node, expected)
    assert found[0] == found[1]


def test_what_a_call_does_beside_its_result_is_always_asked_for() -> None:
    """In-place operators, operators with several results, and symbolic sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = fx.Graph()
    with mode:
        value = torch.empty(4, 6)
    tensor = _placeholder(graph, "a", value)
    for target, args in ((aten.add_.Tensor, (tensor, 1)), (aten.topk.default, (tensor, 2)), (aten.contiguous.default, (tensor,))):
        fake_value(graph.call_function(target, args), mode)
    symbolic = mode.from_tensor(torch.empty(5, 7), symbolic_context=None)
    assert is_symbolic(symbolic)
    fake_value(graph.call_function(aten.neg.default, (_placeholder(graph, "s", symbolic),)), mode)
    assert not fakes._KNOWN


def test_arguments_in_one_storage_are_always_asked_for() -> None:
    """In which of them a view lies is not to be seen afterwards."""
    mode = FakeTensorMode()
    graph = fx.Graph()
    with mode:
        base = torch.empty(4, 6)
        pair = base[:2], base[2:]
    nodes = [_placeholder(graph, name, value) for name, value in zip("ab", pair, strict=True)]
    fake_value(graph.call_function(aten.add.Tensor, tuple(nodes)), mode)
    assert not fakes._KNOWN


def test_settings_that_change_a_result() -> None:
    mode = FakeTensorMode()
    assert fake_value(build_node(mode, "product"), mode).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert fake_value(build_node(mode, "product"), mode).dtype is torch.bfloat16
    graph = fx.Graph()
    with mode:
        whole = torch.empty(4, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            node = graph.call_function(aten.div.Tensor, (_placeholder(graph, "w", whole), 2))
            assert fake_value(node, mode).dtype is dtype
        finally:
            torch.set_default_dtype(torch.float32)
