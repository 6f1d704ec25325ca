"""Chunks: row ranges of parameters as leaf parameters of their own, sharing the memory of the model's weights."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

BLOCK_NBYTES = 512  # what CUDA's caching allocator rounds sizes up to, in its statistics too
_BLOCKS = "chunkft_block_nbytes"  # attribute of a fake mode whose tensors stand for those of a device with blocks


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows `[start, stop)` of parameter `param`, which has `size` rows.

    `weight` is the model's own parameter, `leaf` a view of the rows that optimizers can train. Where the optimizer is to compute in
    fp32 and the weight is narrower, `leaf` is fp32: `stand_in`, which has no bytes, unless the chunk is being stepped (`precision`).
    """

    param: str
    start: int
    stop: int
    size: int
    weight: nn.Parameter
    leaf: nn.Parameter
    stand_in: torch.Tensor | None = None
    _elsewhere: list[torch.Tensor] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """`fqn[start:stop]`."""
        return f"{self.param}[{self.start}:{self.stop}]"

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.leaf.numel() * self.weight.element_size()

    @property
    def rows(self) -> torch.Tensor:
        """The weights themselves: a view of the model's, or of the copy of them that is on the device meanwhile."""
        return self._elsewhere[0] if self._elsewhere else self.cut(self.weight.detach())

    def cut(self, data: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor in the shape of the weight."""
        return data[self.start : self.stop] if data.dim() else data

    def show(self, rows: torch.Tensor | None, leaf: torch.Tensor | None = None) -> None:
        """From now on its weights are these, or those of the model if None; a leaf that is not `stand_in` is a view of them, or `leaf`."""
        self._elsewhere[:] = [] if rows is None else [rows]
        if self.stand_in is None:
            set_data(self.leaf, self.rows if leaf is None else leaf)


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """`tensor.data = data`, also where that is not allowed: from the CPU to a device that torch has no name for, and back."""
    # private (2.13.0), and what `nn.Module.to` asks before it does the same
    if torch._has_compatible_shallow_copy_type(tensor, data):
        tensor.data = data
        return
    gradient, tensor.grad = tensor.grad, None
    made = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data.detach()
    # The object stays the one that optimizers and modules hold. Private (2.13.0): `torch.utils.swap_tensors` does this and refuses tensors
    # with weak references, which the fake modes of a capture hold of all that it saw; they are to the object, not to what is in it.
    torch._C._swap_tensor_impl(tensor, made)
    tensor.grad = gradient


def split_parameters(model: nn.Module, limit_nbytes: int, *, wide: bool = False, device: torch.device | None = None) -> tuple[Chunk, ...]:
    """Every trainable parameter of `model` in chunks of at most `limit_nbytes` (but at least one row), evenly sized.

    Tied parameters appear once, under their first name. The chunks cover every trainable element exactly once. With `wide`, the
    leaves of bf16 and fp16 parameters are fp32, with their stand-ins on `device` if it is another one than that of the weights.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return tuple(
        chunk for name, weight in trained for chunk in _split(name, weight, limit_nbytes, device, wide=wide and is_half(weight.dtype))
    )


def is_half(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are narrower than the fp32 that an optimizer may compute in."""
    return dtype in (torch.bfloat16, torch.float16)


def _split(name: str, weight: nn.Parameter, limit_nbytes: int, device: torch.device | None, *, wide: bool) -> Iterator[Chunk]:
    if weight.numel() == 0:
        raise ValueError(f"parameter {name} is empty {tuple(weight.shape)}; freeze it: requires_grad_(False)")
    data = weight.detach()
    size = data.shape[0] if data.dim() else 1
    row_nbytes = data.numel() // size * data.element_size()
    most = max(1, limit_nbytes // row_nbytes)
    count = -(-size // most)
    length = -(-size // count)
    for start in range(0, size, length):
        stop = min(start + length, size)
        rows = data[start:stop] if data.dim() else data
        stand_in = _stand_in(rows, device or rows.device) if wide else None
        leaf = nn.Parameter(rows if stand_in is None else stand_in)
        if wide:
            leaf.grad_dtype = None  # `.grad` has the dtype of the weights between backward and step, and fp32 in the step
        yield Chunk(name, start, stop, size, weight, leaf, stand_in)


def _stand_in(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """fp32 NaN in the shape of `rows`, with the bytes of one element. Each chunk has its own: a write into it reaches no other."""
    return torch.full((), math.nan, dtype=torch.float32, device=device).expand(rows.shape)


def split_for_budget(model: nn.Module, budget_nbytes: int, *, wide: bool = False, device: torch.device | None = None) -> tuple[Chunk, ...]:
    """The chunks of `model` under a budget, see `chunk_limit_nbytes` and `split_parameters`."""
    return split_parameters(model, chunk_limit_nbytes(model, budget_nbytes), wide=wide, device=device)


def chunk_limit_nbytes(model: nn.Module, budget_nbytes: int) -> int:
    """The largest chunk of `model` under a budget: at most 1/24 of what the weights leave of it.

    Smaller chunks pack better, larger ones run faster. The limit is a power of two, so that near budgets have the same chunks,
    and at least 1/512 of the weights, so that their number stays small.
    """
    weights = storage_nbytes([*model.parameters(), *model.buffers()])
    room = max(1, (budget_nbytes - weights) // 24)
    return max(1 << (room.bit_length() - 1), weights // 512)


def rows_nbytes(chunk: Chunk, device: torch.device) -> int:
    """Bytes that the allocator of `device` counts for a copy of the rows of a chunk."""
    return rounded_nbytes(chunk.nbytes, device)


def rounded_nbytes(nbytes: int, device: torch.device) -> int:
    """`nbytes` in whole blocks of the allocator of `device`."""
    block = _block_nbytes(device)
    return -(-nbytes // block) * block


def _block_nbytes(device: torch.device) -> int:
    return 1 if device.type in ("cpu", "meta") else BLOCK_NBYTES


def storage_nbytes(tensors: Iterable[torch.Tensor], device: torch.device | None = None) -> int:
    """Bytes of the distinct storages behind `tensors`, on `device` or where they are: views and tied weights count once."""
    return sum({t.untyped_storage()._cdata: allocated_nbytes(t, device) for t in tensors}.values())


def with_blocks(mode: FakeTensorMode, block_nbytes: int) -> FakeTensorMode:
    """`mode`, whose tensors from now on count in blocks of `block_nbytes`: fake CPU tensors that stand for another device's."""
    setattr(mode, _BLOCKS, block_nbytes)
    return mode


def allocated_nbytes(tensor: torch.Tensor, device: torch.device | None = None) -> int:
    """Bytes that the allocator of its device, or of another, counts for the storage of a (fake) tensor."""
    nbytes = tensor.untyped_storage().nbytes()
    usual = _block_nbytes(device or tensor.device)
    block = int(getattr(tensor.fake_mode, _BLOCKS, usual)) if isinstance(tensor, FakeTensor) else usual
    return -(-nbytes // block) * block
