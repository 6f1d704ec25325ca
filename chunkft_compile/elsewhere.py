"""Capturing and evaluating a model whose weights are not where it computes."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from chunkft_compile.errors import TrainingError
from chunkft_compile.runtime.chunks import set_data


def is_elsewhere(model: nn.Module, device: torch.device) -> bool:
    """Whether some weight or buffer is not on `device`."""
    return any(tensor.device != device for tensor in (*model.parameters(), *model.buffers()))


@contextmanager
def faked(
    model: nn.Module, device: torch.device, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
    """Inside, weights and buffers are fake tensors on `device`, which have shapes and no bytes, and so is the batch that it gives.

    Tensors that the model keeps otherwise stay as they are.
    """
    mode = FakeTensorMode()
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            of_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fake(tensor), tensor.requires_grad) if of_parameter else fake(tensor)
        return made[id(tensor)]

    held = [(store, name, tensor) for store in _stores(model) for name, tensor in store.items() if tensor is not None]
    for store, name, tensor in held:
        store[name] = stand_in(tensor)
    batch = pytree.tree_map(lambda leaf: fake(leaf) if isinstance(leaf, torch.Tensor) else leaf, (tuple(args), dict(kwargs)))
    try:
        yield batch
    finally:
        for store, name, tensor in held:
            store[name] = tensor


def _stores(model: nn.Module) -> Iterator[dict[str, Any]]:
    for module in model.modules():
        yield module._parameters
        yield module._buffers


@contextmanager
def visiting(model: nn.Module, device: torch.device, room: Callable[[], int] | None = None, *, first: bool = False) -> Iterator[None]:
    """Inside, weights and buffers that are not on `device` are there while the module that owns them runs its forward.

    With `room`, which says how many bytes the device has left, it is for many forwards: what came stays until the end, or until its room
    is needed. With `first`, the first parameter is there all the time.
    """
    guests = _Guests(device, room)
    with ExitStack() as hooks:
        hooks.callback(guests.send_home)
        for module in model.modules():
            if any(tensor.device != device for tensor in _own(module)):
                hooks.callback(module.register_forward_pre_hook(guests.before).remove)
                hooks.callback(module.register_forward_hook(guests.after, always_call=True).remove)
        if first:
            guests.invite(_first(model))
        yield


def bringing(method: MethodType, device: torch.device, budget_nbytes: int, *, first: bool) -> MethodType:
    """A method of a model that runs it on `device`: weights that live elsewhere come for it, see `visiting`, and stay within the budget."""
    function = method.__func__

    @functools.wraps(function)
    def brought(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_elsewhere(model, device):
            return function(model, *args, **kwargs)
        with visiting(model, device, lambda: budget_nbytes - torch.accelerator.memory_allocated(device), first=first):
            return function(model, *args, **kwargs)

    return MethodType(brought, method.__self__)


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def _first(model: nn.Module) -> nn.Module:
    """The module that owns the first parameter."""
    return next(module for module in model.modules() if any(parameter is not None for parameter in module._parameters.values()))


class _Guests:
    """Modules whose weights are on the device for a while."""

    def __init__(self, device: torch.device, room: Callable[[], int] | None) -> None:
        self._device, self._room = device, room
        self._home: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        self._calls: dict[nn.Module, int] = defaultdict(int)  # that are under way
        self._idle: list[nn.Module] = []  # here, and in no call

    def invite(self, module: nn.Module) -> None:
        """It comes, and stays to the end."""
        self._calls[module] += 1
        self._come(module)

    def before(self, module: nn.Module, *_: Any) -> None:
        """A forward of the module begins."""
        self._calls[module] += 1
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _own(module)):
            raise TrainingError(
                f"a method of the model ran its {type(module).__name__} with gradients enabled, and the weights of that live beside "
                f"{self._device}; call the compiled model itself to train, and everything else under torch.no_grad()"
            )
        if module in self._idle:
            self._idle.remove(module)
        self._come(module)

    def _come(self, module: nn.Module) -> None:
        away = [tensor for tensor in _own(module) if tensor.device != self._device]
        while away and self._idle and self._room is not None and self._room() < sum(tensor.nbytes for tensor in away):
            self._leave(self._idle.pop())  # the last one to come: those that came first stay, and serve the next forward, too
        self._home[module] += [(tensor, tensor.data) for tensor in away]
        for tensor in away:
            set_data(tensor, tensor.data.to(self._device))

    def after(self, module: nn.Module, *_: Any) -> None:
        """It ends, or has failed."""
        self._calls[module] -= 1
        if self._calls[module]:
            return
        if self._room is not None and self._room() >= 0:
            self._idle.append(module)
        else:
            self._leave(module)

    def send_home(self) -> None:
        """All that are still here."""
        for module in list(self._home):
            self._leave(module)

    def _leave(self, module: nn.Module) -> None:
        for tensor, data in self._home.pop(module):
            set_data(tensor, data)
