"""Normalisations of half-precision values by fp32 weights: torch's fake kernels say the wrong dtype of what they save on a CPU."""

import operator

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten

_NORMS = (
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit_functional.default,
)
_HALF = (torch.bfloat16, torch.float16)


def correct_statistics(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Make mean and deviation fp32 in `graph`, which is what the CPU kernels give (2.13.0), and what their backwards accept."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _NORMS and _is_mixed(node):
            with fake_mode:
                made = [value.float() if 1 <= i <= 2 else value for i, value in enumerate(node.meta["val"])]
            node.meta["val"] = tuple(made)
            for user in node.users:
                if user.target is operator.getitem:
                    user.meta["val"] = made[user.args[1]]


def _is_mixed(node: fx.Node) -> bool:
    values = [source.meta["val"] for source in node.all_input_nodes]
    return values[0].device.type == "cpu" and values[0].dtype in _HALF and any(value.dtype == torch.float32 for value in values[1:])
