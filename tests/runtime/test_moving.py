"""State leaves the device and comes back whatever it is in; what all chunks share stays; what cannot be moved is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chunkft_compile.planner.problem import Placement
from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.moving import StateMover
from chunkft_compile.runtime.optimizers import measure_optimizer
from chunkft_compile.runtime.state_tensors import map_tensors, tensors_in
from chunkft_compile.runtime.stores import Stores
from tests.runtime.quantised import Momentum, Quantised

CPU = torch.device("cpu")
SHAPE = (6, 50)


def _leaves(count: int) -> list[nn.Parameter]:
    leaves = [nn.Parameter(torch.randn(SHAPE)) for _ in range(count)]
    for leaf in leaves:
        leaf.grad = torch.randn(SHAPE)
    return leaves


def _mover(optimizer: torch.optim.Optimizer, directory: Path) -> tuple[StateMover, Stores]:
    store = Stores(CPU, directory)
    mover = StateMover(store, CPU, lambda chunk: Placement.DISK)
    mover.keep(measure_optimizer(optimizer, [(SHAPE, torch.float32)], CPU).tables)
    return mover, store


def _chunk(leaf: nn.Parameter) -> Chunk:
    return Chunk("weight", 0, len(leaf), len(leaf), leaf, leaf)


nested = st.recursive(
    st.one_of(st.integers(), st.none(), st.integers(0, 5).map(torch.ones), st.integers(1, 5).map(lambda n: Quantised.of(torch.ones(n, 3)))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(nested)
def test_every_tensor_is_replaced_once_and_the_rest_stays(state: Any) -> None:
    found = dict(tensors_in(state))
    twice = map_tensors(lambda _, tensor: tensor.clone(), state)
    again = dict(tensors_in(twice))
    assert list(again) == list(found)
    for path, tensor in found.items():
        assert again[path] is not tensor
        assert torch.equal(again[path], tensor)
    same = dict(tensors_in(map_tensors(lambda _, tensor: tensor, state)))
    assert all(same[path] is tensor for path, tensor in found.items())


def test_state_goes_and_returns_the_same_and_tables_stay(tmp_path: Path) -> None:
    (leaf,) = leaves = _leaves(1)
    optimizer = Momentum(leaves)
    optimizer.step()
    mover, store = _mover(optimizer, tmp_path)
    before = {path: tensor.clone() for path, tensor in tensors_in(optimizer.state[leaf])}
    here = {path: tensor.data_ptr() for path, tensor in tensors_in(optimizer.state[leaf])}
    mover.send_away(optimizer, _chunk(leaf))
    away = dict(tensors_in(optimizer.state[leaf]))
    assert set(away) == set(before)
    assert {path for path, tensor in away.items() if tensor.data_ptr() == here[path]} == {("table",)}
    assert store.nbytes == 4 * 4096  # codes, scale and two sums, each on a page of its own
    mover.send_away(optimizer, _chunk(leaf))
    mover.fetch(optimizer, _chunk(leaf), rows=False)
    mover.wait(_chunk(leaf))
    back = dict(tensors_in(optimizer.state[leaf]))
    assert all(torch.equal(back[path], tensor) for path, tensor in before.items())
    assert all(back[path] is not away[path] for path in before if path != ("table",))
    assert store.nbytes == 4 * 4096


def test_training_with_moves_is_training_without(tmp_path: Path) -> None:
    leaves = _leaves(2)
    still = [nn.Parameter(leaf.detach().clone()) for leaf in leaves]
    moved, kept = Momentum(leaves), Momentum(still)
    mover, _ = _mover(moved, tmp_path)
    for _ in range(4):
        for leaf, other in zip(leaves, still, strict=True):
            leaf.grad = torch.randn(SHAPE)
            other.grad = leaf.grad.clone()
            mover.fetch(moved, _chunk(leaf), rows=False)
            mover.wait(_chunk(leaf))
        moved.step()
        kept.step()
        for leaf in leaves:
            mover.evict(moved, _chunk(leaf))
            mover.free(moved, _chunk(leaf))
    assert all(torch.equal(leaf, other) for leaf, other in zip(leaves, still, strict=True))
    assert [moved.state[leaf]["step"] for leaf in leaves] == [4, 4]


def test_a_loaded_copy_of_a_table_is_tied_again_and_another_table_is_left(tmp_path: Path) -> None:
    leaves = _leaves(2)
    optimizer = Momentum(leaves)
    optimizer.step()
    mover, store = _mover(optimizer, tmp_path)
    for leaf in leaves:
        optimizer.state[leaf]["table"] = copy.deepcopy(optimizer.table)
    foreign = optimizer.state[leaves[1]]["table"] = optimizer.table + 1
    for leaf in leaves:
        mover.send_away(optimizer, _chunk(leaf))
    assert optimizer.state[leaves[0]]["table"] is optimizer.table
    assert optimizer.state[leaves[1]]["table"] is foreign
    assert store.nbytes == 8 * 4096


def test_state_is_counted_in_its_true_bytes_and_a_table_once() -> None:
    cost = measure_optimizer(Momentum(_leaves(2)), [(SHAPE, torch.float32)], CPU)
    rows, columns = SHAPE
    assert cost.of_layout[SHAPE, torch.float32].state_nbytes == rows * columns + 4 * rows + 2 * 4 * rows * columns
    assert cost.table_nbytes == 64 * 4


class _Odd(torch.Tensor):
    """A subclass that says nothing of what is in it."""


class _Keeping(torch.optim.SGD):
    """Keeps what it is told to."""

    kept: Any = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for leaf in group["params"]:
                self.state[leaf]["kept"] = self.kept(leaf)


def _paged(leaf: torch.Tensor) -> torch.Tensor:
    page = torch.zeros_like(leaf)
    page.is_paged = True  # type: ignore[attr-defined]
    return page


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda leaf: torch.zeros_like(leaf).as_subclass(_Odd), r"_Keeping: state in _Odd, .* without __tensor_flatten__, .*Way out"),
        (_paged, r"_Keeping moves its state itself \(paged memory\)\. Way out"),
    ],
)
def test_state_that_cannot_be_moved_is_refused(monkeypatch: pytest.MonkeyPatch, kept: Any, message: str) -> None:
    monkeypatch.setattr(_Keeping, "kept", staticmethod(kept))
    with pytest.raises(TypeError, match=message):
        measure_optimizer(_Keeping(_leaves(1), lr=0.1), [(SHAPE, torch.float32)], CPU)
