"""Where the optimizer's work stands in the program of a step."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chunkft_compile.liveness import storages
from chunkft_compile.lowering import Lowering
from chunkft_compile.planner.problem import Update as When
from chunkft_compile.planner.program import Instruction, Op


@dataclass(frozen=True)
class Update:
    """How the optimizer goes through the chunks of a step: groups of chunks stepped together, with the bytes and time of each.

    `us` is the optimizer's time of a group. `state_nbytes`, `fetch_us` and `evict_us` are of the chunks that move: the bytes of what
    comes and goes for their update, and the time each way. `when` HELD, all groups come after the backward; IMMEDIATE, each one as soon
    as its gradients are complete.
    """

    groups: tuple[tuple[int, ...], ...]
    transient_nbytes: tuple[int, ...]
    state_nbytes: Mapping[int, int]
    fetch_us: Mapping[int, int]
    evict_us: Mapping[int, int]
    us: tuple[int, ...]
    when: When = When.HELD


def with_updates(calls: Sequence[Instruction], update: Update, memory_of: Mapping[int, frozenset[int]]) -> list[Instruction]:
    """The calls of a step with the updates in their places.

    An IMMEDIATE one comes when the gradients of its group are there and no later call reads the weights that it overwrites:
    `memory_of` are, by chunk, the values that lie in them.
    """
    if update.when is When.HELD:
        return [*calls, *(instruction for number in range(len(update.groups)) for instruction in _moves(update, number, ()))]
    value_of = {chunk: value for instruction in calls for value, chunk in instruction.gradients}
    ready: dict[int, list[Instruction]] = defaultdict(list)
    for number, group in enumerate(update.groups):
        gradients = tuple((value_of[chunk], chunk) for chunk in group)
        place = max(_last_call(calls, value, memory_of[chunk]) for value, chunk in gradients)
        ready[place] += _moves(update, number, gradients, calls[place].segment)
    return [made for number, call in enumerate(calls) for made in (call, *ready[number])]


def _last_call(calls: Sequence[Instruction], gradient: int, memory: frozenset[int]) -> int:
    """The number of the last call that writes this gradient or reads from this memory."""
    return max(number for number, call in enumerate(calls) if gradient in call.writes or not memory.isdisjoint(call.reads))


def _moves(update: Update, number: int, gradients: tuple[tuple[int, int], ...], segment: int = -1) -> list[Instruction]:
    """State in, optimizer, state out for one group; what stays on the device does not move. `gradients` are freed by the update."""
    group = update.groups[number]
    moving = tuple(chunk for chunk in group if chunk in update.state_nbytes)
    frees = tuple(value for value, _ in gradients)
    nbytes, step_us = update.transient_nbytes[number], update.us[number]
    step = Instruction(Op.UPDATE, segment, frees=frees, gradients=gradients, chunks=group, transient_nbytes=nbytes, us=step_us)
    if not moving:
        return [step]
    fetch_us, evict_us = (sum(us[chunk] for chunk in moving) for us in (update.fetch_us, update.evict_us))
    return [
        Instruction(Op.FETCH, segment, chunks=moving, us=fetch_us),
        step,
        Instruction(Op.EVICT, segment, chunks=moving, us=evict_us),
        Instruction(Op.FREE, segment, chunks=moving),
    ]


def lowest_readers(lowering: Lowering) -> dict[str, int]:
    """For every trained parameter, the lowest segment that reads its memory, be it through a view."""
    found: dict[int, int] = {}
    for node, owner in lowering.owner.items():
        for source in node.all_input_nodes:
            for storage in storages(source.meta.get("val")):
                found[storage] = min(owner, found.get(storage, owner))
    capture = lowering.capture
    readers: dict[str, int] = {}
    for node, name in capture.params.items():
        if name in capture.gradients:
            lowest = min(found.get(storage, len(lowering.segments)) for storage in storages(node.meta["val"]))
            readers[name] = min(lowest, readers.get(name, lowest))
    return readers
