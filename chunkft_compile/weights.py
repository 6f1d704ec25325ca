"""Which weights belong to one segment alone, so that they can live elsewhere between its calls."""

from collections import defaultdict
from functools import cached_property

from torch import fx

from chunkft_compile.liveness import storages
from chunkft_compile.lowering import Lowering

# Smaller buffers (rotary frequencies, running statistics) stay: moving them saves nothing and costs a transfer each time.
BUFFER_NBYTES = 1 << 20


class Weights:
    """Parameters and big buffers by the only segment that reads them, forward and backward.

    `segment_of[name]` is that segment. Not in it: weights that several segments read (tied ones), that share a storage with such a
    weight, that the model returns or writes to, or whose gradient is finished in another segment than the one that reads them.
    """

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering

    @cached_property
    def segment_of(self) -> dict[str, int]:
        """Name -> segment of every weight that can move."""
        alone = {name: next(iter(found)) for name, found in self._readers().items() if len(found) == 1}
        return {name: segment for name, segment in alone.items() if segment is not None}

    def nbytes(self, segment: int) -> int:
        """Bytes of the distinct storages that move with `segment`."""
        return sum(self._storages_of.get(segment, {}).values())

    @cached_property
    def _nodes(self) -> dict[str, list[fx.Node]]:
        """Placeholders by name; two names of one tensor are one name in a capture."""
        capture = self._lowering.capture
        found: dict[str, list[fx.Node]] = defaultdict(list)
        for node, name in (*capture.params.items(), *capture.buffers.items()):
            found[name].append(node)
        return found

    def _readers(self) -> dict[str, set[int | None]]:
        """Segments that read a weight or another weight in its storage; None stands for what is no segment."""
        owner, capture = self._lowering.owner, self._lowering.capture
        names_in: dict[int, set[str]] = defaultdict(set)
        own: dict[str, set[int | None]] = {}
        for name, nodes in self._nodes.items():
            own[name] = {owner.get(user) for node in nodes for user in node.users}
            if name in capture.gradients:
                own[name].add(owner.get(capture.gradients[name]))
            nbytes = sum(storages([node.meta["val"] for node in nodes]).values())
            if name in capture.mutations or (name in set(capture.buffers.values()) and nbytes < BUFFER_NBYTES):
                own[name].add(None)
            for node in nodes:
                for storage in storages(node.meta["val"]):
                    names_in[storage].add(name)
        together = {name: {name} for name in own}
        for names in names_in.values():
            for name in names:
                together[name] |= names
        return {name: {reader for other in names for reader in own[other]} for name, names in together.items()}

    @cached_property
    def _storages_of(self) -> dict[int, dict[int, int]]:
        found: dict[int, dict[int, int]] = defaultdict(dict)
        for name, segment in self.segment_of.items():
            found[segment] |= storages([node.meta["val"] for node in self._nodes[name]])
        return found
