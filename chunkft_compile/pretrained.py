"""Hugging Face causal language models on local disk: load a directory or a GGUF file, save a directory in one move."""

import contextlib
import importlib
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model")


def load_model(path: Path, dtype: torch.dtype) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model and its tokenizer. Raises `ValueError` where `path` is no local model."""
    return load_weights(path, dtype), load_tokenizer(path)


def load_weights(path: Path, dtype: torch.dtype, device: torch.device | None = None) -> "PreTrainedModel":
    """The causal language model at `path`, a directory or a `.gguf` file, in `dtype`. A GGUF file takes 10-40 s."""
    check_model(path)
    transformers = _transformers(path)
    extra: dict[str, Any] = {}
    if path.is_dir():
        if not _holds(path, _WEIGHTS):
            raise ValueError(f"model directory {path} has no weights ({' or '.join(_WEIGHTS)})")
    else:
        # without it, packed weights would stay packed where a kernel for them is installed, and could not be trained
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _one_line(path, "the model"):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(**_place(path), **extra, dtype=dtype)
    if getattr(model, "is_quantized", False):  # set only on models that are
        raise ValueError(f"model {path} is quantized and cannot be trained in full: use its unquantized weights")
    loaded: PreTrainedModel = model.to(device or torch.device("cpu"))
    return loaded


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer beside the weights at `path`."""
    check_model(path)
    if path.is_dir() and not _holds(path, _TOKENIZERS):
        raise ValueError(f"model directory {path} has no tokenizer (tokenizer.json, ...): copy the files of the original model into it")
    transformers = _transformers(path)
    with _one_line(path, "the tokenizer"):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(**_place(path))
    return tokenizer


def check_model(path: Path) -> None:
    """Raise `ValueError` unless `path` looks like a model; takes no time."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(path.glob("*.gguf"))
            hint = f"; pass the file: {found[0]}" if found else "; a Hugging Face model directory has one"
            raise ValueError(f"model directory {path} has no config.json{hint}")
    elif not path.exists():
        raise ValueError(f"model {path} does not exist: pass a local Hugging Face directory or a .gguf file (nothing is downloaded)")
    elif path.suffix != ".gguf":
        raise ValueError(f"model {path} is a file that does not end in .gguf: pass a Hugging Face directory or a .gguf file")
    elif _magic(path) != b"GGUF":
        raise ValueError(f"model {path} is not a GGUF file: its first bytes are not 'GGUF'")


def _holds(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in path.glob(pattern))


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _place(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}


def _transformers(path: Path) -> ModuleType:
    needed = ("transformers", "safetensors") if path.is_dir() else ("transformers", "gguf", "accelerate")
    for name in needed:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"loading {path} needs the package {error.name}: pip install 'chunkft_compile[hf]'") from error
    return importlib.import_module("transformers")


@contextlib.contextmanager
def _one_line(path: Path, what: str) -> Iterator[None]:
    """The errors that transformers raises for broken files, as one line that names the file."""
    safetensors = importlib.import_module("safetensors")  # transformers needs it, so it is there
    try:
        yield
    except (OSError, ValueError, LookupError, ImportError, RuntimeError, struct.error, safetensors.SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} of {path} cannot be loaded: {first}") from error


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise `ValueError` unless `replace_directory(out)` will be able to write, found out by writing."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {out} is a file: pass a directory")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"output directory {out} is not empty: pass another --out, or --overwrite to replace it")
        if not (out / "config.json").is_file():
            # one slip of the finger away from deleting a home directory
            raise ValueError(f"output directory {out} holds something that is not a model: --overwrite only replaces models")
    # a run that is refused leaves nothing, so what is missing above it is tried and taken away again
    missing = [path for path in (out, *out.parents) if not path.exists()][1:]
    made: list[Path] = []
    try:
        for directory in [*reversed(missing), _sibling(out, "probe")]:
            directory.mkdir()
            made.append(directory)
    except OSError as error:
        reason = "not a directory" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise ValueError(f"output directory {out} cannot be written: {reason} ({error.filename})") from error
    finally:
        for directory in reversed(made):
            directory.rmdir()


@contextlib.contextmanager
def replace_directory(out: Path) -> Iterator[Path]:
    """A new directory to fill, which becomes `out` when the block ends; if it raises, `out` is as it was."""
    new, old = _sibling(out, "new"), _sibling(out, "old")
    try:
        new.mkdir(parents=True)
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _sibling(out: Path, use: str) -> Path:
    return out.parent / f".{out.name}.{use}-{os.getpid()}"


def save_model(model: Any, tokenizer: "PreTrainedTokenizerBase", out: Path) -> None:
    """`out` becomes a directory that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load."""
    with replace_directory(out) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
