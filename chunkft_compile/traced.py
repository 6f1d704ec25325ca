"""A model of which there are only graphs: what Dynamo hands to a backend, and the parameters and buffers that its inputs are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

MODEL = "model."
"""What the names of parameters and buffers begin with in the graph modules made here."""


@dataclass(frozen=True)
class Place:
    """What an input of a graph is: the parameter or buffer `name`, a size, or a tensor of the batch."""

    kind: Literal["weight", "size", "batch"]
    name: str = ""


@dataclass(frozen=True, eq=False)
class Trace:
    """One graph of Dynamo's, with a place for each of its inputs. `root` is how it calls the module whose parts its nodes name."""

    number: int
    module: fx.GraphModule
    places: tuple[Place, ...]
    root: str

    def bind(self, arguments: Sequence[Any]) -> tuple["Bound", list[torch.Tensor]]:
        """A call of the graph in two parts: sizes, which are constants of what is captured, and the tensors of the batch."""
        pairs = list(zip(self.places, arguments, strict=True))
        sizes = tuple(int(value) for place, value in pairs if place.kind == "size")
        return Bound(self, sizes), [value for place, value in pairs if place.kind == "batch"]


@dataclass(frozen=True, eq=False)
class Bound:
    """A graph with numbers for its sizes."""

    trace: Trace
    sizes: tuple[int, ...]

    def __repr__(self) -> str:
        return f"graph {self.trace.number} with sizes {self.sizes}"


class TracedModel(nn.Module):
    """The parameters and buffers under their names. A call runs a graph over them."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in weights.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(last, tensor)
            else:
                owner.register_buffer(last, tensor)

    def forward(self, bound: Bound, *batch: torch.Tensor) -> Any:
        """The outputs of the graph."""
        return self.graph_module(bound)(*batch)[0]

    def graph_module(self, bound: Bound) -> fx.GraphModule:
        """The graph as a function of the batch alone, with the names of what is left out of its outputs beside them (there are none)."""
        trace = bound.trace
        root = nn.Module()
        root.add_module(MODEL.removesuffix("."), self)
        for node in trace.module.graph.find_nodes(op="get_attr"):  # tensors and functions that are no inputs
            setattr(root, str(node.target), getattr(trace.module, str(node.target)))
        graph, env, sizes = fx.Graph(), dict[fx.Node, Any](), iter(bound.sizes)
        for node, place in zip(trace.module.graph.find_nodes(op="placeholder"), trace.places, strict=True):
            match place.kind:
                case "weight":
                    env[node] = graph.get_attr(MODEL + place.name)
                case "size":
                    env[node] = next(sizes)
                case "batch":
                    env[node] = graph.placeholder(node.name)
        for node in trace.module.graph.nodes:
            if node.op == "output":
                graph.output((tuple(fx.node.map_arg(node.args[0], env.__getitem__)), ()))
            elif node.op != "placeholder":
                env[node] = graph.node_copy(node, env.__getitem__)
                _rename_stack(env[node], trace.root)
        placed = [node for node in graph.nodes if node.op == "placeholder"]
        for node in reversed(placed):  # weights come first in the list of nodes, where a generated function wants arguments
            graph._root.append(node)
        return fx.GraphModule(root, graph)


def _rename_stack(node: fx.Node, root: str) -> None:
    """Modules are named as in a captured model, so that segments have the same names."""
    stack = node.meta.get("nn_module_stack")
    if stack and root:
        node.meta["nn_module_stack"] = {
            key: (f"L['self']{path.removeprefix(root)}" if path.startswith(root) else path, kind) for key, (path, kind) in stack.items()
        }
