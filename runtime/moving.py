"""What belongs to chunks on its way between the device and the store: optimizer state, and rows of weights that live there."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.planner.problem import Placement
from chunkft_compile.planner.program import Op
from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.state_tensors import Path, map_tensors
from chunkft_compile.runtime.store import Copy, Store
from chunkft_compile.runtime.stores import Stores
from chunkft_compile.runtime.weights import WeightKeeper


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
        self._stand_ins: dict[tuple[int, Path], tuple[torch.Tensor, Store]] = {}
        self._coming: dict[int, dict[Path, Copy]] = {}  # fetched, and not used yet
        self._leaving: dict[int, dict[Path, tuple[Copy, Store]]] = {}
        self._tables: dict[Path, torch.Tensor] = {}
        # what `free` and `bring_back` left in the state of a leaf: both are asked of every chunk at every step, and mostly for nothing
        self._left: dict[int, list[Callable[[], object]]] = {}
        self._brought: dict[int, list[Callable[[], object]]] = {}

    def keep(self, tables: Mapping[Path, torch.Tensor]) -> None:
        """Tensors that an optimizer shares between the state of all its parameters: they stay where they are."""
        self._tables.update(tables)

    def move(self, op: Op, held: Iterable[tuple[Optimizer, Chunk]], *, rows: bool) -> None:
        """Do a FETCH, EVICT or FREE of chunks, each with the optimizer that holds it; `rows` as in `fetch`."""
        for optimizer, chunk in held:
            match op:
                case Op.FETCH:
                    self.fetch(optimizer, chunk, rows=rows)
                case Op.EVICT:
                    self.evict(optimizer, chunk)
                case Op.FREE:
                    self.free(optimizer, chunk)

    def fetch(self, optimizer: Optimizer, chunk: Chunk, *, rows: bool) -> None:
        """Begin to bring the state of `chunk` to the device, unless it is there or on its way; with `rows` those of its weight, too."""
        leaf = chunk.leaf
        coming = self._coming.setdefault(id(leaf), {})

        def get(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            if not self._is_away(leaf, path, tensor):
                return self._tied(path, tensor)
            coming[path] = copy = self._stand_ins[id(leaf), path][1].get(tensor, self._device)
            return copy.tensor

        _replace(optimizer, leaf, get)
        if rows and self._weights is not None:
            self._weights.fetch_rows(chunk)

    def wait(self, chunk: Chunk) -> None:
        """From here on what was fetched may be used and changed."""
        for copy in self._coming.pop(id(chunk.leaf), {}).values():
            copy.wait()
        if self._weights is not None:
            self._weights.wait_rows(chunk)

    def evict(self, optimizer: Optimizer, chunk: Chunk) -> None:
        """Begin to send the state of `chunk` to the store; tensors of one element (step counters) and shared tables stay."""
        self.wait(chunk)
        leaf = chunk.leaf
        leaving = self._leaving.setdefault(id(leaf), {})

        def put(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel() <= 1 or self._is_away(leaf, path, tensor):
                return tensor
            if path in self._tables:
                return self._tied(path, tensor)
            store = self._stores[self._place(chunk)]
            leaving[path] = store.put((id(leaf), path), tensor), store
            return tensor

        _replace(optimizer, leaf, put)
        if self._weights is not None:
            self._weights.evict_rows(chunk)

    def free(self, optimizer: Optimizer, chunk: Chunk) -> None:
        """The store has the state of `chunk`: its bytes on the device go. After an error the state is where it was."""
        leaf = chunk.leaf
        leaving = self._leaving.pop(id(leaf), {})

        def stand_in(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            if path not in leaving:
                return tensor
            copy, store = leaving.pop(path)
            found = copy.wait()
            self._stand_ins[id(leaf), path] = found, store
            return found

        _replace(optimizer, leaf, stand_in)
        self._left[id(leaf)] = _marks(optimizer, leaf)
        if self._weights is not None:
            self._weights.free_rows(chunk)

    def send_away(self, optimizer: Optimizer, chunk: Chunk) -> None:
        """Have the state of `chunk` in the store, wherever it is; what came and was not used is dropped."""
        leaf = chunk.leaf
        has_rows = self._weights is not None and self._weights.has_rows(chunk)
        if id(leaf) not in self._coming and not has_rows and self._is_as_left(optimizer, chunk, self._left):
            return
        coming = self._coming.pop(id(leaf), {})

        def back(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            if path not in coming or coming[path].wait() is not tensor:
                return tensor
            return self._stand_ins[id(leaf), path][0]

        if coming:
            _replace(optimizer, leaf, back)
        self.evict(optimizer, chunk)
        self.free(optimizer, chunk)

    def bring_back(self, optimizer: Optimizer, chunk: Chunk) -> None:
        """Have the state of `chunk` on the device."""
        if not self._is_as_left(optimizer, chunk, self._brought):
            self.fetch(optimizer, chunk, rows=False)
            self.wait(chunk)
            self._brought[id(chunk.leaf)] = _marks(optimizer, chunk.leaf)

    def synchronize(self) -> None:
        """Wait until every copy is complete, also for readers on the host."""
        self._stores.synchronize()

    def _is_as_left(self, optimizer: Optimizer, chunk: Chunk, left: Mapping[int, list[Callable[[], object]]]) -> bool:
        """Whether the state of a chunk consists of the very objects that were left in it."""
        now, before = optimizer.state.get(chunk.leaf, {}).values(), left.get(id(chunk.leaf), [])
        return len(now) == len(before) and all(value is mark() for value, mark in zip(now, before, strict=True))

    def _is_away(self, leaf: nn.Parameter, path: Path, tensor: torch.Tensor) -> bool:
        stand_in, _ = self._stand_ins.get((id(leaf), path), (None, None))
        return tensor is stand_in

    def _tied(self, path: Path, tensor: torch.Tensor) -> torch.Tensor:
        """The shared table in place of a copy that `load_state_dict` brought; contents are compared for such a copy only."""
        table = self._tables.get(path)
        if table is None or table is tensor or (table.shape, table.dtype, table.device) != (tensor.shape, tensor.dtype, tensor.device):
            return tensor
        return table if torch.equal(table, tensor) else tensor


def _marks(optimizer: Optimizer, leaf: nn.Parameter) -> list[Callable[[], object]]:
    """To tell later whether the state of a leaf consists of the same objects, without keeping its tensors."""
    values = optimizer.state.get(leaf, {}).values()
    return [weakref.ref(value) if isinstance(value, torch.Tensor) else partial(_itself, value) for value in values]


def _itself(value: object) -> object:
    return value


def _replace(optimizer: Optimizer, leaf: nn.Parameter, place: Callable[[Path, torch.Tensor], torch.Tensor]) -> None:
    if leaf in optimizer.state:
        state = optimizer.state[leaf]
        state.update(map_tensors(place, dict(state)))
