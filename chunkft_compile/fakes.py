"""What a call gives on fake tensors.

NOTE [layouts that are known]
Fake tensors take a quarter of a millisecond to find the layout of a result, and it follows from the operator and the layouts of its
arguments. So where a call has made one plain tensor, an equal call makes it again without asking: in a storage of its own, or as a view of
the same argument. Calls that do more (several results, changed arguments, symbolic sizes) are always asked for.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

# Private (2.13.0): a fake tensor in a given storage. Calling operators for that would take as long as asking.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_KNOWN: dict[object, "Made"] = {}
_MOST = 100_000  # calls that are remembered; a model has some thousand different ones
PLAIN = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments that are what they are."""


class Made(NamedTuple):
    """How a call made its result: laid out like this, in a storage of its own or in that of an argument tensor, by its number."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    dtype: torch.dtype
    device: torch.device
    argument: int | None = None

    @classmethod
    def like(cls, tensor: torch.Tensor, argument: int | None = None) -> "Made":
        """As a tensor is laid out."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, argument)

    def again(self, fake_mode: FakeTensorMode, read: Sequence[torch.Tensor]) -> FakeTensor:
        """The result where `read` are the argument tensors."""
        if self.argument is not None:
            return self.inside(fake_mode, read[self.argument].untyped_storage())
        return FakeTensor(fake_mode, self._alone(), self.device)

    def inside(self, fake_mode: FakeTensorMode, storage: torch.UntypedStorage) -> FakeTensor:
        """The same layout in a given storage, that of a fake tensor or one on "meta"."""
        with torch._C._DisableTorchDispatch():
            bare = torch.empty(0, dtype=self.dtype, device="meta").set_(storage, self.offset, self.shape, self.stride)
        return FakeTensor(fake_mode, bare, self.device)

    def fits(self, result: torch.Tensor) -> bool:
        """Whether the storage of `result` is what `again` makes."""
        own = self.argument is None
        return not own or (self.offset == 0 and result.untyped_storage().nbytes() == self._alone().untyped_storage().nbytes())

    def _alone(self) -> torch.Tensor:
        """What is behind a fake tensor in a storage of its own: no memory."""
        with torch._C._DisableTorchDispatch():
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


def how_made(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Made | None:
    """How a call has made its result; None where that is not so simple that `Made.again` could do it."""
    read = tensors_of(args)
    plain = type(result) is FakeTensor and result.constant is None and result.layout is torch.strided
    if not plain or func._schema.is_mutable or tensors_of(kwargs.values()) or any(type(tensor) is not FakeTensor for tensor in read):
        return None
    storage = result.untyped_storage()
    shared = [number for number, tensor in enumerate(read) if tensor.untyped_storage()._cdata == storage._cdata]
    if any(tensor is result for tensor in read) or result.is_conj() or result.is_neg():
        return None
    made = Made.like(result, shared[0] if shared else None)
    return made if made.fits(result) else None


def tensors_of(args: Iterable[Any]) -> list[torch.Tensor]:
    """Those among arguments, and in lists of them."""
    return [leaf for arg in args for leaf in (arg if isinstance(arg, list | tuple) else (arg,)) if isinstance(leaf, torch.Tensor)]


def fake_value(node: fx.Node, fake_mode: FakeTensorMode) -> Any:
    """The result of a call on the fake values of its arguments; nothing is computed."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])

    def ask() -> Any:
        with fake_mode, torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    return call(node.target, args, kwargs, fake_mode, ask)


def call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], fake_mode: FakeTensorMode, ask: Callable[[], Any]) -> Any:
    """What `ask` gives, which calls `target` with these arguments. It is not called where an equal call was made before."""
    try:
        key = _key(target, args, kwargs)
    except _AskError:
        return ask()
    if (made := _KNOWN.get(key)) is not None:
        return made.again(fake_mode, tensors_of(args))
    result = ask()
    made = how_made(target, args, kwargs, result)
    if made is not None and all(type(size) is int for size in (*made.shape, *made.stride, made.offset)) and len(_KNOWN) < _MOST:
        _KNOWN[key] = made
    return result


class _AskError(Exception):
    """What a call gives does not only follow from operator and layouts."""


def _key(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """A call as far as it decides the layout of its result. Raises `_AskError`."""
    if not isinstance(target, torch._ops.OpOverload):
        raise _AskError
    read = tensors_of(args)
    if len({tensor.untyped_storage()._cdata for tensor in read}) < len(read):
        raise _AskError  # in which of them the result lies is not to be seen
    if any(torch.is_autocast_enabled(tensor.device.type) for tensor in read):
        raise _AskError
    return target, torch.get_default_dtype(), _written(args), _written(sorted(kwargs.items()))


def _written(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        if type(value) is not FakeTensor or value.constant is not None or not all(type(size) is int for size in sizes):
            raise _AskError
        return sizes, value.dim(), value.dtype, value.fake_device, value.untyped_storage().nbytes(), value.is_conj(), value.is_neg()
    if isinstance(value, list | tuple):
        return tuple([_written(each) for each in value])
    if isinstance(value, PLAIN):
        return type(value), value
    raise _AskError
