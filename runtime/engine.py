"""Runs the forward and backward instructions of a `Program`, and its updates where they are IMMEDIATE.

The engine keeps a value only as long as the program says: a call gets the last reference to what it frees, in a list that the
callee empties, so memory follows the plan to the byte.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from chunkft_compile.planner.problem import Update
from chunkft_compile.planner.program import Instruction, Op, Program
from chunkft_compile.runtime.guard import Watch
from chunkft_compile.runtime.offload import Offloader

Call = Callable[[list[Any]], Sequence[torch.Tensor]]


class Stepper(Protocol):
    """Executes FETCH, UPDATE and EVICT inside backward; see `runtime/immediate.py`."""

    def execute(self, instruction: Instruction, gradients: dict[int, torch.Tensor]) -> None:
        """Do one of them. `gradients` by chunk are those to apply; the callee takes them out, so that they can be freed."""
        ...

    def finish(self) -> None:
        """The backward is complete."""
        ...

    def abandon(self) -> None:
        """The backward ended with an error."""
        ...


class Run:
    """One micro-batch on its way through a program: forward once, then backward once.

    `calls` are the codes that instructions index, `sources` the outside values (weights, buffers, batch), `leaves` the chunk
    parameters by chunk number, whose `.grad` receives the slices. A program with IMMEDIATE updates needs a `stepper`, which gets
    the slices instead; one that moves values needs an `offloader`. `watch` is told of every instruction.
    """

    def __init__(
        self,
        program: Program,
        calls: Sequence[Call],
        sources: Mapping[int, torch.Tensor],
        leaves: Mapping[int, nn.Parameter],
        stepper: Stepper | None = None,
        offloader: Offloader | None = None,
        watch: Watch | None = None,
    ) -> None:
        assert (stepper is not None) == (program.update is Update.IMMEDIATE), f"{program.update} updates with the stepper {stepper}"
        self.program = program
        self.leaves = leaves
        self.finished = False
        self._calls = calls
        self._stepper = stepper
        self._offloader = offloader
        self._watch = watch or Watch()
        self._values: dict[int, torch.Tensor] = dict(sources)

    def forward(self) -> dict[int, torch.Tensor]:
        """Execute every FORWARD, and take away what only backward needs; gives the held values."""
        try:
            self._run_forward()
        except BaseException:
            self.finished = True  # whoever keeps the error keeps this run, but nothing of the step
            self._values.clear()
            raise
        held = {value: self._values[value] for value in self.program.held}
        # Autograd will hang this run on the outputs; the run keeps aliases of them, or the two would hold each other.
        self._values.update({value: tensor.detach() for value, tensor in held.items()})
        return held

    def backward(self, tangents: Mapping[int, torch.Tensor]) -> None:
        """Execute everything behind the FORWARDs, from the gradients of the outputs to `.grad` of the active chunks.

        HELD updates are not part of it: they wait for `optimizer.step()`.
        """
        self._values.update(tangents)
        self.finished = True
        try:
            self._watch.anchor(self._first_backward())
            for number, instruction in enumerate(self.program.instructions):
                if instruction.op is Op.BACKWARD:
                    self._execute(instruction)
                elif instruction.op is Op.FETCH and instruction.writes:
                    self._values.update(self._moves().fetch(instruction.writes))
                elif self._stepper is not None and instruction.chunks and instruction.op in (Op.FETCH, Op.UPDATE, Op.EVICT):
                    self._stepper.execute(instruction, {chunk: self._values.pop(value) for value, chunk in instruction.gradients})
                else:
                    continue
                self._watch.check(number)
        except BaseException:
            if self._stepper is not None:
                self._stepper.abandon()
            raise
        finally:
            self._values.clear()
        if self._stepper is not None:
            self._stepper.finish()

    def _run_forward(self) -> None:
        self._watch.anchor(0)
        for number, instruction in enumerate(self.program.instructions):
            if instruction.op is Op.FORWARD:
                self._execute(instruction)
            elif instruction.op is Op.EVICT and instruction.reads:
                self._moves().evict({value: self._values.pop(value) for value in instruction.reads})
            else:
                continue
            self._watch.check(number)

    def _first_backward(self) -> int:
        """The number of the first instruction behind the forward."""
        instructions = self.program.instructions
        return next(number for number, instruction in enumerate(instructions) if instruction.op in (Op.BACKWARD, Op.FETCH))

    def _moves(self) -> Offloader:
        assert self._offloader is not None, "a program that moves values runs without an offloader"
        return self._offloader

    def _execute(self, instruction: Instruction) -> None:
        values = self._values
        freed = set(instruction.frees)
        args: list[Any] = [values.pop(v) if v in freed else values[v] for v in instruction.reads]
        args.extend(instruction.starts)
        with torch.no_grad():
            results = self._calls[instruction.code](args)
        gradients = dict(instruction.gradients) if self._stepper is None else {}
        for value, result in zip(instruction.writes, results, strict=True):
            if value in gradients:
                _accumulate(self.leaves[gradients[value]], result)
            elif value not in freed:
                values[value] = result


def _accumulate(leaf: nn.Parameter, gradient: torch.Tensor) -> None:
    """What autograd's own accumulation does, in place from the second micro-batch on."""
    if leaf.grad is None:
        leaf.grad = gradient
    else:
        leaf.grad.add_(gradient)
