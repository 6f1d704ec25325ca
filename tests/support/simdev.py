"""The simulated accelerator `sim`: built once per source and torch version, registered once per process.

It has memory of its own with a capacity, streams, events and pinned memory (see simdev.cpp). Registering it makes `sim` the
accelerator of the process for good, so tests that use it run in a process of their own.
"""

import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from chunkft_compile.runtime import native
from chunkft_compile.runtime.environment import user_cache
from tests.conftest import Workshop

_SOURCES = [Path(__file__).with_suffix(".h"), Path(__file__).with_suffix(".cpp")]


class SimDevice:
    """The registered device. There is one per process; get it from `register()`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.sim_configure.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_double]
        library.sim_async_copies.restype = ctypes.c_int64
        self._library = library

    def configure(self, *, capacity: int = 0, granularity: int = 1, link_bytes_per_s: float = 0.0) -> None:
        """Bytes of memory (0: no limit), the multiple that block sizes are rounded up to, and the speed of copies (0: no delay)."""
        self._library.sim_configure(capacity, granularity, link_bytes_per_s)

    def async_copies(self) -> int:
        """Copies between host and device so far that returned before they were done."""
        return int(self._library.sim_async_copies())


@functools.cache
def register() -> SimDevice:
    """Build the device if needed and register it as `sim` for the rest of the process."""
    library = load()
    library.sim_register()
    backend_registration.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", _device_module())  # type: ignore[no-untyped-call]
    backend_registration.generate_methods_for_privateuse1_backend(unsupported_dtype=None)
    return SimDevice(library)


def report_work(work: Callable[[SimDevice], dict[str, Any]]) -> None:
    """What a module that `run_beside` runs does: `work` on the registered device, with captures made once, and its findings as JSON."""
    device = register()
    with pytest.MonkeyPatch.context() as patch:
        Workshop().open(patch)
        gc.collect()
        gc.freeze()  # imports, which every collection would visit
        print(json.dumps(work(device)))


def on_device(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch on the device."""
    return {name: tensor.to("sim") for name, tensor in batch.items()}


def run_beside(module: str) -> dict[str, Any]:
    """Run `python -m module`, which registers the device in a process of its own; gives the JSON of its last line.

    Skips the running test if the device cannot be built here.
    """
    try:
        load()
    except native.BuildError as error:
        pytest.skip(str(error))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _device_module() -> types.ModuleType:
    """What torch looks up in `torch.<device>`."""
    module: Any = types.ModuleType("torch.sim")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.current_stream = lambda device=None: torch.accelerator.current_stream()
    module.synchronize = lambda device=None: torch.accelerator.synchronize()
    return module  # type: ignore[no-any-return]


def load() -> ctypes.CDLL:
    """The device, built if needed. It is kept even where tests keep no cache: building takes a quarter of a minute. Raises `BuildError`."""
    return native.load(_SOURCES, libraries=["c10", "torch_cpu"], directory=user_cache())
