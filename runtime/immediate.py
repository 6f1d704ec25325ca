"""IMMEDIATE updates: the gradients of one backward are applied as they come, by the user's own optimizers, and freed."""

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch.optim import Optimizer

from chunkft_compile.planner.program import Instruction, Op
from chunkft_compile.runtime.applied import AppliedGradient
from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.moving import StateMover
from chunkft_compile.runtime.precision import Rounding


class Applier:
    """Executes FETCH, UPDATE, EVICT and FREE inside one backward. `holders` are the optimizers by chunk number.

    An update is the optimizer's own `step` with only its group's `.grad` set, so it takes the learning rate and every other
    setting that the parameter group has at that time. `applied` are the chunks updated so far, with the optimizer that did it;
    `.grad` of all of them is None until the backward ends, and a stand-in without bytes from then on. `broken` are the holders
    where the backward ended with an error, None otherwise.
    """

    def __init__(self, chunks: Sequence[Chunk], holders: Mapping[int, Optimizer], mover: StateMover, rounding: Rounding) -> None:
        self.applied: dict[int, weakref.ref[Optimizer]] = {}
        self.broken: Mapping[int, Optimizer] | None = None
        self._chunks = chunks
        self._holders = holders
        self._mover = mover
        self._rounding = rounding

    def execute(self, instruction: Instruction, gradients: dict[int, torch.Tensor]) -> None:
        """Do one of these instructions; `gradients` by chunk are taken out, so that they are freed after the update."""
        if instruction.op is not Op.UPDATE:
            held = [(self._holders[number], self._chunks[number]) for number in instruction.chunks]
            self._mover.move(instruction.op, held, rows=False)  # those of weights that are away come with their segment
            return
        for number in instruction.chunks:
            self._mover.wait(self._chunks[number])
        for optimizer in {id(self._holders[number]): self._holders[number] for number in instruction.chunks}.values():
            self._update(optimizer, [number for number in instruction.chunks if self._holders[number] is optimizer], gradients)

    def _update(self, optimizer: Optimizer, numbers: Sequence[int], gradients: dict[int, torch.Tensor]) -> None:
        leaves = [self._chunks[number].leaf for number in numbers]
        for number, leaf in zip(numbers, leaves, strict=True):
            leaf.grad = gradients.pop(number)
        try:
            self._rounding.step(optimizer, [self._chunks[number] for number in numbers])
        finally:
            for leaf in leaves:
                leaf.grad = None
        self.applied.update((number, weakref.ref(optimizer)) for number in numbers)

    def finish(self) -> None:
        """The backward is complete: say in `.grad` what became of the gradients."""
        self._mover.synchronize()
        self._holders = {}  # the loss keeps this object alive, and should not keep an optimizer
        for number in self.applied:
            leaf = self._chunks[number].leaf
            leaf.grad = AppliedGradient(leaf)

    def abandon(self) -> None:
        """The backward ended with an error."""
        self.broken, self._holders = self._holders, {}
