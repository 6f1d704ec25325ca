"""Which optimizer state stays on the device between the steps of its chunk, and what moving the rest costs."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from chunkft_compile.planner.bounds import loads
from chunkft_compile.planner.grounds import Ground, settle, spread
from chunkft_compile.planner.problem import Placement, Places, Problem, Step, Update


@dataclass(slots=True)
class _Moment:
    """An update: the chunks that are stepped one after the other, and the bytes live beside them, resident state left out."""

    chunks: tuple[int, ...]
    rest_nbytes: int
    windows: list[int]  # of each chunk, ascending

    @property
    def window_nbytes(self) -> int:
        """The largest."""
        return self.windows[-1]


def place_state(problem: Problem, steps: Sequence[Step], weights: tuple[Placement, ...]) -> Places:
    """Places in which as much state stays as the steps leave room for: the largest states first, since they save most transfers.

    Resident state is there at every moment of every step. Only while its own chunk is updated it is not on top of the rest:
    `update_nbytes` contains it.
    """
    away = spread(problem, weights)
    if Placement.DEVICE not in problem.state:
        return away
    ground, whole = settle(problem, away), settle(problem, Places((Placement.DEVICE,) * len(problem.chunks), weights))
    calls_nbytes = max(_calls_nbytes(ground, step) for step in steps)
    moments = [moment for step in steps for moment in _moments(ground, step)]
    moment_of = {index: moment for moment in moments for index in moment.chunks}
    resident: set[int] = set(away.resident)
    kept_nbytes = 0
    for index in sorted(set(range(len(problem.chunks))) - resident, key=lambda index: (-problem.chunks[index].state_nbytes, index)):
        total, own = kept_nbytes + problem.chunks[index].state_nbytes, moment_of[index]
        others = max((m.rest_nbytes + m.window_nbytes for m in moments if m is not own), default=0)
        del own.windows[bisect_left(own.windows, ground.update_nbytes[index])]
        insort(own.windows, whole.update_nbytes[index])
        if total + max(calls_nbytes, others, own.rest_nbytes + own.window_nbytes) <= problem.budget_nbytes:
            resident.add(index)
            kept_nbytes = total
        else:
            del own.windows[bisect_left(own.windows, whole.update_nbytes[index])]
            insort(own.windows, ground.update_nbytes[index])
    return spread(problem, weights, resident)


def _calls_nbytes(ground: Ground, step: Step) -> int:
    return max(load.nbytes for load in loads(ground, step.chunks, step.options, step.update) if not load.name.startswith("update"))


def _moments(ground: Ground, step: Step) -> list[_Moment]:
    """The updates of a step as `loads` counts them, with the chunks of each."""
    updates = [load for load in loads(ground, step.chunks, step.options, step.update) if load.name.startswith("update")]
    if step.update is Update.HELD:
        groups = [step.chunks]
    else:
        segments = sorted({ground.problem.chunks[index].segment for index in step.chunks}, reverse=True)
        groups = [tuple(index for index in step.chunks if ground.problem.chunks[index].segment == s) for s in segments]
    found = []
    for load, chunks in zip(updates, groups, strict=True):
        windows = sorted(ground.update_nbytes[index] for index in chunks)
        found.append(_Moment(chunks, load.nbytes - windows[-1], windows))
    return found


def transfer_us(problem: Problem, places: Places) -> int:
    """Time per sweep on the links for all optimizer state that is away, hidden or not: there and back once."""
    return sum(move.hidden_us + move.exposed_us for move in settle(problem, places).state_moves)
