"""What is in the directory of a checkpoint: tensors in safetensors shards, other files, and a manifest with a checksum of each.

A tensor larger than a shard is cut into pieces of rows, so that neither writing nor reading holds more than a shard beside it.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = 1
SHARD_NBYTES = 256 << 20
_MANIFEST = "manifest.json"
_BLOCK_NBYTES = 16 << 20  # what reading a large tensor holds beside it
_SLACK_NBYTES = 1 << 20  # headers of shards, the manifest, blocks of the file system


class CheckpointError(ValueError):
    """A checkpoint that cannot be used here; nothing was changed. The message says what is wrong with it."""


@dataclass(frozen=True)
class Piece:
    """Rows `[start, stop)` of a tensor, as entry `key` of `file`; all of it where both are None."""

    file: str
    key: str
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class Entry:
    """A tensor in a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stored:
    """A file and how to know it again."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`serial` counts the checkpoints of a directory, whatever their steps; `about` is what the writer says of the contents."""

    format: int
    serial: int
    step: int
    about: dict[str, Any]
    tensors: dict[str, Entry]
    files: dict[str, Stored]


def describe(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """dtype and shape, as an `Entry` has them."""
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def write(directory: Path, kind: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Entry]:
    """Write tensors, one shard in memory at a time, to files named after their kind. Those on a CPU are not copied."""
    entries: dict[str, Entry] = {}
    shard: dict[str, torch.Tensor] = {}
    number = 1
    for name, tensor in tensors:
        pieces = []
        for key, rows, part in _cut(name, tensor.detach()):
            if shard and _nbytes(shard.values()) + _nbytes([part]) > SHARD_NBYTES:
                save_file(shard, directory / _shard(kind, number))
                shard, number = {}, number + 1
            shard[key] = part.to("cpu").contiguous()
            pieces.append(Piece(_shard(kind, number), key, *rows))
        entries[name] = Entry(*describe(tensor), tuple(pieces))
    if shard:
        save_file(shard, directory / _shard(kind, number))
    return entries


def seal(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, with the checksums of all files that are there."""
    files = {path.name: Stored(path.stat().st_size, _sha256(path)) for path in sorted(directory.iterdir())}
    body = asdict(manifest) | {"files": {name: asdict(stored) for name, stored in files.items()}}
    text = json.dumps({"sha256": _sha256_of(body), "body": body}, indent=1)
    (directory / _MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """The manifest, once its files are there in full size. Raises `CheckpointError`."""
    try:
        found = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        body, digest = found["body"], found["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is no checkpoint: it has no {_MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {directory} is damaged: its {_MANIFEST} cannot be read ({error!r})") from error
    version = body.get("format") if isinstance(body, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"the checkpoint {directory} has format {version!r}, this library reads {FORMAT}: use the one that wrote it")
    if digest != _sha256_of(body) or set(body) != {field.name for field in fields(Manifest)}:
        raise CheckpointError(f"the checkpoint {directory} is damaged: {_MANIFEST} does not have its checksum")
    manifest = _manifest(body)
    for name, stored in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint {directory} is damaged: {name} is missing")
        if path.stat().st_size != stored.nbytes:
            raise CheckpointError(f"the checkpoint {directory} is damaged: {name} has {path.stat().st_size} bytes, not {stored.nbytes}")
    return manifest


class Archive:
    """A checkpoint to read from. Every byte of it was read once and is as it was written, or `CheckpointError` is raised."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        for name, stored in self.manifest.files.items():
            if _sha256(directory / name) != stored.sha256:
                raise CheckpointError(f"the checkpoint {directory} is damaged: {name} does not have its checksum")
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._files.clear()

    def entry(self, name: str) -> Entry:
        """What is known of a tensor without reading it."""
        return self.manifest.tensors[name]

    def copy(self, name: str, target: torch.Tensor) -> None:
        """Copy a tensor into another of its shape, some rows at a time."""
        for piece in self.entry(name).pieces:
            opened, part = self._open(piece.file), target if piece.start is None else target[piece.start : piece.stop]
            if not part.dim():
                part.copy_(opened.get_tensor(piece.key))
                continue
            rows, length = opened.get_slice(piece.key), max(1, _BLOCK_NBYTES * len(part) // max(1, _nbytes([part])))
            for start in range(0, len(part), length):
                part[start : start + length].copy_(rows[start : start + length])

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor, or rows of it, in memory of the host that is the caller's."""
        parts = [self._open(piece.file).get_tensor(piece.key) for piece in self.entry(name).pieces]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole if rows is None else whole[slice(*rows)]).clone()

    def _open(self, file: str) -> Any:
        if file not in self._files:
            opened: Any = safe_open(self.directory / file, framework="pt", device="cpu")
            self._files[file] = self._stack.enter_context(opened)
        return self._files[file]


@contextlib.contextmanager
def naming_the_need(what: Path, nbytes: int) -> Iterator[None]:
    """Errors of a full disk say how many bytes were needed; refuse at once where there is clearly no room."""
    needed = nbytes + _SLACK_NBYTES
    free = shutil.disk_usage(what.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{what} needs {needed} bytes and {what.parent} has {free} free; older checkpoints are untouched")
    try:
        yield
    except (OSError, SafetensorError) as error:
        code, reason = _reason(error)
        raise OSError(code, f"{what} was not written, it needs {needed} bytes: {reason}; older checkpoints are untouched") from error


def _reason(error: OSError | SafetensorError) -> tuple[int, str]:
    """The number and text of an error of the system; safetensors gives them in words only."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO, error.strerror or str(error)
    found = re.search(r"os error (\d+)", str(error))
    code = int(found[1]) if found else errno.EIO
    return code, os.strerror(code) if found else str(error)


def total_nbytes(tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Bytes of named tensors in a checkpoint."""
    return _nbytes(tensor for _, tensor in tensors)


def _cut(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Sequence[int], torch.Tensor]]:
    """A tensor in pieces of whole rows that fit a shard, as far as rows do."""
    nbytes = _nbytes([tensor])
    if nbytes <= SHARD_NBYTES or not tensor.dim() or len(tensor) < 2:
        yield name, (), tensor
        return
    length = max(1, SHARD_NBYTES * len(tensor) // nbytes)
    for start in range(0, len(tensor), length):
        stop = min(start + length, len(tensor))
        yield f"{name}[{start}:{stop}]", (start, stop), tensor[start:stop]


def _shard(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}.safetensors"


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _manifest(body: Mapping[str, Any]) -> Manifest:
    tensors = {
        name: Entry(entry["dtype"], tuple(entry["shape"]), tuple(Piece(**piece) for piece in entry["pieces"]))
        for name, entry in body["tensors"].items()
    }
    files = {name: Stored(**stored) for name, stored in body["files"].items()}
    return Manifest(body["format"], body["serial"], body["step"], body["about"], tensors, files)
