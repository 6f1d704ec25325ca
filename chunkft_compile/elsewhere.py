"""Capturing and evaluating a model whose weights are not where it computes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

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
def visiting(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, weights and buffers that are not on `device` are there while the module that owns them runs its forward."""
    with ExitStack() as hooks:
        for module in model.modules():
            own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
            if any(tensor.device != device for tensor in own):
                before, after = _visit(device)
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after, always_call=True).remove)
        yield


def _visit(device: torch.device) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks before and after the forward of a module."""
    home: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before(module: nn.Module, *_: Any) -> None:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.device != device:
                home.append((tensor, tensor.data))
                set_data(tensor, tensor.data.to(device))

    def after(module: nn.Module, *_: Any) -> None:
        while home:
            tensor, data = home.pop()
            set_data(tensor, data)

    return before, after
