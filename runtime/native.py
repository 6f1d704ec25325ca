"""C++ sources against torch's headers, compiled once per source and torch version, and loaded."""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

_TORCH = Path(torch.__file__).parent


class BuildError(RuntimeError):
    """There is no compiler, or it failed, or there is no place for what it made; the message says which."""


def load(sources: Sequence[Path], *, libraries: Sequence[str], directory: Path | None) -> ctypes.CDLL:
    """The shared library of the last of `sources`; the others are headers beside it.

    It is kept in `directory`, or built for this process only if that is None. Raises `BuildError`.
    """
    if directory is not None:
        return _open(build(sources, libraries=libraries, directory=directory))
    with tempfile.TemporaryDirectory(prefix="chunkft-") as scratch:
        return _open(build(sources, libraries=libraries, directory=Path(scratch)))  # stays mapped without its file


def build(sources: Sequence[Path], *, libraries: Sequence[str], directory: Path) -> Path:
    """The compiled file in `directory`. Its name carries all that it depends on, so a file that exists is up to date."""
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    depends = [source.read_bytes() for source in sources], torch.__version__, str(_TORCH), flags, list(libraries)
    target = directory / f"{sources[-1].stem}-{hashlib.sha256(repr(depends).encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler = shutil.which("g++")
    if compiler is None:
        raise BuildError(f"{sources[-1].name} needs g++, which is not on the PATH")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            built = Path(scratch) / target.name
            paths = [f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}"]
            command = [compiler, *flags, str(sources[-1]), *paths, *(f"-l{name}" for name in libraries), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BuildError(f"g++ could not build {sources[-1]}:\n{done.stderr}")
            # Several processes may build at once: a rename is atomic, the last one wins with the same bytes.
            built.replace(target)
    except OSError as error:
        raise BuildError(f"{sources[-1].name} could not be built in {directory}: {error}") from error
    return target


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
