"""Which optimizer state stays on the device between the steps of its chunk, and what moving the rest costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from chunkft_compile.planner.bounds import loads
from chunkft_compile.planner.problem import Problem, Step


@dataclass(frozen=True, slots=True)
class _Room:
    """What the steps leave of the budget: during all calls, and during the updates of each step."""

    calls_nbytes: int
    updates_nbytes: tuple[int, ...]


def place_state(problem: Problem, steps: Sequence[Step]) -> tuple[int, ...]:
    """The chunks whose state stays on the device, ascending: the largest states first, since they save most transfers.

    Resident state is there at every moment of every step. Only while its own chunk is updated it is not on top of the rest:
    `update_nbytes` contains it.
    """
    room = _room(problem, steps)
    resident: set[int] = set()
    for index in sorted(range(len(problem.chunks)), key=lambda index: (-problem.chunks[index].state_nbytes, index)):
        if _holds(problem, steps, room, resident | {index}):
            resident.add(index)
    return tuple(sorted(resident))


def transfer_us(problem: Problem, resident: Sequence[int]) -> int:
    """Time per sweep to fetch and evict all other state, once each (also where the sweep has a single step), rounded up."""
    kept = set(resident)
    moved_nbytes = sum(2 * chunk.state_nbytes for index, chunk in enumerate(problem.chunks) if index not in kept)
    return problem.links[-1].read_us(moved_nbytes)


def _room(problem: Problem, steps: Sequence[Step]) -> _Room:
    calls, updates = [], []
    for step in steps:
        *moments, update = loads(problem, step.chunks, step.options)
        calls.append(problem.budget_nbytes - max(moment.nbytes for moment in moments))
        updates.append(problem.budget_nbytes - update.static_nbytes - update.grad_nbytes)
    return _Room(min(calls), tuple(updates))


def _holds(problem: Problem, steps: Sequence[Step], room: _Room, resident: set[int]) -> bool:
    total = sum(problem.chunks[index].state_nbytes for index in resident)
    return total <= room.calls_nbytes and all(
        total + _largest_update(problem, step, resident) <= left for step, left in zip(steps, room.updates_nbytes, strict=True)
    )


def _largest_update(problem: Problem, step: Step, resident: set[int]) -> int:
    """Bytes of the step's largest update on top of all resident state."""
    active = ((index, problem.chunks[index]) for index in step.chunks)
    return max(chunk.update_nbytes - (chunk.state_nbytes if index in resident else 0) for index, chunk in active)
