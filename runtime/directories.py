"""Directories of checkpoints: each one appears complete, by one rename, and what a killed writer left goes with the next save.

A writer fills a hidden directory beside its final place and holds a lock on it. The system drops the lock with the process, so a
locked directory is somebody's running write, whatever machine or container its process number (in the name, for people) is from.
"""

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"step-(\d{6,})(?:-(\d+))?")
_HIDDEN = re.compile(r"\.step-\d{6,}(-\d+)?\.\d+\.[0-9a-f]{8}")


@contextlib.contextmanager
def new_directory(parent: Path, step: int) -> Iterator[Path]:
    """A hidden directory in `parent` to fill and to `publish`; it is gone after the block unless it was."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    hidden, lock = _claim(parent, step)
    try:
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)


def publish(hidden: Path, step: int) -> Path:
    """Give a filled directory its name, once all of it is on the disk; the second one of a step is `step-000120-2`, and so on."""
    for path in (*sorted(hidden.iterdir()), hidden):
        sync(path)
    final = free_name(hidden.parent, step)
    os.rename(hidden, final)
    sync(hidden.parent)  # the rename itself
    return final


def free_name(parent: Path, step: int) -> Path:
    """The first name for this step that is not taken."""
    name, number = f"step-{step:06d}", 1
    while (parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return parent / (name if number == 1 else f"{name}-{number}")


def published(parent: Path) -> list[Path]:
    """Directories with the name of a checkpoint."""
    return sorted(path for path in parent.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()) if parent.is_dir() else []


def remove(path: Path) -> None:
    """Remove a checkpoint; one that is half removed when the process ends has a hidden name already."""
    hidden = path.with_name(_hidden_name(path.name))
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # another writer may be removing it as a leftover


def remove_leftovers(parent: Path) -> None:
    """Remove the hidden directories that nobody is writing."""
    for path in [path for path in parent.iterdir() if _HIDDEN.fullmatch(path.name)]:
        if (lock := _lock(path, wait=False)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _claim(parent: Path, step: int) -> tuple[Path, int]:
    """A new hidden directory and its lock."""
    while True:
        hidden = parent / _hidden_name(f"step-{step:06d}")
        hidden.mkdir()
        lock = _lock(hidden, wait=True)
        if hidden.exists():  # another writer may have taken it for a leftover before the lock was there
            if lock is None:
                raise OSError(f"the new directory {hidden} cannot be locked; put checkpoints on a file system with flock")
            return hidden, lock
        if lock is not None:
            os.close(lock)


def _hidden_name(name: str) -> str:
    return f".{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def _lock(path: Path, *, wait: bool) -> int | None:
    """An open descriptor that holds the lock of a directory; None where it is held by another, or gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
