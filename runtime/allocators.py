"""Exact CPU tensor memory: a c10 allocator that counts every byte, on every thread, and can enforce a cap.

It sees what torch's CPU allocator hands out, temporaries inside operators included; it does not see numpy, shared memory,
memory-mapped files or malloc inside MKL. Older tensors keep their own deleter and are not part of `live()` unless they are adopted.
"""

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path

import torch

from chunkft_compile.runtime.environment import cache_directory
from chunkft_compile.runtime.native import BuildError, load

_SOURCE = Path(__file__).with_name("allocator.cpp")
_INT64_MAX = 2**63 - 1


class Peak:
    """The most bytes live since the last `reset()`, for one reader: others have their own."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._number = library.allocator_open_peak()
        if self._number < 0:
            raise RuntimeError("the allocator hook has no peak left to give; keep a Peak and reset it")

    def nbytes(self) -> int:
        """The maximum."""
        return int(self._library.allocator_peak(self._number))

    def reset(self) -> None:
        """Start again from what is live now."""
        self._library.allocator_reset_peak(self._number)


class Allocator:
    """The hook. There is one per process; get it from `install()`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name in ("allocator_live", "allocator_peak", "allocator_adopt"):
            getattr(library, name).restype = ctypes.c_int64
        library.allocator_cap.argtypes = [ctypes.c_int64]
        library.allocator_adopt.argtypes = [ctypes.c_void_p]
        self._library = library
        self._peak = Peak(library)
        # The engine's guard has one too, for all compiled models: only one step runs at a time.
        self.guarded = Peak(library)
        # So has the meter, which measures one thing at a time.
        self.metered = Peak(library)

    def install(self) -> bool:
        """Count from now on. False if it did already."""
        return bool(self._library.allocator_install())

    def remove(self) -> bool:
        """Put back the allocator that was there before; False if the hook is not in place.

        Bytes that were counted stay so until they are freed.
        """
        return bool(self._library.allocator_remove())

    def live(self) -> int:
        """Bytes allocated or adopted under the hook and not yet freed."""
        return int(self._library.allocator_live())

    def peak(self) -> int:
        """The largest `live()` since the last `reset()`."""
        return self._peak.nbytes()

    def reset(self) -> None:
        """Start a new peak from what is live now."""
        self._peak.reset()

    def cap(self, nbytes: int | None) -> None:
        """From now on an allocation that would make more than `nbytes` live raises `torch.OutOfMemoryError`; None lifts the cap."""
        self._library.allocator_cap(_INT64_MAX if nbytes is None else nbytes)

    def adopt(self, tensors: Iterable[torch.Tensor]) -> int:
        """Count CPU tensors from before the hook, so that their end is seen too; the bytes that were added.

        Storages that are counted already, shared, or mapped from a file are left as they are.
        """
        # _cdata is private (2.13.0): the address of the StorageImpl, which there is no public way to
        storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
        return sum(int(self._library.allocator_adopt(storage._cdata)) for storage in storages)


@functools.cache
def _built() -> Allocator | BuildError:
    """What came of the one attempt of this process."""
    try:
        return Allocator(load([_SOURCE], libraries=["c10"], directory=cache_directory()))
    except BuildError as error:
        return error


def install() -> Allocator:
    """Build the hook if needed and make it torch's CPU allocator. Raises `native.BuildError` where that is not possible."""
    found = _built()
    if isinstance(found, BuildError):
        raise found
    found.install()
    return found
