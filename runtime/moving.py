"""What belongs to chunks on its way between the device and the store: optimizer state, and rows of weights that live there."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.planner.problem import Placement
from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.store import Copy, Store
from chunkft_compile.runtime.stores import Stores
from chunkft_compile.runtime.weights import WeightKeeper

_Key = tuple[int, str]  # of a leaf and a name in its state


class StateMover:
    """Moves the optimizer state of chunks between `device` and stores. Inactive state stays visible to `optimizer.state_dict()`.

    `place(chunk)` is where its state goes. With `weights`, chunks whose weights are away take their rows of them along when asked to.
    """

    def __init__(
        self, stores: Stores, device: torch.device, place: Callable[[Chunk], Placement], weights: WeightKeeper | None = None
    ) -> None:
        self._stores = stores
        self._device = device
        self._place = place
        self._weights = weights
        self._stand_ins: dict[_Key, tuple[torch.Tensor, Store]] = {}
        self._coming: dict[int, list[tuple[str, Copy]]] = {}  # fetched, and not used yet
        self._leaving: dict[int, list[tuple[str, Copy, Store]]] = {}

    def fetch(self, optimizer: Optimizer, chunk: Chunk, *, rows: bool) -> None:
        """Begin to bring the state of `chunk` to the device, unless it is there or on its way; with `rows` those of its weight, too."""
        leaf = chunk.leaf
        state = optimizer.state.get(leaf, {})
        coming = self._coming.setdefault(id(leaf), [])
        for key, value in state.items():
            if self._is_away(leaf, key, value):
                copy = self._stand_ins[id(leaf), key][1].get(value, self._device)
                state[key] = copy.tensor
                coming.append((key, copy))
        if rows and self._weights is not None:
            self._weights.fetch_rows(chunk)

    def is_coming(self, chunk: Chunk) -> bool:
        """Whether it was fetched and not used yet."""
        return id(chunk.leaf) in self._coming

    def wait(self, chunk: Chunk) -> None:
        """From here on what was fetched may be used and changed."""
        for _, copy in self._coming.pop(id(chunk.leaf), ()):
            copy.wait()
        if self._weights is not None:
            self._weights.wait_rows(chunk)

    def evict(self, optimizer: Optimizer, chunk: Chunk) -> None:
        """Begin to send the state of `chunk` to the store; tensors of one element (step counters) stay."""
        self.wait(chunk)
        leaf = chunk.leaf
        leaving = self._leaving.setdefault(id(leaf), [])
        for key, value in optimizer.state.get(leaf, {}).items():
            if isinstance(value, torch.Tensor) and value.numel() > 1 and not self._is_away(leaf, key, value):
                store = self._stores[self._place(chunk)]
                leaving.append((key, store.put((id(leaf), key), value), store))
        if self._weights is not None:
            self._weights.evict_rows(chunk)

    def free(self, optimizer: Optimizer, chunk: Chunk) -> None:
        """The store has the state of `chunk`: its bytes on the device go. After an error the state is where it was."""
        leaf = chunk.leaf
        state = optimizer.state.get(leaf, {})
        for key, copy, store in self._leaving.pop(id(leaf), ()):
            state[key] = copy.wait()
            self._stand_ins[id(leaf), key] = state[key], store
        if self._weights is not None:
            self._weights.free_rows(chunk)

    def send_away(self, optimizer: Optimizer, chunk: Chunk) -> None:
        """Have the state of `chunk` in the store, wherever it is; what came and was not used is dropped."""
        leaf = chunk.leaf
        state = optimizer.state.get(leaf, {})
        for key, copy in self._coming.pop(id(leaf), ()):
            copy.wait()
            if state.get(key) is copy.tensor:
                state[key] = self._stand_ins[id(leaf), key][0]
        self.evict(optimizer, chunk)
        self.free(optimizer, chunk)

    def synchronize(self) -> None:
        """Wait until every copy is complete, also for readers on the host."""
        self._stores.synchronize()

    def _is_away(self, leaf: nn.Parameter, key: str, value: object) -> bool:
        stand_in, _ = self._stand_ins.get((id(leaf), key), (None, None))
        return stand_in is not None and value is stand_in
