"""The tensors of optimizer state, wherever in it they are: on their own, in lists, or inside tensor subclasses (8-bit state).

A tensor subclass is taken apart and put together by `__tensor_flatten__` and `__tensor_unflatten__`, the protocol by which
torch.compile handles such subclasses. State in a subclass without them is refused when a plan is made.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

Path = tuple[object, ...]
"""Where a tensor is in the state of a parameter: its key, then positions in containers, then attributes of subclasses."""


def tensors_in(state: Any) -> Iterator[tuple[Path, torch.Tensor]]:
    """Every plain tensor in `state` and the way to it. Raises `TypeError` for a subclass that cannot be taken apart."""
    found: list[tuple[Path, torch.Tensor]] = []

    def note(path: Path, tensor: torch.Tensor) -> torch.Tensor:
        found.append((path, tensor))
        return tensor

    map_tensors(note, state)
    return iter(found)


def map_tensors(place: Callable[[Path, torch.Tensor], torch.Tensor], state: Any) -> Any:
    """`state` with `place(path, tensor)` for every plain tensor in it; what holds no tensor stays the same object."""
    return pytree.tree_map_with_path(lambda keys, leaf: _map_leaf(place, tuple(map(_name, keys)), leaf), state)


def _name(key: Any) -> object:
    return key.key if isinstance(key, pytree.MappingKey) else str(key)


def _map_leaf(place: Callable[[Path, torch.Tensor], torch.Tensor], path: Path, leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if type(leaf) is torch.Tensor:
        return place(path, leaf)
    taken_apart = getattr(leaf, "__tensor_flatten__", None)
    if taken_apart is None:
        raise TypeError(f"state in {type(leaf).__name__}, a tensor subclass without __tensor_flatten__, cannot be moved")
    names, context = taken_apart()
    old = {name: getattr(leaf, name) for name in names}
    new = {name: _map_leaf(place, (*path, name), tensor) for name, tensor in old.items()}
    if all(new[name] is tensor for name, tensor in old.items()):
        return leaf
    whole: Any = type(leaf)
    return whole.__tensor_unflatten__(new, context, leaf.shape, leaf.stride())
