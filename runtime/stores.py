"""The stores that a device has, and how fast the way to them is."""

import functools
import tempfile
import time
from pathlib import Path

import torch

from chunkft_compile.planner.problem import Link, Placement
from chunkft_compile.runtime.file_store import FileStore
from chunkft_compile.runtime.host_store import HostStore
from chunkft_compile.runtime.store import Store, Traffic

_SAMPLE_NBYTES = 16 << 20  # eight pieces: both workers of a direction have several
_TRIALS = 5
_TRIAL_SECONDS = 0.2  # no further trial after this long


class Stores:
    """The stores beside `device`, each opened when it is first asked for: a disk, and beside an accelerator the host's memory.

    The file is in `directory`, or in the system's temporary one if None.
    """

    def __init__(self, device: torch.device, directory: Path | None) -> None:
        self._device = device
        self._directory = directory
        self._open: dict[Placement, Store] = {}

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where bytes can be kept outside the budgeted memory, fastest first. On a CPU, HOST is DEVICE."""
        return (Placement.DISK,) if self._device.type == "cpu" else (Placement.HOST, Placement.DISK)

    @property
    def nbytes(self) -> int:
        """Bytes that the open ones occupy."""
        return sum(store.nbytes for store in self._open.values())

    @property
    def traffic(self) -> Traffic:
        """What has gone over all links so far."""
        return sum((store.traffic for store in self._open.values()), Traffic())

    def __getitem__(self, placement: Placement) -> Store:
        """Raises `ValueError` for a placement that the device does not have, and for a directory that does not exist."""
        if placement not in self.placements:
            raise ValueError(f"{self._device} keeps nothing on {placement}, only on {', '.join(self.placements)}")
        if placement not in self._open:
            if placement is Placement.HOST:
                self._open[placement] = HostStore(self._device)
            else:
                self._open[placement] = FileStore(self._directory or Path(tempfile.gettempdir()), self._device)
        return self._open[placement]

    def synchronize(self) -> None:
        """See `Store.synchronize`."""
        for store in self._open.values():
            store.synchronize()


@functools.cache
def measure_link(device: torch.device, directory: Path | None, placement: Placement) -> Link:
    """The way to a store and its measured speed: the best of a few trials, taken once, so that equal plans stay equal.

    Needs 16 MiB on the device meanwhile.
    """
    store = Stores(device, directory)[placement]
    sample = torch.ones(_SAMPLE_NBYTES // 4, device=device)
    reading, writing = [], []
    began = time.perf_counter()
    for _ in range(_TRIALS):
        start = time.perf_counter()
        stand_in = store.put("sample", sample).wait()
        store.synchronize()  # the wait for a copy on a stream does not stop the host
        middle = time.perf_counter()
        store.get_into(stand_in, sample).wait()
        store.synchronize()
        reading.append(time.perf_counter() - middle)
        writing.append(middle - start)
        if time.perf_counter() - began > _TRIAL_SECONDS:
            break
    read, write = (max(1, int(_SAMPLE_NBYTES / min(seconds))) for seconds in (reading, writing))
    return Link(placement, read, write, overlaps=True)
