"""Weights that live beside the device: they come for the calls that read them, and go back where they were changed."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from chunkft_compile.planner.problem import Placement
from chunkft_compile.runtime.chunks import Chunk, set_data, storage_nbytes
from chunkft_compile.runtime.store import Copy, Store
from chunkft_compile.runtime.stores import Stores


class WeightKeeper:
    """Knows where every weight lives, and which are on the device for a while.

    A weight that is away is its stand-in in the store: whoever reads `model.state_dict()` finds its contents. Leaves of chunks follow
    it: they are rows of the stand-in, or of the copy on the device while they are changed there.
    """

    def __init__(self, model: nn.Module, chunks: Sequence[Chunk], stores: Stores, device: torch.device) -> None:
        self._model = model
        self._stores = stores
        self._device = device
        self._chunks = chunks
        self._numbers: dict[str, list[int]] = defaultdict(list)
        for number, chunk in enumerate(chunks):
            self._numbers[chunk.param].append(number)
        dtypes = {chunk.weight.dtype for chunk in chunks} if device.type != "cpu" else set()
        self._nothing = {dtype: torch.full((), torch.nan, dtype=dtype, device=device) for dtype in dtypes}
        self._away: dict[str, tuple[torch.Tensor, Store, Placement]] = {}
        self._here: dict[str, Copy] = {}
        self._rows: dict[int, Copy] = {}
        self._leaving: dict[str | int, list[Copy]] = defaultdict(list)
        self._changed: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Bytes on the device that leaves share while their weights are away."""
        return storage_nbytes(self._nothing.values())

    def place(self, places: Mapping[str, Placement]) -> None:
        """Bring every weight and buffer to its place, one after the other; those without one to the device.

        There they get memory of the device's allocator, wherever they came from: a mapped file, or another device.
        """
        for name in [name for name in self._away if places.get(name, Placement.DEVICE) is not self._away[name][2]]:
            self._bring_home(name)
        for name, place in places.items():
            if place is not Placement.DEVICE and name not in self._away:
                tensor, store = self._tensor(name), self._stores[place]
                stand_in = store.put(("weight", name), tensor.detach()).wait()
                self._away[name] = stand_in, store, place
                self._show(name, stand_in)
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            if name not in self._away and self._is_foreign(tensor):
                self._show(name, tensor.detach().to(self._device, copy=True))

    def fetch(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Begin to bring weights to the device."""
        found = {}
        for name in names:
            stand_in, store, _ = self._away[name]
            self._here[name] = copy = store.get(stand_in, self._device)
            found[name] = copy.tensor
        return found

    def wait(self, names: Iterable[str]) -> None:
        """From here on fetched weights may be used."""
        for name in names:
            self._here[name].wait()

    def evict(self, numbers: Iterable[int]) -> None:
        """Begin to write the rows of these chunks back to where they live."""
        for number in numbers:
            chunk = self._chunks[number]
            self._changed.discard(number)
            stand_in, store, _ = self._away[chunk.param]
            here = self._here[chunk.param].tensor
            self._leaving[chunk.param].append(store.put_into(chunk.cut(stand_in), chunk.cut(here)))

    def free(self, names: Iterable[str]) -> None:
        """The bytes of fetched weights go."""
        for name in names:
            for copy in self._leaving.pop(name, ()):
                copy.wait()
            self._here[name].wait()  # nobody may have read it: what is written to must not be freed
            del self._here[name]
            self._show_home(name)

    def fill(self, name: str, read: Callable[[torch.Tensor], object]) -> None:
        """Give a weight new contents, which `read` copies into the tensor it is given. None comes to the device that is not there."""
        tensor = self._tensor(name)
        if name not in self._away and not self._is_foreign(tensor):
            read(tensor)
            return
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        read(whole)
        _, store, place = self._away.get(name) or (None, self._stores[self._stores.placements[0]], self._stores.placements[0])
        self._away[name] = store.put(("weight", name), whole).wait(), store, place
        self._show(name, self._away[name][0])

    def release(self) -> None:
        """Free whatever is on the device for a while, after a step that did not come to its end; changes are written back."""
        for name in list(self._here):
            self._here[name].wait()
            self.evict([number for number in self._numbers.get(name, ()) if number in self._changed])
            self.free([name])

    def change(self, numbers: Iterable[int]) -> None:
        """These chunks are about to be changed where they are on the device."""
        for number in numbers:
            if self._chunks[number].param in self._here:
                chunk = self._chunks[number]
                # no call may have read it: a late copy would undo the change
                chunk.show(chunk.cut(self._here[chunk.param].wait()))
                self._changed.add(number)

    def fetch_rows(self, chunk: Chunk) -> None:
        """Begin to bring the rows of a chunk in memory of their own, unless they are there or stay on the device."""
        if chunk.param in self._away and id(chunk.leaf) not in self._rows:
            stand_in, store, _ = self._away[chunk.param]
            self._rows[id(chunk.leaf)] = store.get(chunk.cut(stand_in), self._device)

    def has_rows(self, chunk: Chunk) -> bool:
        """Whether the rows of a chunk were fetched alone and not freed yet."""
        return id(chunk.leaf) in self._rows

    def wait_rows(self, chunk: Chunk) -> None:
        """From here on rows that were fetched alone may be used and changed."""
        if id(chunk.leaf) in self._rows:
            chunk.show(self._rows[id(chunk.leaf)].wait())  # not before: whoever reads the leaf meanwhile finds the stand-in

    def evict_rows(self, chunk: Chunk) -> None:
        """Begin to write rows back that were fetched alone."""
        if id(chunk.leaf) in self._rows:
            stand_in, store, _ = self._away[chunk.param]
            copy = store.put_into(chunk.cut(stand_in), self._rows[id(chunk.leaf)].tensor)
            self._leaving[id(chunk.leaf)].append(copy)

    def free_rows(self, chunk: Chunk) -> None:
        """The bytes of rows that were fetched alone go."""
        for copy in self._leaving.pop(id(chunk.leaf), ()):
            copy.wait()
        if self._rows.pop(id(chunk.leaf), None) is not None:
            self._show_home(chunk.param)

    def _is_foreign(self, tensor: torch.Tensor) -> bool:
        """Whether it is not in memory of the device's allocator: on another device, or mapped from a file."""
        return tensor.device != self._device or not tensor.untyped_storage().resizable()

    def _bring_home(self, name: str) -> None:
        stand_in, store, _ = self._away.pop(name)
        self._show(name, store.get(stand_in, self._device).wait())
        store.drop(("weight", name))

    def _tensor(self, name: str) -> torch.Tensor:
        path, _, last = name.rpartition(".")
        tensor: torch.Tensor = getattr(self._model.get_submodule(path), last)
        return tensor

    def _show(self, name: str, data: torch.Tensor) -> None:
        set_data(self._tensor(name), data)
        self._show_home(name)

    def _show_home(self, name: str) -> None:
        """Let the chunks of a weight be rows of the weight or its stand-in.

        A leaf is always on the device, for its gradient is: while its weight is elsewhere, it is NaN in bytes that all such leaves share.
        """
        for chunk in (self._chunks[number] for number in self._numbers.get(name, ())):
            if id(chunk.leaf) in self._rows:
                continue
            nothing = None if chunk.weight.device == self._device else self._nothing[chunk.weight.dtype].expand(chunk.leaf.shape)
            chunk.show(None, nothing)
