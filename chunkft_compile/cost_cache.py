"""Measured operators kept on disk, so that planning the same model again takes less time and asks the same question.

One JSON file per fingerprint: what a measurement depends on beside the call itself. A file that is missing, broken, of another version
or not writable means measuring again, never an error; two processes that write at once each replace the file whole, and the later one
keeps what it read of the other's.
"""

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from chunkft_compile.runtime.environment import cache_directory
from chunkft_compile.runtime.meter import CallCost

logger = logging.getLogger("chunkft_compile")

_VERSION = 3


def fingerprint(device: torch.device) -> str:
    """Device, torch and threads: what a measured operator depends on beside its arguments."""
    parts = [_VERSION, device.type, _device_name(device), torch.__version__, torch.get_num_threads()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def key_of(signature: object) -> str:
    """The name of a call in the file: a hash of its signature, which is made of names, shapes, strides and numbers."""
    return hashlib.sha256(repr(signature).encode()).hexdigest()[:24]


class CostCache:
    """The file of one device as it is configured now."""

    def __init__(self, device: torch.device) -> None:
        directory = cache_directory()
        self._path = directory / f"operators-{fingerprint(device)}.json" if directory is not None else None

    def load(self) -> dict[str, CallCost]:
        """What was measured before; empty where there is nothing usable."""
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["version"] != _VERSION:
                return {}
            return {key: _cost(row) for key, row in content["calls"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            logger.info("the cache %s is not usable and will be written anew: %s", self._path, error)
            return {}

    def add(self, costs: Mapping[str, CallCost]) -> None:
        """Keep these beside what the file holds by now."""
        if self._path is None or not costs:
            return
        calls = {key: [cost.peak_nbytes, cost.end_nbytes, cost.seconds] for key, cost in {**self.load(), **costs}.items()}
        new: str | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, new = tempfile.mkstemp(prefix=self._path.name, dir=self._path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"version": _VERSION, "calls": calls}, file)
            os.replace(new, self._path)
        except OSError as error:
            logger.info("measured operators are not kept: %s", error)
            if new is not None:
                Path(new).unlink(missing_ok=True)


def _cost(row: object) -> CallCost:
    """One row of the file. Raises `ValueError` for anything that no measurement gives."""
    if not (isinstance(row, list) and len(row) == 3 and all(type(value) in (int, float) for value in row)):
        raise ValueError(f"{row!r} is not peak, end and seconds")
    peak, end, seconds = row
    if type(peak) is not int or type(end) is not int or peak < 0 or not (seconds >= 0 and math.isfinite(seconds)):
        raise ValueError(f"{row!r} is not peak, end and seconds")
    return CallCost(peak, end, float(seconds))


def _device_name(device: torch.device) -> str:
    if device.type != "cpu":
        module = torch.get_device_module(device.type)
        return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "flags")  # the flags choose the kernels
    return "; ".join(next((line for line in lines if line.startswith(name)), platform.machine()) for name in wanted)
