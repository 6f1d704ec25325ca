"""Between `loss.backward()` and the next step: optimizer state comes in, chunks are stepped, state goes out, the sweep moves on.

The user calls `optimizer.step()` once. The hooks here turn it into one step per group of chunks, so that only one group's state is
on the device at a time: groups but the last are stepped before the user's call does the last one. Every group sees only its own
gradients, and every `torch.optim` optimizer skips parameters without one.

Where a step was updated inside backward (IMMEDIATE, see `immediate`), the user's call finds nothing left to do: the hooks take the
stand-ins out of `.grad` before it and report the chunks after it.
"""

import functools
import gc
import inspect
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from chunkft_compile.planner.program import Instruction, Op
from chunkft_compile.runtime.adopting import adopt
from chunkft_compile.runtime.applied import TrainingError
from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.guard import Watch
from chunkft_compile.runtime.immediate import Applier
from chunkft_compile.runtime.moving import StateMover
from chunkft_compile.runtime.optimizers import is_stepping, live_optimizers, optimizers_of
from chunkft_compile.runtime.precision import Rounding, WideStep
from chunkft_compile.runtime.supported import refuse_unsupported
from chunkft_compile.runtime.untraced import pause, resume, untraced


class Updater:
    """Hooks every optimizer that trains `chunks`.

    With `adopts`, optimizers over the model's own parameters get the chunks in their place.
    `program()` gives the FETCH, UPDATE and EVICT instructions of the current step, or raises if the step cannot be updated now;
    `resident()` the chunks whose state stays; `done(numbers)` is told which chunks were stepped, and `watch()`, for the program that was
    given last, of every instruction.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        mover: StateMover,
        *,
        program: Callable[[Optimizer], Sequence[Instruction]],
        resident: Callable[[], frozenset[int]],
        done: Callable[[frozenset[int]], None],
        watch: Callable[[], Watch] = Watch,
        rounding: Rounding | None = None,
    ) -> None:
        self._chunks = chunks
        self._number = {id(chunk.leaf): number for number, chunk in enumerate(chunks)}
        self._mover = mover
        self._program, self._resident, self._done, self._watch = program, resident, done, watch
        self._rounding = rounding or Rounding()
        self._pending: _Pending | None = None
        self._stepped: set[int] = set()  # of the pending step
        self._found: list[weakref.ref[Optimizer]] = []
        self._prefetched: dict[int, Optimizer] = {}  # state that came in a backward, for the step that follows
        self.adopts = False
        self._applier: Applier | None = None  # of the last backward that updated its step
        self._acknowledged: frozenset[int] = frozenset()  # chunks it updated, whose optimizer is being stepped by the user
        _updaters.add(self)
        _hook_optimizers()

    def chunks_of(self, optimizer: Optimizer) -> list[int]:
        """Numbers of the chunks that `optimizer` trains."""
        ids = (id(p) for group in optimizer.param_groups for p in group["params"])
        return [self._number[i] for i in ids if i in self._number]

    def _look_around(self) -> tuple[list[Optimizer], list[Optimizer]]:
        """The live optimizers over chunks, after adopting those over parameters if `adopts`, and those over parameters that are left."""
        live = live_optimizers()
        over_weights = optimizers_of((chunk.weight for chunk in self._chunks), live)
        for optimizer in over_weights if self.adopts else ():
            adopt(optimizer, self._chunks)
        return optimizers_of((chunk.leaf for chunk in self._chunks), live), [] if self.adopts else over_weights

    def check_coverage(self) -> list[Optimizer]:
        """All optimizers over the chunks, after adopting those over the parameters if `adopts`.

        Raises `ValueError` if a chunk is in none or in two, `TypeError` for one that is unsupported."""
        found, strangers = self._look_around()
        if len(found) > 1:
            del found, strangers
            gc.collect()  # an optimizer that was replaced may still wait for the collector
            found, strangers = self._look_around()
        if strangers and not found:
            raise ValueError(
                f"{type(strangers[0]).__name__} misses every chunk: it holds the parameters of the wrapped model, which get no gradients. "
                f"Build it from model.parameters() of the compiled model"
            )
        holders: dict[int, Optimizer] = {}
        for optimizer in found:
            for number in self.chunks_of(optimizer):
                if number in holders:
                    names = f"{type(holders[number]).__name__} and {type(optimizer).__name__}"
                    raise ValueError(
                        f"two optimizers ({names}) train {self._chunks[number].name}; "
                        f"give each chunk to one of them, and drop an optimizer that is no longer used (del optimizer)"
                    )
                holders[number] = optimizer
        missing = [chunk.name for number, chunk in enumerate(self._chunks) if number not in holders]
        if found and missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ValueError(
                f"{type(found[0]).__name__} misses {shown}: they would never be trained. Build it from model.parameters() of the compiled "
                f"model, or freeze those parameters before compile() with requires_grad_(False)"
            )
        for optimizer in found:
            refuse_unsupported(optimizer, [self._chunks[number] for number in self.chunks_of(optimizer)])
        self._found = [weakref.ref(optimizer) for optimizer in found]
        return found

    def optimizers(self) -> list[Optimizer]:
        """Those over the chunks, as found by the last `check_coverage`; it looks again where one of them is gone or there was none."""
        found = self._known()
        return found if found and len(found) == len(self._found) else self.check_coverage()

    def _known(self) -> list[Optimizer]:
        """Those of the last `check_coverage` that are still there."""
        return [optimizer for reference in self._found if (optimizer := reference()) is not None]

    def _holders(self, optimizers: Iterable[Optimizer]) -> dict[int, Optimizer]:
        """The optimizer of each chunk."""
        return {number: optimizer for optimizer in optimizers for number in self.chunks_of(optimizer)}

    def without_state(self) -> set[int]:
        """Chunks for which no optimizer that was found has made state yet."""
        made = {id(leaf) for optimizer in self._known() for leaf, state in optimizer.state.items() if state}
        return {number for number, chunk in enumerate(self._chunks) if id(chunk.leaf) not in made}

    def applier(self, optimizers: Sequence[Optimizer]) -> Applier:
        """For one backward that updates its step with `optimizers`. Sends away state that should not be on the device."""
        holders = self._holders(optimizers)
        self._evict(holders)
        self._applier = Applier(self._chunks, holders, self._mover, self._rounding)
        return self._applier

    def fetcher(self) -> "Fetcher":
        """For one backward of a HELD step."""
        return Fetcher(self)

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begin to bring state for the step that follows; that of chunks whose optimizer is not known yet comes with the step."""
        holders = self._holders(self._known())
        for number in numbers:
            if number in holders:
                self._prefetched[number] = holders[number]
                self._mover.fetch(holders[number], self._chunks[number], rows=True)

    def settle(self) -> None:
        """Once there is a plan, and before a backward: all state goes where it belongs.

        A constructor (Adagrad) and `load_state_dict` put all of it on the device. A new plan may have other resident chunks, and the load
        of a checkpoint leaves theirs in the store.
        """
        holders = self._holders(self._known())
        self._evict(holders)
        for number in self._resident() & holders.keys():
            self._mover.bring_back(holders[number], self._chunks[number])

    def refuse_unfinished(self) -> None:
        """Raise `TrainingError` if a step was updated inside backward, and its `optimizer.step()` did not come."""
        waiting = sorted(self._applier.applied) if self._applier is not None else []
        if waiting:
            raise TrainingError(
                f'update="immediate" has applied the gradients of the last backward ({self._chunks[waiting[0]].name}, {len(waiting)} '
                f"chunks in all), and optimizer.step() was not called since; call it once after every backward. To add up the gradients "
                f'of several backwards, hold them: compile(..., accumulation=True, update="held")'
            )

    def forget(self) -> None:
        """Nothing is under way any more: gradients, applied ones too, are dropped, and so is what a broken step left."""
        self._pending = self._applier = None
        self._stepped, self._acknowledged = set(), frozenset()
        for chunk in self._chunks:
            chunk.leaf.grad = None

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step all groups but the last, and leave the last one ready for the step that follows."""
        if self.adopts:
            adopt(optimizer, self._chunks)
        mine = self.chunks_of(optimizer)
        if not mine or (self._pending is not None and _is_within(optimizer)):
            return
        self._recover_step()
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise ValueError("optimizer.step(closure) is not supported: a closure would run the step again; call backward() before step()")
        self._acknowledge(optimizer, mine)
        ready = {number for number in mine if self._chunks[number].leaf.grad is not None}
        if not ready:
            self._refuse_bypassed()
            return
        self._evict({number: optimizer for number in mine if number not in self._prefetched})
        gradients = {number: grad for number in ready if (grad := self._chunks[number].leaf.grad) is not None}
        if _overflowed(optimizer):
            self._pending = _Pending(optimizer, (), 0, gradients)
            self._show(gradients, ())
            return
        instructions = _restricted(self._program(optimizer), ready, self._prefetched.keys())
        last = max(i for i, instruction in enumerate(instructions) if instruction.op is Op.UPDATE)
        self._pending = _Pending(optimizer, instructions, last, gradients)
        self._show(gradients, ())
        watch = self._watch()
        watch.begin_update(instructions)
        try:
            for place, instruction in enumerate(instructions[:last]):
                self._execute(instruction, optimizer, gradients)
                watch.check(watch.number_of(place))
            self._await(instructions[last].chunks)
            self._show(gradients, instructions[last].chunks)
            self._pending.wide = self._rounding.begin(optimizer, [self._chunks[number] for number in instructions[last].chunks])
        except BaseException:
            self._recover_step()
            raise

    def recover(self) -> None:
        """Before a new step: send away what came for one that was left out, and put right what an error left behind.

        After an error inside a step, the gradients of the chunks that were not stepped are shown. Those that were have none. After an
        error in a backward with IMMEDIATE updates no chunk has a gradient; those that were updated are reported.
        """
        self._recover_step()
        prefetched, self._prefetched = self._prefetched, {}
        for number, optimizer in prefetched.items():
            self._mover.send_away(optimizer, self._chunks[number])

    def _recover_step(self) -> None:
        if self._applier is not None and self._applier.broken is not None:
            holders, applied = self._applier.broken, frozenset(self._applier.applied)
            self._applier = None
            self._evict(holders)
            if applied:
                self._done(applied)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if pending.wide is not None:
                pending.wide.abandon()
            self._show(pending.gradients, tuple(pending.gradients))
            for number in self._stepped:
                self._chunks[number].leaf.grad = None
            if self._stepped:
                self._done(frozenset(self._stepped))
        self._stepped = set()

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Send the last group's state away, show all gradients again, and report."""
        if self._acknowledged and not self._acknowledged.isdisjoint(self.chunks_of(optimizer)):
            done, self._acknowledged = self._acknowledged, frozenset()
            self._forget(done)
            self._done(done)
        if self._pending is None or self._pending.optimizer is not optimizer:
            return
        pending, self._pending = self._pending, None
        if pending.wide is not None:
            pending.wide.finish()
        watch = self._watch()
        for place, instruction in enumerate(pending.instructions[pending.last :], pending.last):
            if place > pending.last:  # the update itself was the user's call
                self._execute(instruction, optimizer, pending.gradients)
            watch.look(watch.number_of(place))
        self._mover.synchronize()
        self._show(pending.gradients, tuple(pending.gradients))
        self._stepped = set()
        if pending.instructions:
            self._done(frozenset(pending.gradients))
            watch.settle()  # after all is in its place: this step is complete, whatever it took

    def _execute(self, instruction: Instruction, optimizer: Optimizer, gradients: Mapping[int, torch.Tensor]) -> None:
        if instruction.op is not Op.UPDATE:
            self._mover.move(instruction.op, [(optimizer, self._chunks[number]) for number in instruction.chunks], rows=True)
            return
        self._await(instruction.chunks)
        self._show(gradients, instruction.chunks)
        self._rounding.step(optimizer, [self._chunks[number] for number in instruction.chunks])
        self._stepped.update(instruction.chunks)
        self._show(gradients, ())

    def _await(self, numbers: Iterable[int]) -> None:
        """The state of these chunks is about to be used."""
        for number in numbers:
            self._mover.wait(self._chunks[number])
            self._prefetched.pop(number, None)

    def _acknowledge(self, optimizer: Optimizer, mine: Sequence[int]) -> None:
        """The user steps an optimizer whose chunks were updated inside backward: `.grad` is as after `zero_grad`."""
        applied = self._applier.applied if self._applier is not None else {}
        ours = {number: applied[number] for number in mine if number in applied}
        for number in ours:
            self._chunks[number].leaf.grad = None
        strangers = [number for number, reference in ours.items() if reference() is not optimizer]
        if strangers:
            self._found = []  # look again before the next backward
            self._forget(ours)
            self._done(frozenset(ours))
            raise TrainingError(
                f'update="immediate" has applied the gradient of {self._chunks[strangers[0]].name} with another optimizer than the '
                f"{type(optimizer).__name__} whose step() was called; drop an optimizer that is no longer used (del optimizer)"
            )
        self._acknowledged = frozenset(ours)

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if self._applier is not None:
                self._applier.applied.pop(number, None)

    def _refuse_bypassed(self) -> None:
        """No chunk has a gradient. Raise `TrainingError` if weights have: a part of the model was called by itself."""
        name = next((chunk.param for chunk in self._chunks if chunk.weight.grad is not None), None)
        if name is not None and not self.adopts:
            raise TrainingError(
                f"{name} itself has a gradient, and no chunk has: a part of the model was called and not the compiled model, so nothing "
                f"was planned, and optimizer.step() would train nothing. Call the compiled model (TRL's SFTTrainer does not: take "
                f"chunkft_compile.integrations.trl)"
            )

    def _evict(self, holders: Mapping[int, Optimizer]) -> None:
        """Send state away that should not be on the device: `load_state_dict` puts all of it there, and so does a broken step."""
        resident = self._resident()
        for number, optimizer in holders.items():
            if number not in resident:
                self._mover.send_away(optimizer, self._chunks[number])

    def _show(self, gradients: Mapping[int, torch.Tensor], shown: Sequence[int]) -> None:
        for number, gradient in gradients.items():
            self._chunks[number].leaf.grad = gradient if number in shown else None


class Fetcher:
    """The stepper of a HELD backward: all it has to do is to begin fetching."""

    def __init__(self, updater: Updater) -> None:
        self._updater = updater

    def execute(self, instruction: Instruction, gradients: dict[int, torch.Tensor]) -> None:
        """Begin a FETCH; nothing else of the optimizer's comes before `optimizer.step()`."""
        assert instruction.op is Op.FETCH, f"{instruction.op} of chunks in a backward whose updates are HELD"
        self._updater.prefetch(instruction.chunks)

    def finish(self) -> None:
        """Nothing is to be done."""

    def abandon(self) -> None:
        """Nothing is to be done: what came is sent away before the next step."""


@dataclass
class _Pending:
    """A step of the user's that is under way: its instructions, the place of the last update, all gradients, that group's fp32 leaves.

    A step that the user's scaler skips has no instructions.
    """

    optimizer: Optimizer
    instructions: Sequence[Instruction]
    last: int
    gradients: Mapping[int, torch.Tensor]
    wide: WideStep | None = None


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether `GradScaler` calls a step that must change nothing.

    Other optimizers it does not call at all then. Fused ones it does, with this attribute, and they would count the step and take it back.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _is_within(optimizer: Optimizer) -> bool:
    """Whether the hooks of a step run within another step of the same optimizer: its class calls the hooked `step` of its base."""
    # torch 2.13.0: `Optimizer.profile_hook_step` wraps `step` in a function that has the optimizer as its first argument
    frame, steps = inspect.currentframe(), 0
    while frame is not None:
        if frame.f_code is _STEP_CODE and frame.f_locals["args"][0] is optimizer:
            steps += 1
        frame = frame.f_back
    return steps > 1


_STEP_CODE = Optimizer.profile_hook_step(lambda optimizer: None).__code__

_updaters: "weakref.WeakSet[Updater]" = weakref.WeakSet()


@functools.cache
def _hook_optimizers() -> None:
    """Ask every updater at every optimizer step, from the first compiled model on.

    torch has global hooks only. Two of them, for good, instead of two per model that leave with it: torch iterates over them, and
    a model may be collected meanwhile.
    """
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


@untraced("a hook that ends the tracing of the step", recursive=False)
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not is_stepping(optimizer):
        paused = pause(optimizer)
        _tell("before_step", optimizer, args, kwargs)
        if paused and not any(updater.chunks_of(optimizer) for updater in list(_updaters)):
            resume(optimizer)


@untraced("a hook that ends the tracing of the step", recursive=False)
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not is_stepping(optimizer):
        _tell("after_step", optimizer, args, kwargs)
        if not _is_within(optimizer):
            resume(optimizer)


def _tell(method: str, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for updater in list(_updaters):
        getattr(updater, method)(optimizer, args, kwargs)


def _restricted(instructions: Sequence[Instruction], ready: set[int], here: Collection[int]) -> list[Instruction]:
    """The instructions for the chunks that have a gradient and belong to this optimizer. The state of those in `here` has come."""
    kept = []
    for instruction in instructions:
        wanted = ready.difference(here) if instruction.op is Op.FETCH else ready
        chunks = tuple(number for number in instruction.chunks if number in wanted)
        if chunks:
            kept.append(replace(instruction, chunks=chunks))
    return kept
