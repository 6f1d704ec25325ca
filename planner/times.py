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
    compute = [0] * len(problem.segments)
    moving: dict[int, tuple[list[int], list[int]]] = {}  # hidden and exposed microseconds, by segment; the HELD update is segment -1
    update_us = 0
    for index in chunks:
        chunk = problem.chunks[index]
        compute[chunk.segment] += chunk.grad_us
        if immediate:
            compute[chunk.segment] += chunk.update_us
        else:
            update_us += chunk.update_us
        for move in (ground.state_moves[index], ground.weight_out[index], NO_TRANSFER if immediate else ground.weight_in[index]):
            if move is not NO_TRANSFER:
                hidden, exposed = moving.setdefault(chunk.segment if immediate else -1, ([], []))
                hidden.append(move.hidden_us)
                exposed.append(move.exposed_us)
    sums = {place: Transfer(sum(hidden), sum(exposed)) for place, (hidden, exposed) in moving.items()}
    transfers = tuple(sums.get(s, NO_TRANSFER) for s in range(len(compute)))
    return Work(tuple(compute), transfers, update_us, sums.get(-1, NO_TRANSFER))


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
