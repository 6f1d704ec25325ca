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
                return self._tied(path, tensor)
            del self._out[id(leaf), path]
            return self._store.get(tensor, leaf.device)

        _replace(optimizer, leaf, get)

    def evict(self, optimizer: Optimizer, leaf: nn.Parameter) -> None:
        """Send the state of `leaf` to the store; tensors of one element (step counters) and shared tables stay."""

        def put(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel() <= 1 or tensor is self._out.get((id(leaf), path)):
                return tensor
            if path in self._tables:
                return self._tied(path, tensor)
            self._out[id(leaf), path] = stand_in = self._store.put((id(leaf), path), tensor)
            return stand_in

        _replace(optimizer, leaf, put)

    def _tied(self, path: Path, tensor: torch.Tensor) -> torch.Tensor:
        """The shared table in place of a copy that `load_state_dict` brought; contents are compared for such a copy only."""
        table = self._tables.get(path)
        if table is None or table is tensor or (table.shape, table.dtype, table.device) != (tensor.shape, tensor.dtype, tensor.device):
            return tensor
        return table if torch.equal(table, tensor) else tensor


def _replace(optimizer: Optimizer, leaf: nn.Parameter, place: Callable[[Path, torch.Tensor], torch.Tensor]) -> None:
    if leaf in optimizer.state:
        state = optimizer.state[leaf]
        state.update(map_tensors(place, dict(state)))
