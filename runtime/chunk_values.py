"""What belongs to the rows of a chunk beside its weights, and is kept with it in a checkpoint.

One `ChunkValues` per kind: optimizer state and held gradients here. A further one (fp32 masters) joins by implementing the protocol
and standing in the list of `chunkft_compile.snapshots.chunk_values`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.moving import StateMover


class ChunkValues(Protocol):
    """Named values per chunk; a tensor is kept as `fqn[start:stop]` + `mark` + its name."""

    mark: str

    def of(self, number: int) -> Mapping[str, Any]:
        """The values of a chunk. Tensors are those in use or their stand-ins: to be read at once, not to be changed."""
        ...

    def put(self, number: int, values: Mapping[str, Any]) -> None:
        """Replace the values of a chunk, and send them where they live between uses. Tensors are on the host, nobody else holds them."""
        ...


class OptimizerState:
    """State of the optimizers of the chunks, `fqn[start:stop]/exp_avg`. `holders` are the optimizers by chunk number."""

    mark = "/"

    def __init__(self, chunks: Sequence[Chunk], holders: Mapping[int, Optimizer], mover: StateMover) -> None:
        self._chunks, self._holders, self._mover = chunks, holders, mover
        self._group = {id(p): group for optimizer in holders.values() for group in optimizer.param_groups for p in group["params"]}

    def of(self, number: int) -> Mapping[str, Any]:
        """See `ChunkValues.of`."""
        state: Mapping[str, Any] = self._holders[number].state.get(self._chunks[number].leaf, {})
        return state

    def put(self, number: int, values: Mapping[str, Any]) -> None:
        """See `ChunkValues.put`."""
        chunk, optimizer = self._chunks[number], self._holders[number]
        leaf = chunk.leaf
        optimizer.state.pop(leaf, None)
        for key, value in values.items():
            optimizer.state[leaf][key] = self._placed(leaf, key, value)
            self._mover.send_away(optimizer, chunk)  # at once: one tensor on the device at a time

    def _placed(self, leaf: nn.Parameter, key: str, value: Any) -> Any:
        """On the device of the leaf; a step counter stays on the host where the optimizer has it there, as in torch itself."""
        if not isinstance(value, torch.Tensor):
            return value
        group = self._group[id(leaf)]
        on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
        return value if on_host else value.to(leaf.device)


class HeldGradients:
    """Gradients between two backwards of one step, `fqn[start:stop].grad`; `held` are their chunks."""

    mark = "."

    def __init__(self, chunks: Sequence[Chunk], held: frozenset[int]) -> None:
        self._chunks, self._held = chunks, held

    def of(self, number: int) -> Mapping[str, Any]:
        """See `ChunkValues.of`."""
        return {"grad": self._chunks[number].leaf.grad} if number in self._held else {}

    def put(self, number: int, values: Mapping[str, Any]) -> None:
        """See `ChunkValues.put`."""
        leaf = self._chunks[number].leaf
        leaf.grad = values["grad"].to(leaf.device) if values else None
