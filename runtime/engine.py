"""Runs the forward and backward instructions of a `Program`, and its updates where they are IMMEDIATE.

The engine keeps a value only as long as the program says: a call gets the last reference to what it frees, in a list that the
callee empties, so memory follows the plan to the byte.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from chunkft_compile.planner.problem import Update
from chunkft_compile.planner.program import Instruction, Op, Program
from chunkft_compile.runtime.chunks import storage_nbytes
from chunkft_compile.runtime.guard import Watch
from chunkft_compile.runtime.offload import Offloader
from chunkft_compile.runtime.weights import WeightKeeper

Call = Callable[[list[Any]], Sequence[torch.Tensor]]


class Stepper(Protocol):
    """Executes what a backward has to do with the optimizer: of a HELD step FETCH, of an IMMEDIATE one also UPDATE, EVICT and FREE."""

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
    parameters by chunk number, whose `.grad` receives the slices. A program with IMMEDIATE updates, or one that fetches state in its
    backward, needs a `stepper`, and the first gives it the slices instead. One that moves values needs an `offloader`; one that moves
    weights a `keeper`, and in `streamed` the name of every value that lies in them. `watch` is told of every instruction. Unless `exact`,
    the batch is smaller than the one that the program was made for.
    """

    def __init__(
        self,
        program: Program,
        calls: Sequence[Call],
        sources: Mapping[int, torch.Tensor],
        leaves: Mapping[int, nn.Parameter],
        stepper: Stepper | None = None,
        offloader: Offloader | None = None,
        keeper: WeightKeeper | None = None,
        streamed: Mapping[int, str] | None = None,
        watch: Watch | None = None,
        *,
        exact: bool = True,
    ) -> None:
        self.program = program
        self.exact = exact
        self.finished = False
        self.leaves = leaves
        self._calls = calls
        self._stepper = stepper
        self._offloader = offloader
        self._keeper = keeper
        self._streamed = streamed or {}
        self._watch = watch or Watch()
        self._values: dict[int, torch.Tensor] = dict(sources)
        self._middle, self._end = program.backward_starts, program.update_starts

    def forward(self) -> dict[int, torch.Tensor]:
        """Execute every FORWARD and the moves around them; gives the held values."""
        try:
            self._watch.anchor(0)
            self._run(range(self._middle))
        except BaseException:
            self.finished = True  # whoever keeps the error keeps this run, but nothing of the step
            self._let_go()
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
            self._watch.anchor(self._middle, 0 if self.exact else self._spare_nbytes())
            self._run(range(self._middle, self._end))
        except BaseException:
            if self._stepper is not None:
                self._stepper.abandon()
            raise
        finally:
            self._let_go()
        if self._stepper is not None:
            self._stepper.finish()

    def _spare_nbytes(self) -> int:
        """Bytes that the program counts for the values that are live now, and that these do not have."""
        program = self.program
        own = {value: tensor for value, tensor in self._values.items() if program.storage_of[value] >= 0}
        planned = sum(program.storage_nbytes[storage] for storage in {program.storage_of[value] for value in own})
        return planned - storage_nbytes(own.values())

    def _run(self, numbers: range) -> None:
        for number in numbers:
            self._execute(self.program.instructions[number])
            self._watch.check(number)

    def _execute(self, instruction: Instruction) -> None:
        match instruction.op:
            case Op.FORWARD | Op.BACKWARD:
                self._call(instruction)
            case Op.UPDATE:
                if self._keeper is not None:
                    self._keeper.change(instruction.chunks)
                self._steps.execute(instruction, {chunk: self._values.pop(value) for value, chunk in instruction.gradients})
            case _ if instruction.chunks:
                self._steps.execute(instruction, {})
            case _ if instruction.weights:
                self._move_weights(instruction)
            case _:
                self._move_values(instruction)

    def _call(self, instruction: Instruction) -> None:
        values = self._values
        if instruction.weights:
            self._weights.wait(self._names(instruction.reads))
        if self._offloader is not None:
            self._offloader.wait(instruction.reads)
        freed = set(instruction.frees)
        args: list[Any] = [values.pop(v) if v in freed else values[v] for v in instruction.reads]
        args.extend(instruction.starts)
        with torch.no_grad():
            results = self._calls[instruction.code](args)
        gradients = dict(instruction.gradients) if self.program.update is Update.HELD else {}
        for value, result in zip(instruction.writes, results, strict=True):
            if value in gradients:
                _accumulate(self.leaves[gradients[value]], result)
            elif value not in freed:
                values[value] = result

    def _move_values(self, instruction: Instruction) -> None:
        match instruction.op:
            case Op.EVICT:
                self._moves.evict({value: self._values[value] for value in instruction.reads})
            case Op.FETCH:
                self._values.update(self._moves.fetch(instruction.writes))
            case Op.FREE:
                for value in instruction.frees:
                    self._values.pop(value, None)  # a gradient that was added to `.grad` is not among them
                    if self._offloader is not None and self._offloader.is_leaving(value):
                        self._offloader.free([value])

    def _move_weights(self, instruction: Instruction) -> None:
        match instruction.op:
            case Op.EVICT:
                self._weights.evict(chunk for chunk, segment in self.program.homes.items() if segment in instruction.weights)
            case Op.FETCH:
                found = self._weights.fetch(self._names(instruction.writes))
                self._values.update({value: found[self._streamed[value]] for value in instruction.writes})
            case Op.FREE:
                names = self._names(instruction.frees)
                for value in instruction.frees:
                    del self._values[value]
                self._weights.free(names)

    def _names(self, values: Iterable[int]) -> list[str]:
        """Weights that these values lie in."""
        return list(dict.fromkeys(self._streamed[value] for value in values if value in self._streamed))

    def _let_go(self) -> None:
        self._values.clear()
        if self._keeper is not None:
            self._keeper.release()

    @property
    def _steps(self) -> Stepper:
        assert self._stepper is not None, "a program that updates or fetches state in its backward runs without a stepper"
        return self._stepper

    @property
    def _moves(self) -> Offloader:
        assert self._offloader is not None, "a program that moves values runs without an offloader"
        return self._offloader

    @property
    def _weights(self) -> WeightKeeper:
        assert self._keeper is not None, "a program that moves weights runs without a keeper"
        return self._keeper


def _accumulate(leaf: nn.Parameter, gradient: torch.Tensor) -> None:
    """What autograd's own accumulation does, in place from the second micro-batch on."""
    if leaf.grad is None:
        leaf.grad = gradient
    else:
        leaf.grad.add_(gradient)
