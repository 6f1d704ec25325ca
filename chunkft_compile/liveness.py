"""Exact memory of a code that runs boxed: every value dies at its last use, storages alias as its fake tensors say.

Checked against an allocator hook: equal to the byte for the graphs of this package, once the temporaries inside operators are
known (`costs.py`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from chunkft_compile.runtime.chunks import allocated_nbytes


def storages(value: Any) -> dict[int, int]:
    """Storage identity -> bytes of every tensor in a (fake) value."""
    if isinstance(value, torch.Tensor):  # as almost always
        return {value.untyped_storage()._cdata: allocated_nbytes(value)}
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return {t.untyped_storage()._cdata: allocated_nbytes(t) for t in tensors}


class Footprint:
    """Storages of one graph.

    `inputs[i]` is the group of argument `i`: arguments in one storage are one group. `outputs[i]` is `(group, 0)` where result
    `i` lies in an argument's storage, else `(-1 - k, nbytes)` in the `k`-th storage that the call makes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        self._calls = [node for node in nodes if node.op == "call_function"]
        self._storages = {node: storages(node.meta.get("val")) for node in nodes if node.op != "output"}
        self._arguments = [node for node in nodes if node.op == "placeholder" and self._storages[node]]
        self._constants = [node for node in nodes if node.op == "get_attr"]  # the graph's module holds them, before and after
        self._results = [node for node in nodes[-1].args[0] if isinstance(node, fx.Node)]
        self._last: dict[fx.Node, fx.Node] = {}
        for node in self._calls:
            for source in node.all_input_nodes:
                self._last[source] = node
        self._groups: dict[int, int] = {}
        for node in self._arguments:
            for storage in self._storages[node]:
                self._groups.setdefault(storage, len(self._groups))
        self.inputs = tuple(self._groups[next(iter(self._storages[node]))] for node in self._arguments)
        made: dict[int, int] = {}
        outputs = []
        for node in self._results:
            storage, nbytes = next(iter(self._storages[node].items()))
            known = self._groups.get(storage)
            outputs.append((known, 0) if known is not None else (-1 - made.setdefault(storage, len(made)), nbytes))
        self.outputs = tuple(outputs)
        self._cache: dict[object, int] = {}

    def transient_nbytes(
        self, freed: frozenset[int], temporary: Callable[[fx.Node], int], *, gradients: frozenset[int] = frozenset()
    ) -> int:
        """The most bytes above those live on entry.

        `freed` are the groups whose last reference the call holds, `temporary(node)` the bytes an operator takes and gives back
        while it runs. The storages of results in `gradients` count as nothing.
        """
        key = (freed, gradients)
        if key not in self._cache:
            self._cache[key] = max((live + temporary(node) for node, live, _ in self._walk(freed, gradients)), default=0)
        return self._cache[key]

    def live_at_peak(self, freed: frozenset[int], temporary: Callable[[fx.Node], int]) -> list[tuple[fx.Node, int]]:
        """The calls whose results are live at the fullest moment, with the bytes behind them; the call at work has its temporaries too."""
        peak, found = -1, list[tuple[fx.Node, int]]()
        makers: dict[int, fx.Node] = {}
        for node, live, present in self._walk(freed, frozenset()):
            for storage in self._storages[node]:
                makers.setdefault(storage, node)
            if live + temporary(node) > peak:
                peak = live + temporary(node)
                found = [(makers[storage], size) for storage, size in present.items() if storage in makers]
                found += [(node, temporary(node))] if temporary(node) else []
        return found

    def _walk(self, freed: frozenset[int], gradients: frozenset[int]) -> Iterator[tuple[fx.Node, int, dict[int, int]]]:
        """Every call with the bytes live in it, and the storages they are in (changed from call to call)."""
        ignored = {storage for i in gradients for storage in self._storages[self._results[i]]}
        constants = {storage for node in self._constants for storage in self._storages[node]}
        kept = {storage for storage, group in self._groups.items() if group not in freed} | ignored | constants
        references: dict[int, int] = {}
        nbytes: dict[int, int] = {}
        for node in (*self._arguments, *self._constants):
            for storage, size in self._storages[node].items():
                references[storage] = references.get(storage, 0) + 1
                nbytes[storage] = size
        results = set(self._results)
        live, present = 0, dict[int, int]()
        for node in self._calls:
            for storage, size in self._storages[node].items():
                references[storage] = references.get(storage, 0) + 1
                if references[storage] == 1 and storage not in kept:
                    nbytes[storage] = present[storage] = size
                    live += size
            yield node, live, present
            dead = [source for source in node.all_input_nodes if self._last[source] is node and source not in results]
            if node not in self._last and node not in results:
                dead.append(node)
            for source in dead:
                for storage in self._storages[source]:
                    references[storage] -= 1
                    if references[storage] == 0 and storage not in kept:
                        live -= nbytes[storage]
                        present.pop(storage, None)
