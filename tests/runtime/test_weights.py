"""Weights that are away come back as they went, and a change waits for the copy that it would otherwise lose to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chunkft_compile.planner.problem import Placement
from chunkft_compile.runtime.chunks import split_parameters
from chunkft_compile.runtime.stores import Stores
from chunkft_compile.runtime.weights import WeightKeeper

CPU = torch.device("cpu")
NAMES = ["weight", "bias"]


class _Late:
    """A copy that arrives when it is waited for."""

    def __init__(self, copy: Any) -> None:
        self.tensor, self._contents, self._done = copy.wait(), copy.tensor.clone(), False
        self.tensor.fill_(torch.nan)

    def wait(self) -> torch.Tensor:
        if not self._done:
            self.tensor.copy_(self._contents)
            self._done = True
        found: torch.Tensor = self.tensor
        return found


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightKeeper:
    torch.manual_seed(0)
    model = nn.Linear(6, 8)
    chunks = split_parameters(model, 100)
    stores = Stores(CPU, tmp_path)
    made = WeightKeeper(model, chunks, stores, CPU)
    made.place(dict.fromkeys(NAMES, Placement.DISK))
    store: Any = stores[Placement.DISK]
    get = store.get
    monkeypatch.setattr(store, "get", lambda *args: _Late(get(*args)))
    return made


def test_a_change_of_weights_that_no_call_has_read_waits_for_them(keeper: WeightKeeper) -> None:
    before = {name: keeper._tensor(name).clone() for name in NAMES}
    keeper.fetch(NAMES)
    numbers = range(len(keeper._chunks))
    keeper.change(numbers)
    for number in numbers:
        with torch.no_grad():
            keeper._chunks[number].leaf.add_(1.0)
    keeper.evict(numbers)
    keeper.free(NAMES)
    keeper._stores.synchronize()
    for name, tensor in before.items():
        assert torch.equal(keeper._tensor(name), tensor + 1.0), name


def test_rows_are_changed_and_written_back_alone(keeper: WeightKeeper) -> None:
    before, chunk = keeper._tensor("weight").clone(), keeper._chunks[1]
    keeper.fetch_rows(chunk)
    keeper.wait_rows(chunk)
    with torch.no_grad():
        chunk.leaf.mul_(2.0)
    keeper.evict_rows(chunk)
    keeper.free_rows(chunk)
    keeper._stores.synchronize()
    before[chunk.start : chunk.stop] *= 2.0
    assert torch.equal(keeper._tensor("weight"), before)


def test_all_weights_come_home(keeper: WeightKeeper, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keeper._tensor("weight").clone()
    keeper.place({})
    assert torch.equal(keeper._tensor("weight"), before)
    assert keeper._tensor("weight").untyped_storage().resizable()
    assert keeper._chunks[0].leaf.untyped_storage().data_ptr() == keeper._tensor("weight").untyped_storage().data_ptr()
