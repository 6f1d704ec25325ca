"""Which weights belong to one segment alone, so that they can live elsewhere between its calls."""

from collections import defaultdict
from functools import cached_property

import torch
from torch import fx

from chunkft_compile.liveness import storages
from chunkft_compile.lowering import Lowering

# Smaller buffers (rotary frequencies, running statistics) stay: moving them saves nothing and costs a transfer each time.
BUFFER_NBYTES = 1 << 20


class Weights:
    """Parameters and big buffers by the only segment that reads them, forward and backward.

    `segment_of[name]` is that segment. Not in it: weights that several segments read (tied ones), that share a storage with another
    or leave a part of it unused, that the model returns or writes to, or whose gradient is finished in another segment than the one
    that reads them.
    """

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering

    @cached_property
    def segment_of(self) -> dict[str, int]:
        """Name -> segment of every weight that can move."""
        alone = {name: next(iter(found)) for name, found in self._readers().items() if len(found) == 1}
        return {name: segment for name, segment in alone.items() if segment is not None}

    def nbytes(self, segment: int) -> int:
        """Bytes of the weights that move with `segment`."""
        return sum(self.nbytes_of(name) for name, reader in self.segment_of.items() if reader == segment)

    def nbytes_of(self, name: str) -> int:
        """Bytes of one weight."""
        return sum(storages([node.meta["val"] for node in self._nodes[name]]).values())

    @cached_property
    def _nodes(self) -> dict[str, list[fx.Node]]:
        """Placeholders by name; two names of one tensor are one name in a capture."""
        capture = self._lowering.capture
        found: dict[str, list[fx.Node]] = defaultdict(list)
        for node, name in (*capture.params.items(), *capture.buffers.items()):
            found[name].append(node)
        return found

    def _readers(self) -> dict[str, set[int | None]]:
        """Segments that read a weight, be it through a view; None stands for what is no segment, and for a weight that must stay."""
        owner, capture = self._lowering.owner, self._lowering.capture
        lying: dict[int, list[fx.Node]] = defaultdict(list)  # nodes by storage
        for node in capture.graph.nodes:
            for storage in storages(node.meta.get("val")):
                lying[storage].append(node)
        buffers = set(capture.buffers.values())
        found: dict[str, set[int | None]] = {}
        for name, nodes in self._nodes.items():
            inside = [node for storage in storages([node.meta["val"] for node in nodes]) for node in lying[storage]]
            found[name] = {owner.get(user) for node in inside for user in node.users}
            if name in capture.gradients:
                found[name].add(owner.get(capture.gradients[name]))
            shared = any(node.op == "placeholder" and node not in nodes for node in inside)
            small = name in buffers and self.nbytes_of(name) < BUFFER_NBYTES
            whole = all(_is_whole(node.meta["val"]) for node in nodes)
            if name in capture.mutations or shared or small or not whole:
                found[name].add(None)
        return found


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is contiguous and all of its storage."""
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
