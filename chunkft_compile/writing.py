"""Files that appear whole: a reader finds the old content or the new one, never a part."""

import os
from pathlib import Path


def check_target(path: Path, option: str) -> None:
    """Raise `ValueError` where `write_whole` could not write `path`, before the work for it is done. `option` named it."""
    if path.is_dir() or not path.parent.is_dir():
        wrong, is_not = (path, "") if path.is_dir() else (path.parent, "not ")
        raise ValueError(f"{option} {path} cannot be written: {wrong} is {is_not}a directory")
    place = path if path.exists() else path.parent
    if not os.access(place, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written: no permission to write {place}")


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file in one move; text is UTF-8. A link keeps leading where it leads, and a pipe or device is written as it is.

    Raises `OSError` that names `path` where it cannot be written; what was there before stays.
    """
    target, data = Path(path), content.encode() if isinstance(content, str) else content
    try:
        if target.exists() and not target.is_file():  # a pipe, a terminal, /dev/null: nothing to take the place of
            target.write_bytes(data)
        else:
            _move_in(target.resolve(), data)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from error  # not the name of the new file


def _move_in(target: Path, data: bytes) -> None:
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        new.write_bytes(data)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
