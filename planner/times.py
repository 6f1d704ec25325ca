"""The one place where the time of a step is computed: NOTE [time of a step] in `problem`."""

from collections.abc import Sequence
from dataclasses import dataclass

from chunkft_compile.planner.bounds import costs_of, roles_of
from chunkft_compile.planner.grounds import NO_TRANSFER, Ground, Transfer, offload
from chunkft_compile.planner.problem import Cost, Role, Update


@dataclass(frozen=True, slots=True)
class Work:
    """What the chunks of a step add to the backward of each segment, and the HELD update of all of them."""

    compute_us: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    update_us: int
    update_moves: Transfer

    @property
    def held_us(self) -> int:
        """Time of the HELD update."""
        return self.update_moves.with_compute(self.update_us)


def work_of(ground: Ground, chunks: Sequence[int], update: Update) -> Work:
    """The share of chunks in the time of a step."""
    problem, immediate = ground.problem, update is Update.IMMEDIATE
    count = len(problem.segments)
    compute, transfers = [0] * (count + 1), [NO_TRANSFER] * (count + 1)  # of the segments, and last of the HELD update
    for index in chunks:
        chunk = problem.chunks[index]
        place = chunk.segment if immediate else -1
        compute[chunk.segment] += chunk.grad_us
        compute[place] += chunk.update_us
        for move in (ground.state_moves[index], ground.weight_out[index], NO_TRANSFER if immediate else ground.weight_in[index]):
            if move is not NO_TRANSFER:  # most do not move, and planning asks a hundred thousand times
                transfers[place] += move
    return Work(tuple(compute[:-1]), tuple(transfers[:-1]), compute[-1], transfers[-1])


def segment_us(ground: Ground, segment: int, cost: Cost, role: Role, work: Work) -> int:
    """Forward and, unless frozen, backward of one segment with one option."""
    out, back = offload(ground.problem, cost.offloaded_nbytes)
    us = (ground.fetch[segment] + out).with_compute(cost.forward_us)
    if role is Role.FROZEN:
        return us
    transfers = ground.fetch[segment] + back + work.transfers[segment]
    return us + transfers.with_compute(cost.backward_us + work.compute_us[segment])


def step_us(ground: Ground, chunks: Sequence[int], options: Sequence[str], update: Update) -> int:
    """The time of a step in microseconds."""
    work = work_of(ground, chunks, update)
    roles, costs = roles_of(ground.problem, chunks), costs_of(ground.problem, chunks, options)
    return work.held_us + sum(segment_us(ground, s, cost, role, work) for s, (cost, role) in enumerate(zip(costs, roles, strict=True)))
