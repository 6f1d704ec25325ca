"""The repeated blocks of a model: where they are, and the model with only a few of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

LEAST = 6
"""Of fewer blocks, tracing all of them costs about as much as proving that they are equal."""


@dataclass(frozen=True, eq=False)
class Stack:
    """A list of blocks whose module trees are equal. `path` is its name in the model, `blocks` holds all of them, in order."""

    path: str
    blocks: nn.Module
    depth: int

    def block_of(self, name: str) -> tuple[int | None, str]:
        """Which block a name of a parameter, buffer or module lies in, and its name there; None and the whole name for all others."""
        rest = name.removeprefix(f"{self.path}.")
        index, _, own = rest.partition(".")
        return (int(index), own) if rest != name and index.isdecimal() else (None, name)

    @contextmanager
    def shortened(self, kept: int) -> Iterator[None]:
        """Inside, the model has its first `kept` blocks only."""
        held, modules = dict(self.blocks._modules), self.blocks._modules
        for name in list(modules)[kept:]:
            del modules[name]
        try:
            yield
        finally:
            modules.clear()
            modules.update(held)


def find_stack(model: nn.Module) -> Stack | None:
    """The longest list of blocks that look alike; None where there is none that is worth the name."""
    stacks = (
        Stack(path, module, len(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and path
    )
    found = max((stack for stack in stacks if stack.depth >= LEAST), key=lambda stack: stack.depth, default=None)
    return found if found is not None and _look_alike(model, found) else None


def _look_alike(model: nn.Module, stack: Stack) -> bool:
    """Whether blocks are of the same classes, modes and tensors, and share none of these with each other or with the rest."""
    blocks = list(stack.blocks.children())
    if len(blocks) != stack.depth or list(stack.blocks._modules) != [str(i) for i in range(stack.depth)]:
        return False  # one block stands twice
    owners: dict[int, set[int | None]] = {}
    everything = (model.named_modules(remove_duplicate=False), model.named_parameters(remove_duplicate=False))
    for named in (*everything, model.named_buffers(remove_duplicate=False)):
        for name, part in named:
            owners.setdefault(id(part), set()).add(stack.block_of(name)[0])
    first = _description(blocks[0])
    return all(len(found) == 1 for found in owners.values()) and all(_description(block) == first for block in blocks[1:])


def _description(block: nn.Module) -> list[object]:
    modules = [(name, type(module), module.training) for name, module in block.named_modules()]
    tensors = (*block.named_parameters(), *block.named_buffers())
    return [*modules, *((name, type(tensor), _layout(tensor)) for name, tensor in tensors)]


def _layout(tensor: torch.Tensor) -> object:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
