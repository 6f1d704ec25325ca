"""The option "offload": as "inputs", but what comes in waits in the store between forward and backward of the segment."""

import operator
from collections import defaultdict
from collections.abc import Mapping

from torch import fx

from chunkft_compile.capture import Capture
from chunkft_compile.liveness import storages
from chunkft_compile.segments import Segment, is_forward

OFFLOAD = "offload"


def lowered_option(option: str) -> str:
    """The option that the codes are lowered for: moving values changes no code."""
    return "inputs" if option == OFFLOAD else option


class Movable:
    """What can be away. `owner` is the number of the segment of each node."""

    def __init__(self, capture: Capture, owner: Mapping[fx.Node, int]) -> None:
        self._owner = owner
        self._kept = {node for node in capture.outputs if isinstance(node, fx.Node)} | set(capture.mutations.values())
        self._nodes: dict[int, list[fx.Node]] = defaultdict(list)  # forward nodes by storage
        for node in owner:
            if is_forward(node):
                for storage in storages(node.meta["val"]):
                    self._nodes[storage].append(node)
        given = [*capture.params, *capture.buffers, *capture.inputs, *capture.tangents, *capture.constants]
        for storage in {storage for node in given for storage in storages(node.meta.get("val"))}:
            self._nodes.pop(storage, None)
        self._of: dict[int, frozenset[int]] = {}

    def of(self, segment: Segment) -> frozenset[int]:
        """Storages that the step makes and that, once the forward of `segment` has run, nothing reads but its backward.

        They come from the neighbour below or are its own. This holds whatever the options of other segments are.
        """
        if segment.number not in self._of:
            near = [node for node in (*segment.nodes, *segment.externals) if node in self._owner and is_forward(node)]
            found = {storage for node in near for storage in storages(node.meta["val"]) if storage in self._nodes}
            self._of[segment.number] = frozenset(storage for storage in found if self._is_free(storage, segment.number))
        return self._of[segment.number]

    def _is_free(self, storage: int, number: int) -> bool:
        nodes = self._nodes[storage]
        near = all(self._owner[node] in (number, number - 1) and node not in self._kept for node in nodes)
        return near and not any(self._is_read(user, storage, number) for node in nodes for user in node.users)

    def _is_read(self, user: fx.Node, storage: int, number: int) -> bool:
        """Whether a call of another segment may read the storage for `user`. Forward calls below are over, but may be repeated."""
        owner = self._owner.get(user, number)
        if owner == number or user.target is operator.getitem:  # an item that lies in the storage is asked for its own users
            return False
        return owner > number or not is_forward(user) or storage not in storages(user.meta["val"])
