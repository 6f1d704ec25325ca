"""The user's autocast around a training call: it shapes the graph that is captured, and is off while anything else is at work."""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Autocast:
    """The state of autocast for one type of device. Equal ones capture equal graphs."""

    device_type: str
    enabled: bool
    dtype: torch.dtype | None
    cache: bool

    @staticmethod
    def ambient(device: torch.device) -> "Autocast":
        """What is on now."""
        if not torch.is_autocast_enabled(device.type):
            return Autocast(device.type, False, None, True)
        return Autocast(device.type, True, torch.get_autocast_dtype(device.type), torch.is_autocast_cache_enabled())

    def on(self) -> AbstractContextManager[object]:
        """This state, be it within `off`."""
        if not self.enabled:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype, cache_enabled=self.cache)

    def off(self) -> AbstractContextManager[object]:
        """No autocast: graphs have their casts in them, and figures are measured for what is in the graph."""
        return torch.autocast(self.device_type, enabled=False) if self.enabled else contextlib.nullcontext()
