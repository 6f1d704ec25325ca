"""Chunks cover every trainable element once, are views of the weights, and stay under the limit or are one row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chunkft_compile.runtime.chunks import split_parameters, storage_nbytes

shapes = st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=1, max_size=4)


def _module(shapes: list[list[int]], dtype: torch.dtype = torch.float32) -> nn.Module:
    module = nn.Module()
    for i, shape in enumerate(shapes):
        module.register_parameter(f"p{i}", nn.Parameter(torch.zeros(shape, dtype=dtype)))
    return module


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 400), st.sampled_from([torch.float32, torch.bfloat16]))
def test_chunks_cover_every_element_once_and_are_views(shapes: list[list[int]], limit: int, dtype: torch.dtype) -> None:
    module = _module(shapes, dtype)
    chunks = split_parameters(module, limit)
    with torch.no_grad():
        for chunk in chunks:
            chunk.leaf.add_(1)  # an element in two chunks would become 2, one in none stay 0
    for parameter in module.parameters():
        assert torch.equal(parameter, torch.ones_like(parameter))
    for chunk in chunks:
        weight = module.get_parameter(chunk.param)
        assert chunk.leaf.is_leaf
        assert chunk.leaf.requires_grad
        assert chunk.leaf.is_contiguous()
        assert chunk.leaf.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        assert chunk.nbytes <= limit or chunk.stop - chunk.start == 1
        assert chunk.size == (weight.shape[0] if weight.dim() else 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 200))
def test_chunks_of_a_parameter_are_even(rows: int, limit: int) -> None:
    lengths = [chunk.stop - chunk.start for chunk in split_parameters(_module([[rows, 2]]), limit)]
    assert max(lengths) - lengths[-1] < len(lengths) or len(set(lengths)) == 1
    assert len(set(lengths[:-1])) <= 1


def test_a_scalar_is_one_chunk() -> None:
    (chunk,) = split_parameters(_module([[]]), 1)
    assert (chunk.name, chunk.leaf.shape, chunk.nbytes) == ("p0[0:1]", torch.Size([]), 4)


def test_frozen_parameters_have_no_chunks_and_tied_ones_come_once() -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False), "c": nn.Linear(3, 3, bias=False)})
    module["b"].weight = module["a"].weight
    module["c"].requires_grad_(False)
    assert [chunk.param for chunk in split_parameters(module, 1000)] == ["a.weight"]


def test_an_empty_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p0 is empty \(0, 3\); freeze it"):
        split_parameters(_module([[0, 3]]), 100)


def test_storages_count_once() -> None:
    base = torch.zeros(10)
    assert storage_nbytes([base, base[2:], torch.zeros(3)]) == 52
