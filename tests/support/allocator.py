"""Exact CPU tensor memory: a c10 allocator that counts every byte, on every thread, and can enforce a cap.

It is compiled once per source and torch version into the user's cache directory. It sees what torch's CPU allocator hands out,
temporaries inside operators included; it does not see numpy, shared memory, memory-mapped files or malloc inside MKL.

Install it before the tensors whose bytes should count: older tensors keep their own deleter and are never part of `live()`.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

_SOURCE = Path(__file__).with_suffix(".cpp")
_TORCH = Path(torch.__file__).parent
_INT64_MAX = 2**63 - 1


class CompilerMissingError(RuntimeError):
    """There is no g++ to build the hook with."""


class Allocator:
    """The installed hook. There is one per process; get it from `install()`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name in ("allocator_live", "allocator_peak"):
            getattr(library, name).restype = ctypes.c_int64
        library.allocator_cap.argtypes = [ctypes.c_int64]
        self._library = library
        library.allocator_install()

    def live(self) -> int:
        """Bytes allocated since the hook was installed and not yet freed."""
        return int(self._library.allocator_live())

    def peak(self) -> int:
        """The largest `live()` since the last `reset()`."""
        return int(self._library.allocator_peak())

    def reset(self) -> None:
        """Start a new peak from what is live now."""
        self._library.allocator_reset()

    def cap(self, nbytes: int | None) -> None:
        """From now on an allocation that would make more than `nbytes` live raises `torch.OutOfMemoryError`; None lifts the cap."""
        self._library.allocator_cap(_INT64_MAX if nbytes is None else nbytes)


@functools.cache
def install() -> Allocator:
    """Build the hook if needed and make it torch's CPU allocator for the rest of the process."""
    return Allocator(ctypes.CDLL(str(_build())))


def allocator_or_skip() -> Allocator:
    """`install()`, or skip the running test with the reason if the hook cannot be built here."""
    try:
        return install()
    except CompilerMissingError as error:
        pytest.skip(str(error))


def _build() -> Path:
    """The compiled hook. Its name carries all that it depends on, so a file that exists is up to date."""
    compiler = shutil.which("g++")
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    key = hashlib.sha256(repr((_SOURCE.read_bytes(), torch.__version__, str(_TORCH), flags)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chunkft_compile"
    target = cache / f"allocator-{key}.so"
    if target.exists():
        return target
    if compiler is None:
        raise CompilerMissingError("the allocator hook needs g++, which is not on the PATH")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        built = Path(scratch) / target.name
        paths = [f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}"]
        done = subprocess.run([compiler, *flags, str(_SOURCE), *paths, "-lc10", "-o", str(built)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ could not build {_SOURCE}:\n{done.stderr}")
        # Several test processes may build at once: a rename is atomic, the last one wins with the same bytes.
        built.replace(target)
    return target
