"""Slicing rules for pieces of tensors and their gradients, for lookups, norms, convolutions and experts, each against dense rows."""

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from chunkft_compile.operators import group_products
from tests.compiler.sliced import Build, Sliced
from tests.compiler.strategies import call_of, ranges, rows_in, sizes

aten = torch.ops.aten
fast = settings(max_examples=15, deadline=None)


def _inputs_to(target: Any, *more: Any, **kwargs: Any) -> Build:
    return lambda graph, nodes: graph.call_function(target, (*nodes, *more), kwargs)


@fast
@given(st.data())
def test_dimensions_of_one(data: st.DataObject) -> None:
    shape = data.draw(st.lists(sizes, min_size=1, max_size=3))
    dim = data.draw(st.integers(0, len(shape)))
    signed = dim - len(shape) - 1 if data.draw(st.booleans()) else dim
    wider = [*shape[:dim], 1, *shape[dim:]]
    kept = data.draw(st.sampled_from([d for d in range(len(wider)) if d != dim]))
    Sliced([torch.randn(shape)], call_of(aten.unsqueeze.default, signed), (kept, *data.draw(ranges(wider[kept])))).check()
    Sliced([torch.randn(wider)], call_of(aten.squeeze.dim, signed), data.draw(rows_in(shape))).check()
    Sliced([torch.randn(wider)], call_of(aten.squeeze.dims, [signed, kept]), data.draw(rows_in(shape))).check()


@fast
@given(st.data())
def test_parts(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(3, 7), min_size=2, max_size=3))
    dim = data.draw(st.integers(0, len(shape) - 1))
    begin = data.draw(st.integers(-shape[dim], shape[dim] - 2))
    x, first = torch.randn(shape), begin % shape[dim]
    end = data.draw(st.sampled_from([None, 2**63 - 1, *range(first + 1, shape[dim] + 1)]))
    left = x.narrow(dim, first, len(range(shape[dim])[first:end]))
    Sliced([x], call_of(aten.slice.Tensor, dim, begin, end), data.draw(rows_in(left.shape))).check()
    index = data.draw(st.integers(-shape[dim], shape[dim] - 1))
    Sliced([x], call_of(aten.select.int, dim, index), data.draw(rows_in(x.select(dim, index).shape))).check()


@fast
@given(st.data())
def test_steps_along_the_rows_are_dense_and_right(data: st.DataObject) -> None:
    x = torch.randn(7, 3)
    Sliced([x], call_of(aten.slice.Tensor, 0, 0, 7, 2), (1, *data.draw(ranges(3)))).check()
    sliced = Sliced([x], call_of(aten.slice.Tensor, 0, 0, 7, 2), (0, *data.draw(ranges(4))))
    assert sliced.slicer.dense == [sliced.output]
    torch.testing.assert_close(sliced.got, sliced.wanted)


@fast
@given(st.data())
def test_concatenation_along_another_dimension(data: st.DataObject) -> None:
    rows, a, b = data.draw(sizes), data.draw(sizes), data.draw(sizes)

    def build(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
        return graph.call_function(aten.cat.default, ([graph.call_function(aten.neg.default, (node,)) for node in nodes], -1))

    inputs = [torch.randn(rows, a), torch.randn(rows, b)]
    Sliced(inputs, build, (0, *data.draw(ranges(rows)))).check()
    sliced = Sliced(inputs, build, (1, *data.draw(ranges(a + b))))
    assert sliced.slicer.dense == [sliced.output]
    torch.testing.assert_close(sliced.got, sliced.wanted)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_gradients_of_parts(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(3, 7), min_size=2, max_size=3))
    dim = data.draw(st.integers(0, len(shape) - 1))
    begin = data.draw(st.integers(0, shape[dim] - 2))
    end = data.draw(st.integers(begin + 1, shape[dim]))
    grad = torch.randn([end - begin if d == dim else size for d, size in enumerate(shape)])
    Sliced([grad], _inputs_to(aten.slice_backward.default, shape, dim, begin, end, 1), data.draw(rows_in(shape))).check()
    kept = [d for d in range(len(shape)) if d != dim]
    chosen = data.draw(st.sampled_from(kept))
    one = torch.randn([shape[d] for d in kept])
    Sliced([one], call_of(aten.select_backward.default, shape, dim, begin), (chosen, *data.draw(ranges(shape[chosen])))).check()


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("target", [aten.index_put.default, aten._unsafe_index_put.default], ids=str)
def test_gradient_of_a_lookup(target: Any, data: st.DataObject) -> None:
    table, width = data.draw(st.integers(2, 9)), data.draw(sizes)
    indices = torch.tensor(data.draw(st.lists(st.integers(-table, table - 1), min_size=1, max_size=9)))
    indices = indices.repeat(2).view(2, -1) if data.draw(st.booleans()) else indices
    values = torch.randn(*indices.shape, width)

    def build(graph: fx.Graph, x: list[fx.Node]) -> fx.Node:
        zeros = graph.call_function(aten.new_zeros.default, (x[0], [table, width]))
        return graph.call_function(target, (zeros, [x[1]], x[0], True))

    for rows in ((0, *data.draw(ranges(table))), (1, *data.draw(ranges(width)))):
        sliced = Sliced([values, indices], build, rows)
        assert sliced.slicer.dense == []
        torch.testing.assert_close(sliced.got, sliced.wanted)
        most = rows[2] + 1 if rows[0] == 0 else table
        made = [node.meta["val"].shape[0] for node in sliced.made if node.target is target]
        assert made == [most]


def test_a_lookup_that_overwrites_or_selects_by_a_mask_is_dense_and_right() -> None:
    def build(graph: fx.Graph, x: list[fx.Node]) -> fx.Node:
        zeros = graph.call_function(aten.new_zeros.default, (x[0], [5, 2]))
        return graph.call_function(aten.index_put.default, (zeros, [x[1]], x[0], False))

    sliced = Sliced([torch.randn(3, 2), torch.tensor([4, 0, 2])], build, (0, 1, 3))
    assert sliced.slicer.dense == [sliced.output]
    torch.testing.assert_close(sliced.got, sliced.wanted)


@fast
@given(st.data())
@pytest.mark.parametrize("index", [1, 2])
def test_group_norm(index: int, data: st.DataObject) -> None:
    batch, groups, each, size = data.draw(sizes), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(sizes)
    channels = groups * each
    source, weight = torch.randn(batch, channels, size), torch.randn(channels)
    _, mean, rstd = aten.native_group_norm(source, weight, weight, batch, channels, size, groups, 1e-5)

    def build(graph: fx.Graph, x: list[fx.Node]) -> fx.Node:
        args: Any = (*x, batch, channels, size, groups, [True, True, True])
        return graph.call_function(operator.getitem, (graph.call_function(aten.native_group_norm_backward.default, args), index))

    sliced = Sliced([torch.randn_like(source), source, mean, rstd, weight], build, (0, *data.draw(ranges(channels))))
    assert sliced.slicer.dense == []
    torch.testing.assert_close(sliced.got, sliced.wanted, rtol=1e-4, atol=1e-4)


@fast
@given(st.data())
@pytest.mark.parametrize("index", [1, 2])
def test_batch_norm(index: int, data: st.DataObject) -> None:
    batch, channels, size = data.draw(sizes), data.draw(sizes), data.draw(sizes)
    source, weight = torch.randn(batch, channels, size, size), torch.randn(channels)
    mean, rstd = torch.randn(channels), torch.rand(channels) + 0.5
    train = data.draw(st.booleans())

    def build(graph: fx.Graph, x: list[fx.Node]) -> fx.Node:
        args: Any = (*x, train, 1e-5, [True, True, True])
        return graph.call_function(operator.getitem, (graph.call_function(aten.native_batch_norm_backward.default, args), index))

    inputs = [torch.randn_like(source), source, weight, mean, rstd, mean, rstd]
    sliced = Sliced(inputs, build, (0, *data.draw(ranges(channels))))
    assert sliced.slicer.dense == ([] if train else [sliced.output])
    torch.testing.assert_close(sliced.got, sliced.wanted, rtol=1e-4, atol=1e-3)


def _convolution(data: st.DataObject, groups: int, inputs: int, outputs: int, *, transposed: bool) -> tuple[list[torch.Tensor], Build]:
    """The weight gradient of a convolution, in one or two dimensions."""
    dims, kernel = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    stride, padding, dilation = (data.draw(st.integers(1, 2)), data.draw(st.integers(0, 1)), data.draw(st.integers(1, 2)))
    source = torch.randn(2, inputs, *([7] * dims))
    weight = torch.randn(*((inputs, outputs // groups) if transposed else (outputs, inputs // groups)), *([kernel] * dims))
    settings = ([stride] * dims, [padding] * dims, [dilation] * dims, transposed, [0] * dims, groups)
    grad = torch.randn_like(aten.convolution(source, weight, None, *settings))

    def build(graph: fx.Graph, x: list[fx.Node]) -> fx.Node:
        call = graph.call_function(aten.convolution_backward.default, (*x, [outputs], *settings, [True, True, False]))
        return graph.call_function(operator.getitem, (call, 1))

    return [grad, source, weight], build


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_convolution(data: st.DataObject) -> None:
    inputs, outputs = data.draw(sizes), data.draw(sizes)
    tensors, build = _convolution(data, 1, inputs, outputs, transposed=data.draw(st.booleans()))
    for dim in (0, 1):
        sliced = Sliced(tensors, build, (dim, *data.draw(ranges(tensors[2].shape[dim]))))
        assert sliced.slicer.dense == []
        torch.testing.assert_close(sliced.got, sliced.wanted, rtol=1e-4, atol=1e-4)


@fast
@given(st.data())
def test_depthwise_and_grouped_convolution(data: st.DataObject) -> None:
    channels = data.draw(sizes)
    tensors, build = _convolution(data, channels, channels, channels, transposed=data.draw(st.booleans()))
    sliced = Sliced(tensors, build, (0, *data.draw(ranges(channels))))
    assert sliced.slicer.dense == []
    torch.testing.assert_close(sliced.got, sliced.wanted, rtol=1e-4, atol=1e-4)
    tensors, build = _convolution(data, 2, 4, 6, transposed=False)
    grouped = Sliced(tensors, build, (0, *data.draw(ranges(6))))
    assert grouped.slicer.dense == [grouped.output]
    torch.testing.assert_close(grouped.got, grouped.wanted, rtol=1e-4, atol=1e-4)


@fast
@given(st.data())
@pytest.mark.parametrize("index", [0, 1])
def test_weight_norm(index: int, data: st.DataObject) -> None:
    rows, width = data.draw(sizes), data.draw(sizes)
    direction, length = torch.randn(rows, width), torch.rand(rows, 1) + 0.5
    _, norms = aten._weight_norm_interface(direction, length, 0)

    def build(graph: fx.Graph, x: list[fx.Node]) -> fx.Node:
        return graph.call_function(operator.getitem, (graph.call_function(aten._weight_norm_interface_backward.default, (*x, 0)), index))

    sliced = Sliced([torch.randn(rows, width), direction, length, norms], build, (0, *data.draw(ranges(rows))))
    assert sliced.slicer.dense == []
    torch.testing.assert_close(sliced.got, sliced.wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_experts(data: st.DataObject) -> None:
    groups, k, n = data.draw(sizes), data.draw(sizes), data.draw(sizes)
    ends = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=groups, max_size=groups))).cumsum(0)
    a, b = torch.randn(int(ends[-1]), k), torch.randn(int(ends[-1]), n)
    Sliced([a, b, ends], _inputs_to(group_products, 0, groups), data.draw(rows_in((groups, k, n)))).check()
    reference = torch.zeros(groups, k, n)
    for number, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        reference[number] = a[start:stop].t() @ b[start:stop]
    torch.testing.assert_close(group_products(a, b, ends, 0, groups), reference)


@fast
@given(st.data())
def test_grouped_products_of_torch(data: st.DataObject) -> None:
    """Its kernel wants rows of 16 bytes and writes nothing for an expert without tokens."""
    groups, k, n = data.draw(st.integers(2, 4)), 8, 16
    ends = torch.tensor(data.draw(st.lists(st.integers(1, 2), min_size=groups, max_size=groups)), dtype=torch.int32).cumsum(0) * 8
    a, b = torch.randn(k, int(ends[-1])).to(torch.bfloat16), torch.randn(int(ends[-1]), n).to(torch.bfloat16)
    sliced = Sliced([a, b, ends.to(torch.int32)], _inputs_to(aten._grouped_mm.default), data.draw(rows_in((groups, k, n))))
    assert sliced.slicer.dense == []
    torch.testing.assert_close(sliced.got, sliced.wanted, rtol=2e-2, atol=5e-2)
