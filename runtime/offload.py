"""Values of one micro-batch that wait in the store between the forward and the backward of their segment."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chunkft_compile.runtime.store import Store


@dataclass(frozen=True, eq=False)
class _Away:
    """A storage in the store, and how one value lies in it."""

    stand_in: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Offloader:
    """Moves whole storages: views of one stay views of one.

    One serves one run. Runs follow each other, so all use the same slots, by size and order: the store does not grow from step to step.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._away: dict[int, _Away] = {}
        self._used: Counter[int] = Counter()

    def evict(self, values: dict[int, torch.Tensor]) -> None:
        """Copy the storages of `values` to the store, and empty `values`: the caller holds no other reference."""
        stand_ins: dict[int, torch.Tensor] = {}
        for number in list(values):
            tensor = values.pop(number)
            storage = tensor.untyped_storage()
            if storage._cdata not in stand_ins:
                stand_ins[storage._cdata] = self._put(tensor)
            stand_in, stride = stand_ins[storage._cdata], tensor.stride()
            self._away[number] = _Away(stand_in, tensor.device, tensor.dtype, tensor.shape, stride, int(tensor.storage_offset()))

    def fetch(self, numbers: Sequence[int]) -> dict[int, torch.Tensor]:
        """The values as they were, in new memory on their device."""
        found: dict[int, torch.Tensor] = {}
        flat: dict[int, torch.Tensor] = {}
        for number in numbers:
            away = self._away.pop(number)
            if id(away.stand_in) not in flat:
                flat[id(away.stand_in)] = self._store.get(away.stand_in, away.device).wait()
            found[number] = flat[id(away.stand_in)].view(away.dtype).as_strided(away.shape, away.stride, away.offset)
        return found

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole storage behind a tensor, as single bytes."""
        nbytes = tensor.untyped_storage().nbytes()
        assert nbytes % tensor.element_size() == 0, f"a storage of {nbytes} bytes is no multiple of {tensor.dtype}"
        flat = tensor.as_strided((nbytes // tensor.element_size(),), (1,), 0).view(torch.uint8)
        room = _rounded(nbytes)
        slot = ("saved", room, self._used[room])
        self._used[room] += 1
        return self._store.put(slot, flat, room).wait()


def _rounded(nbytes: int) -> int:
    """Up to the next of eight sizes per doubling: batches of many lengths share slots, and at most an eighth is wasted."""
    grain = 1 << max(0, nbytes.bit_length() - 4)
    return -(-nbytes // grain) * grain
