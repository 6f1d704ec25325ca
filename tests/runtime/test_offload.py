"""Values come back from the store as they were, views of one storage as views of one, and slots are used again."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft_compile.runtime.offload import Offloader, _rounded
from chunkft_compile.runtime.stores import Stores
from tests.support.allocator import Allocator

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> Stores:
    return Stores(CPU, tmp_path)


def _send(offloader: Offloader, values: dict[int, torch.Tensor]) -> None:
    """Evict and free: nobody else holds the values."""
    offloader.evict(values)
    numbers = list(values)
    values.clear()
    offloader.free(numbers)


def test_round_trip(store: Stores) -> None:
    whole = torch.randn(6, 10)
    values = {
        1: whole,
        2: whole.t()[2:5],
        3: whole.view(3, 20)[1],
        4: torch.rand(7) > 0.5,
        5: torch.tensor(3, dtype=torch.int64),
        6: torch.randn(4, 4).bfloat16(),
    }
    copies = {number: value.clone() for number, value in values.items()}
    layouts = {number: (value.stride(), value.storage_offset()) for number, value in values.items()}
    offloader = Offloader(store)
    _send(offloader, values)
    whole.zero_()  # the store has a copy
    found = offloader.fetch([4, 1, 2, 3]) | offloader.fetch([5, 6])
    offloader.wait(found)
    for number, copy in copies.items():
        assert torch.equal(found[number], copy)
        assert found[number].dtype == copy.dtype
        assert (found[number].stride(), found[number].storage_offset()) == layouts[number]
    found[1].fill_(7.0)
    assert torch.equal(found[2], torch.full((3, 6), 7.0))
    assert torch.equal(found[3], torch.full((20,), 7.0))


def test_the_bytes_are_gone_meanwhile(allocator: Allocator, tmp_path: Path) -> None:
    offloader = Offloader(Stores(CPU, tmp_path))
    before = allocator.live()
    values = {number: torch.ones(5000) for number in range(3)}
    allocator.reset()
    held = allocator.live()
    _send(offloader, values)
    assert allocator.live() == before
    assert allocator.peak() == held  # no copy on the way
    found = offloader.fetch([0, 1, 2])
    assert allocator.live() == held
    assert len(found) == 3


def test_runs_share_slots(store: Stores) -> None:
    for round_ in range(4):
        offloader = Offloader(store)
        _send(offloader, {number: torch.full((5000 + number,), float(number)) for number in range(3)})
        if round_ == 0:
            nbytes = store.nbytes
        assert store.nbytes == nbytes >= 3 * 20_000
        if round_ % 2:  # the others were dropped before their backward
            found = offloader.fetch([0, 1, 2])
            offloader.wait(found)
            assert [value[0].item() for value in found.values()] == [0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**40))
def test_sizes_share_slots_and_waste_little(nbytes: int) -> None:
    assert nbytes <= _rounded(nbytes) <= nbytes * 9 / 8
    assert _rounded(_rounded(nbytes)) == _rounded(nbytes)


def test_there_are_eight_sizes_per_doubling() -> None:
    assert len({_rounded(nbytes) for nbytes in range(4097, 8193)}) == 8
