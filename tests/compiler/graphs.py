"""Whether two captures are the same, node by node."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from chunkft_compile.capture import Capture

MODULES = ("nn_module_stack", "fwd_nn_module_stack")


def rows(found: Capture) -> Iterator[object]:
    """One row for each node, and one for what the capture says of each: equal captures have equal rows."""
    nodes = [node for node in found.graph.nodes if node.op != "output"]
    number = {node: i for i, node in enumerate(nodes)}
    storages: dict[int, int] = {}
    start = min(node.meta["seq_nr"] for node in nodes if "seq_nr" in node.meta)

    def layout(value: Any) -> object:
        if not isinstance(value, torch.Tensor):
            return repr(value)
        owner = storages.setdefault(value.untyped_storage()._cdata, len(storages))
        shape = (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad, value.is_leaf)
        return type(value), shape, owner, value.untyped_storage().nbytes()

    def seen(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: f"node {number[node]}")

    for node in nodes:
        meta = node.meta
        modules = [list(meta.get(kind, {}).values()) for kind in MODULES]
        order = meta["seq_nr"] - start if "seq_nr" in meta else None
        values = [layout(leaf) for leaf in pytree.tree_leaves(meta.get("val"))]
        others = [meta.get(key) for key in ("partitioner_tag", "stack_trace", "desc", "tensor_meta", "original_aten", "autograd_backward")]
        called = (str(node.target), repr(seen((node.args, node.kwargs)))) if node.op == "call_function" else ()
        yield node.op, called, values, modules, order, repr(others), sorted(meta)
    output = found.graph.output_node()
    yield seen(output.args[0]), repr(output.meta["desc"])
    for field in ("params", "buffers", "inputs", "tangents"):
        yield field, [(number[node], name) for node, name in getattr(found, field).items()]
    yield "constants", [(number[node], tensor.tolist()) for node, tensor in found.constants.items()]
    yield "outputs", seen(found.outputs), found.out_spec, found.lost
    for field in ("gradients", "mutations"):
        yield field, [(name, number[node]) for name, node in getattr(found, field).items()]


def first_difference(one: Capture, other: Capture) -> str:
    """Where they differ first, in words; empty where they do not."""
    mine, theirs = list(rows(one)), list(rows(other))
    for a, b in zip(mine, theirs, strict=False):
        if a != b:
            return f"{a}\n{b}"
    return "" if len(mine) == len(theirs) else f"{len(mine)} rows and {len(theirs)}"
