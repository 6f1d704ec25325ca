"""Gradients in a wider dtype than their weights: the cast joins the graph, so that slices, bytes and times follow from it."""

import torch
from torch import fx

from chunkft_compile.capture import Capture
from chunkft_compile.runtime.precision import Precision, gradient_dtype


def widen_gradients(capture: Capture, precision: Precision) -> Capture:
    """`capture`, changed in place: its gradients have the dtype that `precision` says."""
    output = capture.graph.output_node()
    wide: dict[fx.Node, fx.Node] = {}
    for node in dict.fromkeys(capture.gradients.values()):
        dtype = gradient_dtype(node.meta["val"].dtype, precision)
        if dtype != node.meta["val"].dtype:
            with capture.graph.inserting_before(output):
                wide[node] = _cast(capture, node, dtype)
    output.args = fx.node.map_arg(output.args, lambda node: wide.get(node, node) if node not in capture.outputs else node)
    for name, node in capture.gradients.items():
        capture.gradients[name] = wide.get(node, node)
    return capture


def _cast(capture: Capture, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Belongs where its gradient belongs: the rest of `meta` says so."""
    made = capture.graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": dtype})
    made.meta = dict(node.meta)
    with capture.fake_mode:
        made.meta["val"] = node.meta["val"].to(dtype)
    return made
