"""The joint graph cut into segments: prelude, repeated blocks, head; equal segments share a kind.

A segment owns forward and backward nodes. Forward values flow to the same or later segments only, backward values to the
same or earlier ones, so a step can run forward 0..S-1 and backward S-1..depth.
"""

import hashlib
import operator
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import torch
from torch import fx
from torch.utils import _pytree as pytree

from chunkft_compile.capture import Capture

_INDEXED = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)(?=\.|$)")


def is_forward(node: fx.Node) -> bool:
    """Whether AOTAutograd placed `node` before the loss."""
    return bool(node.meta["partitioner_tag"] == "is_forward")


@dataclass(frozen=True, eq=False)
class Segment:
    """Nodes of one segment in graph order, forward ones first, and the outside values they read in order of first use.

    `kind` is a hash of everything a lowered callable depends on: targets, arguments, shapes, dtypes, strides, aliasing, which
    values are gradients and which leave the segment. Position `i` of `nodes` (or of `externals`) means the same in every
    segment of a kind.
    """

    number: int
    name: str
    nodes: tuple[fx.Node, ...]
    externals: tuple[fx.Node, ...]
    kind: str

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Where a node stands: `nodes` count from 0, `externals` from -1 downwards."""
        inside = {node: i for i, node in enumerate(self.nodes)}
        return inside | {node: -1 - i for i, node in enumerate(self.externals)}

    def at(self, position: int) -> fx.Node:
        """The node at a position."""
        return self.nodes[position] if position >= 0 else self.externals[-1 - position]


def cut(capture: Capture) -> tuple[Segment, ...]:
    """Segments of the joint graph, in forward order. Any graph has at least one."""
    calls = [node for node in capture.graph.nodes if node.op == "call_function"]
    forward = [node for node in calls if is_forward(node)]
    names = _stack_runs(capture, forward) or _bottleneck_runs(capture, forward)
    number = {node: i for i, (_, run) in enumerate(names) for node in run}
    _settle_forward(forward, number)
    _assign_backward([node for node in calls if not is_forward(node)], number, len(names))
    members: dict[int, list[fx.Node]] = defaultdict(list)
    for node in forward + [node for node in calls if not is_forward(node)]:
        members[number[node]].append(node)
    segments = [(name, members[i]) for i, (name, _) in enumerate(names)]
    return tuple(_segment(i, name, nodes, capture) for i, (name, nodes) in enumerate(segments))


def _stack_runs(capture: Capture, forward: list[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """Runs of forward nodes that belong to one child of a repeated stack; empty where the model has no such stack.

    Runs, not children: a block that is called twice is two segments, so a graph never needs to go back.
    """
    runs: list[tuple[str, list[fx.Node]]] = []
    stacks: dict[str, set[str]] = defaultdict(set)
    for node in forward:
        key = _block(node)
        if key is not None:
            stacks[key[0]].add(key[1])
        name = f"{key[0]} {key[1]}" if key else ""
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].append(node)
    repeated = [stack for stack, children in stacks.items() if len(children) > 1]
    if not repeated:
        return []
    merged: list[tuple[str, list[fx.Node]]] = []
    for i, (name, nodes) in enumerate(runs):
        alone = i in (0, len(runs) - 1) or name or _reads_trainable(capture, nodes)
        if merged and (not alone or not _reads_trainable(capture, nodes)):
            merged[-1][1].extend(nodes)  # bridges and parameterless children do not pay for a segment of their own
        else:
            between = "prelude" if i == 0 else "head" if i == len(runs) - 1 else f"bridge {i}"
            merged.append((_short(name, repeated) or between, list(nodes)))
    return merged


def _block(node: fx.Node) -> tuple[str, str] | None:
    """(stack, index) of the outermost indexed module around a forward node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    match = _INDEXED.match(list(stack.values())[-1][0])
    return (match["stack"], match["index"]) if match else None


def _short(name: str, repeated: list[str]) -> str:
    """`block 3`, or the path of its stack where there are several."""
    stack, _, index = name.rpartition(" ")
    if repeated == [stack]:
        return f"block {index}"
    return name.removeprefix("L['self'].model.").removeprefix("L['self'].")


def _reads_trainable(capture: Capture, nodes: Iterable[fx.Node]) -> bool:
    return any(capture.params.get(source) in capture.gradients for node in nodes for source in node.all_input_nodes)


def _bottleneck_runs(capture: Capture, forward: list[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """Cut where all data passes through one tensor: the dominators of the last forward value, from the batch on.

    A cut is only made behind a segment that trains something.
    """
    flow: nx.DiGraph[object] = nx.DiGraph()
    inputs = set(capture.inputs)
    for node in forward:
        flow.add_edges_from((source, node) for source in node.all_input_nodes if source in flow or source in inputs)
    roots = [node for node in capture.inputs if node in flow]
    flow.add_edges_from(("batch", root) for root in roots)
    ends = [node for node in capture.outputs if isinstance(node, fx.Node) and node in flow]
    flow.add_edges_from((end, "result") for end in ends)
    if not roots or not ends:
        return [("model", forward)]
    dominators = nx.immediate_dominators(flow, "batch")
    bottlenecks, at = set(), dominators["result"]
    while at != "batch":
        bottlenecks.add(at)
        at = dominators[at]
    runs: list[list[fx.Node]] = [[]]
    for node in forward:
        runs[-1].append(node)
        if node in bottlenecks and _reads_trainable(capture, runs[-1]):
            runs.append([])
    if len(runs) > 1 and not _reads_trainable(capture, runs[-1]):
        runs[-2].extend(runs.pop())
    return [(f"part {i}", run) for i, run in enumerate(runs)] if len(runs) > 1 else [("model", forward)]


def _settle_forward(forward: list[fx.Node], number: dict[fx.Node, int]) -> None:
    """Push a node up to its latest input: traced order almost always agrees, and this makes it certain.

    The items of a tuple stay with the call that made it: only tensors go from segment to segment.
    """
    for node in forward:
        inputs = [number[source] for source in node.all_input_nodes if source in number]
        number[node] = inputs[0] if node.target is operator.getitem else max([number[node], *inputs])


def _assign_backward(backward: list[fx.Node], number: dict[fx.Node, int], count: int) -> None:
    """A backward node goes with the forward operation of its sequence number.

    Gradient accumulations have no such operation: they go with their lowest input. Backward values flow downwards only, so
    no node may stand above one of its inputs. Nodes that read nothing of the backward (zeros to fill) go to their first user.
    """
    of_operation = {node.meta.get("seq_nr"): segment for node, segment in number.items()}
    for node in backward:
        inputs = [number[source] for source in node.all_input_nodes if source in number and not is_forward(source)]
        own = of_operation.get(node.meta.get("seq_nr"))
        above = min(inputs, default=count - 1)
        number[node] = above if own is None or node.target is operator.getitem else min(own, above)
    for node in reversed(backward):
        if not any(source in number and not is_forward(source) for source in node.all_input_nodes):
            users = [number[user] for user in node.users if user in number]
            if users and of_operation.get(node.meta.get("seq_nr")) is None:
                number[node] = max(users)


def _segment(number: int, name: str, nodes: list[fx.Node], capture: Capture) -> Segment:
    inside = {node: i for i, node in enumerate(nodes)}
    externals: dict[fx.Node, int] = {}
    storages: dict[int, tuple[int, int | torch.SymInt]] = {}
    gradients = {node: name for name, node in capture.gradients.items()}
    kept = {node for node in capture.outputs if isinstance(node, fx.Node)} | set(capture.mutations.values())

    def reference(node: fx.Node) -> str:
        return f"n{inside[node]}" if node in inside else f"x{externals[node]}"

    rows: list[object] = []
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source not in externals:
                externals[source] = len(externals)
                rows.append((_origin(source, capture), _layout(source, storages)))
        arguments = fx.node.map_arg((node.args, dict(sorted(node.kwargs.items()))), reference)
        leaves = sorted({"f" if is_forward(user) else "b" for user in node.users if user not in inside and user.op != "output"})
        role = (is_forward(node), node in gradients, node in kept, leaves)
        rows.append((str(node.target), repr(arguments), _layout(node, storages), role))
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    return Segment(number, name, tuple(nodes), tuple(externals), digest)


def _origin(node: fx.Node, capture: Capture) -> str:
    """What an outside value is; its name does not matter, two blocks differ in names only."""
    if node in capture.params:
        return "trainable" if capture.params[node] in capture.gradients else "frozen"
    if node.op == "call_function":
        return "forward" if is_forward(node) else "backward"
    return "outside"


def _layout(node: fx.Node, storages: dict[int, tuple[int, int | torch.SymInt]]) -> object:
    """Of every tensor: shape, dtype, stride, its storage, numbered by first appearance, and its distance from the first tensor in that.

    Where a storage itself begins makes no difference: a batch may be a view of any rows of the data.
    """
    rows = []
    for tensor in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(tensor, torch.Tensor):
            offset = tensor.storage_offset()
            number, first = storages.setdefault(tensor.untyped_storage()._cdata, (len(storages), offset))
            rows.append((tuple(tensor.shape), str(tensor.dtype), tensor.stride(), offset - first, number))
    return tuple(rows)
