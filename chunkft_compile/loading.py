"""A checkpoint opened without being read: its weights are mapped from their files until a plan says where each of them lives."""

import json
import mmap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from chunkft_compile.module import ChunkedModule, compile
from chunkft_compile.names import named_once
from chunkft_compile.pretrained import check_model

# The names of the format, https://github.com/huggingface/safetensors#format (dtypes that can be trained, and integers of buffers).
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # the limit of the format


def load(path: str | Path, budget: str | int | None = None, **settings: Any) -> ChunkedModule:
    """The causal language model in a Hugging Face directory, compiled for `budget` without ever being in memory whole.

    Its safetensors files are mapped; when the first training call (or `plan`) has a schedule, each weight is read once, to the device or
    to the store it lives in, one after the other. So a model whose weights are larger than the budget, or than memory, can be
    fine-tuned. It trains in the dtype of its files, which are never written to. `settings` are those of `compile`.

    Raises `ValueError` where the directory is no such model, where a file is damaged, and where names, shapes or dtypes of weights are
    not those of the model.
    """
    directory = Path(path)
    check_model(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has no *.safetensors: save the model with save_pretrained(), and load that directory")
    found = {name: entry for file in files for name, entry in _entries(file)}
    model = _skeleton(directory, _dtype_of(directory, found))
    _fill(model, found, directory)
    return compile(model, budget, **settings)


class _Entry(NamedTuple):
    """A tensor of a file: its bytes are `[start, stop)` of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def map(self) -> torch.Tensor:
        """The tensor in memory that maps the file. What is written to it stays in this process."""
        page = self.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), self.stop - page, access=mmap.ACCESS_COPY, offset=page)
        flat = torch.frombuffer(mapped, dtype=torch.uint8, count=self.stop - self.start, offset=self.start - page)
        return flat.view(_DTYPES[self.dtype]).view(self.shape)


def _entries(file: Path) -> Iterator[tuple[str, _Entry]]:
    """Every tensor of a safetensors file. Raises `ValueError` for one that is cut off or no such file."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"its header has {length} bytes, the file {size}")
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                found = _Entry(file, entry["dtype"], tuple(entry["shape"]), start, stop)
                if not start <= stop <= size:
                    raise ValueError(f"{name} ends at byte {stop}, the file has {size}")
                if found.dtype not in _DTYPES:
                    raise ValueError(f"{name} is of type {found.dtype}, which cannot be trained")
                if stop - start != torch.Size(found.shape).numel() * _DTYPES[found.dtype].itemsize:
                    raise ValueError(f"{name} of shape {found.shape} has {stop - start} bytes")
                yield name, found
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _dtype_of(directory: Path, found: dict[str, _Entry]) -> torch.dtype:
    """The dtype of all weights."""
    dtypes = {_DTYPES[entry.dtype] for entry in found.values()}
    floating = sorted((dtype for dtype in dtypes if dtype.is_floating_point), key=str)
    if len(floating) != 1:
        raise ValueError(f"the weights of {directory} are of {', '.join(map(str, floating)) or 'no floating type'}; convert them to one")
    return floating[0]


def _skeleton(directory: Path, dtype: torch.dtype) -> nn.Module:
    """The model of the config with buffers, and weights that have shapes only."""
    transformers, accelerate = import_module("transformers"), _accelerate(directory)
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    with accelerate.init_empty_weights(include_buffers=False):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # making them empty made them new parameters
    trained: nn.Module = model.train()
    return trained


def _accelerate(directory: Path) -> Any:
    try:
        return import_module("accelerate")
    except ModuleNotFoundError as error:
        raise ValueError(f"loading {directory} needs the package accelerate: pip install 'chunkft_compile[hf]'") from error


def _fill(model: nn.Module, found: dict[str, _Entry], directory: Path) -> None:
    """Give every weight and saved buffer its mapped tensor. Refuses before the first one where anything does not fit."""
    tensors: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    tied = {id(tensor): names for tensor, names in named_once(model)}
    missing = [name for name in tensors if name not in found and not any(other in found for other in tied[id(tensors[name])])]
    strange = [name for name in found if name not in tensors]
    for names, what in ((missing, "lacks"), (strange, "has beside those of the model")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{directory} {what} {', '.join(names[:3])}{more}; save it again with save_pretrained() of this transformers")
    for name, entry in found.items():
        shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
        if (shape, dtype) != (entry.shape, _DTYPES[entry.dtype]):
            raise ValueError(f"{name} of {entry.file} is {entry.dtype} {list(entry.shape)}, the model has {dtype} {list(shape)}")
    for name, entry in found.items():
        tensor, mapped = tensors[name], entry.map()
        if tensor.device.type != "meta":
            tensor.data.copy_(mapped)
            continue
        parameter = nn.Parameter(mapped, requires_grad=tensor.requires_grad)
        for other in tied[id(tensor)]:
            module, _, last = other.rpartition(".")
            setattr(model.get_submodule(module), last, parameter)
