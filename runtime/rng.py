"""The states of all random number generators that a training loop uses without naming one."""

import random
import sys
from typing import Any

import torch


def rng_states(device: torch.device) -> dict[str, Any]:
    """Of Python, of numpy where it is in use, of torch on the host and on `device`; plain values and tensors only."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        numpy: Any = sys.modules["numpy"]
        name, key, *rest = numpy.random.get_state()
        states["numpy"] = (name, key.tolist(), *rest)
    module: Any = _module(device)
    if module is not None:
        states[device.type] = module.get_rng_state(device)
    return states


def set_rng_states(states: dict[str, Any], device: torch.device) -> None:
    """Go on from these. A generator of another kind of device cannot be continued on this one, and is left as it is."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])
    module = _module(device)
    if module is not None and device.type in states:
        module.set_rng_state(states[device.type], device)


def _module(device: torch.device) -> Any:
    module = None if device.type == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None
