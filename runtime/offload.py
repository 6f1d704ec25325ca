"""Values of one micro-batch that wait in the store between the forward and the backward of their segment."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from chunkft_compile.runtime.store import Copy, Store
from chunkft_compile.runtime.stores import Stores


@dataclass(frozen=True, eq=False)
class _Away:
    """A storage on its way to the store, and how one value lies in it."""

    source: torch.Tensor
    copy: Copy
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Offloader:
    """Moves whole storages: views of one stay views of one.

    One serves one run. Runs follow each other, so all use the same slots, by size and order: the store does not grow from step to step.
    """

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._leaving: dict[int, _Away] = {}
        self._away: dict[int, _Away] = {}  # the source is the stand-in
        self._coming: dict[int, Copy] = {}
        self._used: Counter[int] = Counter()

    def evict(self, values: Mapping[int, torch.Tensor]) -> None:
        """Begin to copy the storages of `values` to the store."""
        copies: dict[int, tuple[torch.Tensor, Copy]] = {}
        for number, tensor in values.items():
            storage = tensor.untyped_storage()
            if storage._cdata not in copies:
                copies[storage._cdata] = self._put(tensor)
            stride, offset = tensor.stride(), int(tensor.storage_offset())
            away = _Away(*copies[storage._cdata], tensor.device, tensor.dtype, tensor.shape, stride, offset)
            self._leaving[number] = away

    def free(self, numbers: Iterable[int]) -> None:
        """The store has these values; the caller drops them now."""
        for number in numbers:
            away = self._leaving.pop(number)
            self._away[number] = replace(away, source=away.copy.wait())

    def is_leaving(self, number: int) -> bool:
        """Whether a value was evicted and not freed yet."""
        return number in self._leaving

    def fetch(self, numbers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Begin to bring values back as they were, in new memory on their device; `wait` before they are read."""
        found: dict[int, torch.Tensor] = {}
        flat: dict[int, Copy] = {}
        for number in numbers:
            away = self._away.pop(number)
            if id(away.source) not in flat:
                flat[id(away.source)] = self._store.get(away.source, away.device)
            self._coming[number] = copy = flat[id(away.source)]
            found[number] = copy.tensor.view(away.dtype).as_strided(away.shape, away.stride, away.offset)
        return found

    def wait(self, numbers: Iterable[int]) -> None:
        """From here on these values may be read, fetched or not."""
        for number in numbers:
            if number in self._coming:
                self._coming.pop(number).wait()

    @property
    def _store(self) -> Store:
        return self._stores[self._stores.placements[0]]

    def _put(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Copy]:
        """The whole storage behind a tensor, as single bytes."""
        nbytes = tensor.untyped_storage().nbytes()
        assert nbytes % tensor.element_size() == 0, f"a storage of {nbytes} bytes is no multiple of {tensor.dtype}"
        flat = tensor.as_strided((nbytes // tensor.element_size(),), (1,), 0).view(torch.uint8)
        room = _rounded(nbytes)
        slot = ("saved", room, self._used[room])
        self._used[room] += 1
        return flat, self._store.put(slot, flat, room)


def _rounded(nbytes: int) -> int:
    """Up to the next of eight sizes per doubling: batches of many lengths share slots, and at most an eighth is wasted."""
    grain = 1 << max(0, nbytes.bit_length() - 4)
    return -(-nbytes // grain) * grain
