"""Each slicing rule against the rows of the dense result, on random shapes, strides and ranges, and never a dense node."""

import operator
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from chunkft_compile.slicing import ITEMS, RULES
from tests.compiler.sliced import Sliced
from tests.compiler.strategies import call_of, dtypes, ranges, rows_in, sizes

aten = torch.ops.aten

fast = settings(max_examples=10, deadline=None)


def _strided(data: st.DataObject, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Random values, sometimes laid out backwards."""
    if data.draw(st.booleans()):
        return torch.randn(*reversed(shape)).permute(*reversed(range(len(shape)))).to(dtype)
    return torch.randn(*shape).to(dtype)


@fast
@given(st.data())
def test_matrix_products(data: st.DataObject) -> None:
    n, k, m, dtype = data.draw(sizes), data.draw(sizes), data.draw(sizes), data.draw(dtypes)
    a, b = _strided(data, (n, k), dtype), _strided(data, (k, m), dtype)
    bias = torch.randn(data.draw(st.sampled_from([(m,), (n, m), (n, 1), (1, m)]))).to(dtype)
    # Operands are inputs here: the operand that is not sliced is read whole and may be as large as the output.
    Sliced([a, b], lambda g, x: g.call_function(aten.mm.default, tuple(x)), data.draw(rows_in((n, m)))).check()
    scaled = data.draw(st.booleans())
    kwargs: dict[str, Any] = {"beta": 0.5, "alpha": 2.0} if scaled else {}
    Sliced([bias, a, b], lambda g, x: g.call_function(aten.addmm.default, tuple(x), kwargs), data.draw(rows_in((n, m)))).check()


@fast
@given(st.data())
def test_batched_products(data: st.DataObject) -> None:
    batch, n, k, m = (data.draw(sizes) for _ in range(4))
    a, b = _strided(data, (batch, n, k), torch.float32), torch.randn(batch, k, m)
    Sliced([a, b], lambda g, x: g.call_function(aten.bmm.default, tuple(x)), data.draw(rows_in((batch, n, m)))).check()


@fast
@given(st.data())
def test_a_weight_gradient_as_autograd_emits_it(data: st.DataObject) -> None:
    tokens, n, m = data.draw(st.integers(7, 12)), data.draw(sizes), data.draw(sizes)

    def build(graph: fx.Graph, x: list[fx.Node]) -> fx.Node:
        product = graph.call_function(aten.mm.default, (graph.call_function(aten.t.default, (x[0],)), x[1]))
        return graph.call_function(aten.t.default, (graph.call_function(aten.t.default, (product,)),))

    Sliced([torch.randn(tokens, n), torch.randn(tokens, m)], build, (0, *data.draw(ranges(n)))).check()


@fast
@given(st.data())
def test_transpositions(data: st.DataObject) -> None:
    shape = data.draw(st.lists(sizes, min_size=2, max_size=4))
    count = len(shape)
    a, b = data.draw(st.integers(-count, count - 1)), data.draw(st.integers(-count, count - 1))
    order = data.draw(st.permutations(range(count)))
    signed = [d - count if data.draw(st.booleans()) else d for d in order]
    x = _strided(data, shape, data.draw(dtypes))
    Sliced([x], call_of(aten.permute.default, signed), data.draw(rows_in([shape[d] for d in order]))).check()
    Sliced([x], call_of(aten.transpose.int, a, b), data.draw(rows_in(x.transpose(a, b).shape))).check()
    flat = _strided(data, shape[: data.draw(st.integers(1, 2))], torch.float32)
    Sliced([flat], call_of(aten.t.default), data.draw(rows_in(flat.t().shape))).check()


@fast
@given(st.data())
@pytest.mark.parametrize("target", [aten.view.default, aten._unsafe_view.default, aten.reshape.default], ids=str)
def test_views_that_keep_a_dimension(target: Any, data: st.DataObject) -> None:
    before, size, after = data.draw(st.integers(1, 3)), data.draw(sizes), data.draw(st.integers(1, 6))
    old = [before, size, after] if data.draw(st.booleans()) else [before, size, 1, after]
    new = [before, size, after, 1] if data.draw(st.booleans()) else [1, before, size, after]
    Sliced([torch.randn(old)], call_of(target, new), (new.index(size, new.index(before) + 1), *data.draw(ranges(size)))).check()


@fast
@given(st.data())
def test_views_that_split_or_merge_other_dimensions(data: st.DataObject) -> None:
    rows, a, b = data.draw(sizes), data.draw(sizes), data.draw(sizes)
    x, y = torch.randn(rows, a * b), torch.randn(rows, a, b)
    Sliced([x], call_of(aten.view.default, [rows, a, b]), (0, *data.draw(ranges(rows)))).check()
    Sliced([y], call_of(aten.view.default, [rows, a * b]), (0, *data.draw(ranges(rows)))).check()


@fast
@given(st.data())
def test_a_view_that_breaks_rows_is_dense_and_right(data: st.DataObject) -> None:
    a, b = data.draw(st.sampled_from([(4, 6), (6, 4), (3, 8)]))
    sliced = Sliced([torch.randn(a * b)], call_of(aten.view.default, [a, b]), (0, *data.draw(ranges(a))))
    assert sliced.slicer.dense == [sliced.output]
    torch.testing.assert_close(sliced.got, sliced.wanted)


@fast
@given(st.data())
def test_expand(data: st.DataObject) -> None:
    shape = data.draw(st.lists(sizes, min_size=1, max_size=3))
    source = [1 if data.draw(st.booleans()) else size for size in shape]
    source = source[data.draw(st.integers(0, len(shape) - 1)) :]
    Sliced([torch.randn(source)], call_of(aten.expand.default, shape), data.draw(rows_in(shape))).check()


@fast
@given(st.data())
def test_casts_and_copies(data: st.DataObject) -> None:
    shape = data.draw(st.lists(sizes, min_size=1, max_size=3))
    x = _strided(data, shape, torch.bfloat16)
    rows = data.draw(rows_in(shape))
    Sliced([x], call_of(aten._to_copy.default, dtype=torch.float32), rows).check()
    Sliced([x], call_of(aten.clone.default, memory_format=torch.contiguous_format), rows).check()
    Sliced([x], call_of(aten.detach.default), rows).check()
    Sliced([x], call_of(aten.alias.default), rows).check()


@fast
@given(st.data())
def test_sums(data: st.DataObject) -> None:
    shape = data.draw(st.lists(sizes, min_size=2, max_size=4))
    count = len(shape)
    reduced = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    dims = [d - count if data.draw(st.booleans()) else d for d in sorted(reduced)]
    x = torch.randn(shape).to(data.draw(dtypes))
    kept = [d for d in range(count) if d not in reduced]
    dim = data.draw(st.sampled_from(kept))
    rows = ranges(shape[dim])
    Sliced([x], call_of(aten.sum.dim_IntList, dims, True), (dim, *data.draw(rows))).check()
    Sliced([x], call_of(aten.sum.dim_IntList, dims), (kept.index(dim), *data.draw(rows))).check()
    Sliced([x], call_of(aten.sum.dim_IntList, dims, dtype=torch.float32), (kept.index(dim), *data.draw(rows))).check()


@fast
@given(st.data())
@pytest.mark.parametrize("target", [aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default], ids=str)
def test_pointwise_with_broadcasting(target: Any, data: st.DataObject) -> None:
    shape = data.draw(st.lists(sizes, min_size=1, max_size=3))
    other = [1 if data.draw(st.booleans()) else size for size in shape][data.draw(st.integers(0, len(shape) - 1)) :]
    # Both are made by a call, so a broadcast operand is read whole: it must be smaller than the output to be allowed.
    inputs = [_strided(data, shape, torch.float32), torch.randn(other).abs() + 0.5]
    Sliced(inputs, call_of(target), data.draw(rows_in(shape))).check()


@fast
@given(st.data())
def test_pointwise_with_numbers_and_three_operands(data: st.DataObject) -> None:
    shape = data.draw(st.lists(sizes, min_size=1, max_size=3))
    rows = data.draw(rows_in(shape))
    x, y = torch.randn(shape), torch.randn(shape)
    Sliced([x], call_of(aten.mul.Tensor, 3.0), rows).check()
    Sliced([x, y], call_of(aten.add.Tensor, alpha=0.5), rows).check()
    Sliced([x > 0, x, y], lambda g, n: g.call_function(aten.where.self, tuple(n)), rows).check()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_embedding(data: st.DataObject) -> None:
    vocabulary, width = data.draw(st.integers(2, 9)), data.draw(sizes)
    shape = data.draw(st.sampled_from([(3,), (2, 4), (9, 2)]))
    indices = torch.tensor(data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=18)))
    indices = indices.repeat(18)[: torch.Size(shape).numel()].view(shape)
    padding = data.draw(st.integers(-1, vocabulary - 1))
    scale = data.draw(st.booleans())

    def build(graph: fx.Graph, x: list[fx.Node]) -> fx.Node:
        return graph.call_function(aten.embedding_dense_backward.default, (x[0], x[1], vocabulary, padding, scale))

    sliced = Sliced([torch.randn(*shape, width), indices], build, (0, *data.draw(ranges(vocabulary))))
    assert sliced.slicer.dense == []
    torch.testing.assert_close(sliced.got, sliced.wanted)
    rows = sliced.wanted.shape[0]
    made = [node.meta["val"].shape for node in sliced.made if node.target is aten.embedding_dense_backward.default]
    assert made == [(rows + 1, width)]  # one row for what is outside


@fast
@given(st.data())
@pytest.mark.parametrize("index", [1, 2])
def test_layer_norm(index: int, data: st.DataObject) -> None:
    leading, width = data.draw(st.lists(sizes, min_size=0, max_size=2)), data.draw(sizes)
    source, weight, bias = torch.randn(*leading, width), torch.randn(width), torch.randn(width)
    _, mean, rstd = aten.native_layer_norm(source, [width], weight, bias, 1e-5)

    def build(graph: fx.Graph, x: list[fx.Node]) -> fx.Node:
        grad, inp, mean, rstd, weight, bias = x
        args = (grad, inp, [width], mean, rstd, weight, bias, [True, True, True])
        return graph.call_function(operator.getitem, (graph.call_function(aten.native_layer_norm_backward.default, args), index))

    inputs = [torch.randn(*leading, width), source, mean, rstd, weight, bias]
    sliced = Sliced(inputs, build, (0, *data.draw(ranges(width))))
    assert sliced.slicer.dense == []
    torch.testing.assert_close(sliced.got, sliced.wanted, rtol=1e-4, atol=1e-4)
    assert all(node.target is not aten.native_layer_norm_backward.default for node in sliced.made)


def test_layer_norm_over_two_dimensions_is_dense_and_right() -> None:
    source, weight = torch.randn(4, 3, 5), torch.randn(3, 5)
    _, mean, rstd = aten.native_layer_norm(source, [3, 5], weight, weight, 1e-5)

    def build(graph: fx.Graph, x: list[fx.Node]) -> fx.Node:
        call = graph.call_function(aten.native_layer_norm_backward.default, (x[0], x[1], [3, 5], *x[2:], x[4], [True, True, True]))
        return graph.call_function(operator.getitem, (call, 1))

    sliced = Sliced([torch.randn(4, 3, 5), source, mean, rstd, weight], build, (0, 1, 2))
    assert sliced.slicer.dense == [sliced.output]
    torch.testing.assert_close(sliced.got, sliced.wanted)


def test_an_operator_without_a_rule_is_dense_recorded_and_owns_its_rows() -> None:
    sliced = Sliced([torch.randn(6, 4)], call_of(aten.cumsum.default, 0), (0, 2, 3))
    assert sliced.slicer.dense == [sliced.output]
    torch.testing.assert_close(sliced.got, sliced.wanted)
    assert sliced.got.untyped_storage().nbytes() == sliced.got.nbytes


def test_every_rule_is_tested() -> None:
    """Here, or in the file about pieces: a new rule needs a test and a line in this list."""
    here = {aten.mm, aten.addmm, aten.bmm, aten.t, aten.transpose, aten.permute, aten.view, aten._unsafe_view, aten.reshape}
    here |= {aten.expand, aten.clone, aten.detach, aten.alias, aten._to_copy, aten.sum, aten.embedding_dense_backward}
    pieces = {aten.unsqueeze, aten.squeeze, aten.slice, aten.select, aten.cat, aten.slice_backward, aten.select_backward}
    pieces |= {aten.index_put, aten._unsafe_index_put, aten._grouped_mm, torch.ops.chunkft.group_products}
    assert {getattr(target, "overloadpacket", target) for target in RULES} == here | pieces | {operator.getitem}
    items = {aten.native_layer_norm_backward, aten.native_group_norm_backward, aten.native_batch_norm_backward}
    items |= {aten.convolution_backward, aten._weight_norm_interface_backward}
    assert {target.overloadpacket for target in ITEMS} == items
