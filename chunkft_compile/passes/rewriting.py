"""What rewriting passes share."""

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from chunkft_compile.fakes import fake_value
from chunkft_compile.liveness import storages


class Rewriter:
    """Emits calls into `graph` in the place of `node`, with its metadata and fake values of their own."""

    def __init__(self, graph: fx.Graph, fake_mode: FakeTensorMode, node: fx.Node) -> None:
        self.graph = graph
        self.fake_mode = fake_mode
        self.node = node

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call right before the node."""
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs)
        new.meta = dict(self.node.meta)
        new.meta["val"] = fake_value(new, self.fake_mode)
        return new

    def replace(self, new: fx.Node) -> None:
        """Use `new` wherever the node is used, and take the node away."""
        self.node.replace_all_uses_with(new)
        self.graph.erase_node(self.node)


def refresh(changed: fx.Node, fake_mode: FakeTensorMode) -> None:
    """Fake values behind a node whose layout or storage is another one now: of its views, and of what takes its layout from it."""
    todo, seen = list(changed.users), set[fx.Node]()
    while todo:
        node = todo.pop(0)
        if node.op != "call_function" or node in seen:
            continue
        seen.add(node)
        old = node.meta["val"]
        node.meta["val"] = fake_value(node, fake_mode)
        if _shares(node) or not _alike(old, node.meta["val"]):
            todo += list(node.users)


def _shares(node: fx.Node) -> bool:
    """Whether a result lies in the storage of an argument."""
    inside = {storage for source in node.all_input_nodes for storage in storages(source.meta.get("val"))}
    return not inside.isdisjoint(storages(node.meta["val"]))


def _alike(old: Any, new: Any) -> bool:
    pairs = zip(_tensors(old), _tensors(new), strict=True)
    return all(a.stride() == b.stride() and a.storage_offset() == b.storage_offset() for a, b in pairs)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
