"""Which half of the graph the code of an `autograd.Function` belongs to."""

from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode


def tag_functions(graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
    """Say of every call whether it belongs to the forward: AOTAutograd (2.13.0) does not of what a function's own backward computes.

    What the forward reads is forward. The rest is backward, so that nothing is computed and saved before it is needed.
    """
    for node in reversed(graph.nodes):
        if node.op == "call_function" and "partitioner_tag" not in node.meta:
            forward = any(user.meta.get("partitioner_tag") == "is_forward" for user in node.users)
            node.meta["partitioner_tag"] = "is_forward" if forward else "is_backward"
