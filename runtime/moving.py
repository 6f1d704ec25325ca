"""Optimizer state of chunks on its way between the device and the store."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.runtime.state_tensors import Path, map_tensors
from chunkft_compile.runtime.store import Store


class StateMover:
    """Moves the optimizer state of chunks between device and store. Inactive state stays visible to `optimizer.state_dict()`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._out: dict[object, torch.Tensor] = {}
        self._tables: dict[Path, torch.Tensor] = {}

    def keep(self, tables: Mapping[Path, torch.Tensor]) -> None:
        """Tensors that an optimizer shares between the state of all its parameters: they stay where they are."""
        self._tables.update(tables)

    def fetch(self, optimizer: Optimizer, leaf: nn.Parameter) -> None:
        """Bring the state of `leaf` to its device."""

        def get(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            if tensor is not self._out.get((id(leaf), path)):
                return tensor
            del self._out[id(leaf), path]
            return self._store.get(tensor, leaf.device)

        _replace(optimizer, leaf, get)

    def evict(self, optimizer: Optimizer, leaf: nn.Parameter) -> None:
        """Send the state of `leaf` to the store; tensors of one element (step counters) and shared tables stay."""

        def put(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel() <= 1 or tensor is self._out.get((id(leaf), path)):
                return tensor
            table = self._tables.get(path)
            if table is not None:
                return table if _equal(table, tensor) else tensor  # `load_state_dict` may have brought a copy
            self._out[id(leaf), path] = stand_in = self._store.put((id(leaf), path), tensor)
            return stand_in

        _replace(optimizer, leaf, put)


def _replace(optimizer: Optimizer, leaf: nn.Parameter, place: Callable[[Path, torch.Tensor], torch.Tensor]) -> None:
    if leaf in optimizer.state:
        state = optimizer.state[leaf]
        state.update(map_tensors(place, dict(state)))


def _equal(table: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether one can stand for the other; contents are compared only where they are not the same tensor anyway."""
    if table is tensor:
        return True
    return (table.shape, table.dtype, table.device) == (tensor.shape, tensor.dtype, tensor.device) and torch.equal(table, tensor)
