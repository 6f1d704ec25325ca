"""What single operators cost on the device at hand: seconds, and bytes they take and give back while they run.

Graph liveness sees the results of operators, not the scratch inside them (a bf16 mean makes an fp32 copy of its input). Both
figures depend on the operator, its arguments' layouts and the thread count only, so each distinct call is run once.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from chunkft_compile.cost_cache import CostCache, key_of
from chunkft_compile.liveness import storages
from chunkft_compile.runtime.meter import CallCost, measure_calls

Slot = tuple[int, torch.dtype]
"""The how-manieth storage among the arguments of a call, and its dtype."""

_SIGNATURE, _MAKES = "chunkft_signature", "chunkft_makes_bytes"  # keys in a node's meta
_T = TypeVar("_T")
_VIEW_US = 3  # a view makes no bytes; this is the dispatch


class Costs(Protocol):
    """What the compiler asks about operators. `OperatorCosts` measured it, `roofline.RooflineCosts` computes it."""

    def measure(self, graphs: Iterable[fx.Graph]) -> None:
        """Make sure that every call of `graphs` is known."""

    def temporary_nbytes(self, node: fx.Node) -> int:
        """Most bytes inside the call beyond its results."""

    def us(self, node: fx.Node) -> int:
        """Microseconds of the call."""

    def graph_us(self, graph: fx.Graph) -> int:
        """Microseconds of all calls of a graph."""


class OperatorCosts:
    """A table of measured calls on one device, filled when asked: from the cache on disk, else by running them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._table: dict[object, CallCost] = {}
        self._graph_us: dict[fx.Graph, int] = {}
        self._measured: set[fx.Graph] = set()  # the same codes come again with every program

    def measure(self, graphs: Iterable[fx.Graph]) -> None:
        """Run every call of `graphs` that is not in the table yet."""
        pending: dict[object, fx.Node] = {}
        new = [graph for graph in dict.fromkeys(graphs) if graph not in self._measured]
        for graph in new:
            for node in graph.nodes:
                if makes_bytes(node) and signature(node) not in self._table:
                    pending.setdefault(signature(node), node)
        if pending:
            self._measure(pending)
        self._measured.update(new)

    def _measure(self, pending: dict[object, fx.Node]) -> None:
        cache = CostCache(self.device)
        known = cache.load()
        for key in [key for key in pending if key_of(key) in known]:
            self._table[key] = known[key_of(key)]
            del pending[key]
        for nodes in _together(pending.values()):
            arena = _Arena(nodes, self.device)
            costs = measure_calls([_call(node, arena) for node in nodes], self.device)
            self._table.update(zip(map(signature, nodes), costs, strict=True))
        cache.add({key_of(key): self._table[key] for key in pending})

    def temporary_nbytes(self, node: fx.Node) -> int:
        """Most bytes inside the call beyond its results."""
        if not makes_bytes(node):
            return 0
        cost = self._table[signature(node)]
        return max(0, cost.peak_nbytes - cost.end_nbytes)

    def us(self, node: fx.Node) -> int:
        """Microseconds of the call."""
        if node.op != "call_function" or node.target is operator.getitem:
            return 0
        return round(self._table[signature(node)].seconds * 1e6) if makes_bytes(node) else _VIEW_US

    def graph_us(self, graph: fx.Graph) -> int:
        """Microseconds of all calls of a graph."""
        if graph not in self._graph_us:
            self._graph_us[graph] = sum(self.us(node) for node in graph.nodes)
        return self._graph_us[graph]


def makes_bytes(node: fx.Node) -> bool:
    """Calls that make bytes or write into some; views and tuple items do neither."""
    return _noted(node, _MAKES, _makes_bytes)


def _makes_bytes(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target._schema.is_mutable:
        return True
    before = {storage for source in node.all_input_nodes for storage in storages(source.meta.get("val"))}
    return any(storage not in before for storage in storages(node.meta.get("val")))


def signature(node: fx.Node) -> object:
    """Equal for calls that cost the same; where in a storage an argument begins makes no difference."""
    return _noted(node, _SIGNATURE, _sign_call)


def _noted(node: fx.Node, key: str, find: Callable[[fx.Node], _T]) -> _T:
    """What is found of a node, once. It is noted with the node: a copy has the meta of the original, and may have other arguments."""
    noted: tuple[fx.Node, _T] | None = node.meta.get(key)
    if noted is None or noted[0] is not node:
        noted = node.meta[key] = (node, find(node))
    return noted[1]


def _sign_call(node: fx.Node) -> object:

    def sign(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            value = argument.meta["val"]
            tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            return tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors) if tensors else value
        if isinstance(argument, list | tuple):
            return tuple(sign(item) for item in argument)
        return str(argument)

    return (node.target, sign(node.args), tuple((key, sign(value)) for key, value in sorted(node.kwargs.items())))


class _Arena:
    """Arguments for all calls out of few tensors: the `k`-th storage of every call with one dtype is the same memory.

    Calls are measured together, and their arguments side by side would need more memory than the step they belong to.
    """

    def __init__(self, nodes: Iterable[fx.Node], device: torch.device) -> None:
        self._device = device
        self._nbytes: dict[Slot, int] = {}
        for node in nodes:
            self._nbytes = _widened(self._nbytes, node)
        self._memory: dict[Slot, torch.Tensor] = {}

    def arguments(self, node: fx.Node) -> tuple[Any, Any]:
        """Real arguments with the layouts and the sharing of the fake ones. Integers are 0, a valid index everywhere."""
        keys = {storage: key for storage, (key, _) in _slots(node).items()}

        def real(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            slot, dtype = keys[leaf.untyped_storage()._cdata]
            memory = self._allocate((slot, dtype)).view(leaf.dtype)
            return memory.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())

        arguments = fx.node.map_arg((node.args, node.kwargs), lambda source: pytree.tree_map(real, source.meta["val"]))
        assert isinstance(arguments, tuple)
        return arguments

    def _allocate(self, key: Slot) -> torch.Tensor:
        if key not in self._memory:
            fill = 0.5 if key[1].is_floating_point else 0
            count = max(1, self._nbytes[key] // key[1].itemsize)
            self._memory[key] = torch.full((count,), fill, dtype=key[1], device=self._device)
        return self._memory[key]


def _together(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """Calls that can share an arena without more memory than the largest of them needs alone, which the step will need too."""
    ordered = sorted(nodes, key=_needed_nbytes, reverse=True)
    limit = _needed_nbytes(ordered[0]) if ordered else 0
    groups: list[tuple[dict[Slot, int], int, list[fx.Node]]] = []
    for node in ordered:
        for i, (nbytes, results, members) in enumerate(groups):
            wider, largest = _widened(nbytes, node), max(results, _results_nbytes(node))
            if sum(wider.values()) + largest <= limit:
                groups[i] = (wider, largest, [*members, node])
                break
        else:
            groups.append((_widened({}, node), _results_nbytes(node), [node]))
    return [members for _, _, members in groups]


def _needed_nbytes(node: fx.Node) -> int:
    return sum(_widened({}, node).values()) + _results_nbytes(node)


def _results_nbytes(node: fx.Node) -> int:
    return sum(storages(node.meta.get("val")).values())


def _widened(nbytes: dict[Slot, int], node: fx.Node) -> dict[Slot, int]:
    """Bytes per slot of an arena that also holds the arguments of `node`."""
    wider = dict(nbytes)
    for key, tensor in _slots(node).values():
        wider[key] = max(wider.get(key, 0), tensor.untyped_storage().nbytes())
    return wider


def _slots(node: fx.Node) -> dict[int, tuple[Slot, torch.Tensor]]:
    """Storage -> its slot in the arena and one tensor in it, for every storage among the arguments of a call."""
    slots: dict[int, tuple[Slot, torch.Tensor]] = {}
    for source in node.all_input_nodes:
        for leaf in pytree.tree_leaves(source.meta.get("val")):
            if isinstance(leaf, torch.Tensor):
                slots.setdefault(leaf.untyped_storage()._cdata, ((len(slots), leaf.dtype), leaf))
    return slots


def _call(node: fx.Node, arena: _Arena) -> Callable[[], object]:
    args, kwargs = arena.arguments(node)

    def call() -> object:
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    return call
