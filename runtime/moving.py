"""Optimizer state of chunks on its way between the device and the store."""

import functools
import weakref

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.runtime.store import Store


class StateMover:
    """Moves the optimizer state of chunks between device and store. Inactive state stays visible to `optimizer.state_dict()`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._out: dict[tuple[int, str], torch.Tensor] = {}
        self._hooked = weakref.WeakSet[Optimizer]()

    def fetch(self, optimizer: Optimizer, leaf: nn.Parameter) -> None:
        """Bring the state of `leaf` to its device."""
        state = optimizer.state.get(leaf, {})
        for key, value in state.items():
            stand_in = self._out.get((id(leaf), key))
            if stand_in is not None and value is stand_in:
                state[key] = self._store.get(stand_in, leaf.device).wait()
                del self._out[id(leaf), key]

    def evict(self, optimizer: Optimizer, leaf: nn.Parameter) -> None:
        """Send the state of `leaf` to the store; tensors of one element (step counters) stay."""
        if optimizer not in self._hooked:
            self._hooked.add(optimizer)
            optimizer.register_state_dict_pre_hook(functools.partial(_synchronize, weakref.ref(self._store)))
        state = optimizer.state.get(leaf, {})
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() > 1 and value is not self._out.get((id(leaf), key)):
                state[key] = self._out[id(leaf), key] = self._store.put((id(leaf), key), value).wait()


def _synchronize(reference: weakref.ref[Store], optimizer: Optimizer) -> None:
    """Before `optimizer.state_dict()` reads stand-ins: their bytes may still be on the way."""
    store = reference()
    if store is not None:
        store.synchronize()
