"""What the user's optimizers cost, measured once, and which of them the plan knows."""

import functools
from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from chunkft_compile.budget import format_nbytes
from chunkft_compile.compiled import layouts_of
from chunkft_compile.errors import TrainingError
from chunkft_compile.runtime.chunks import Chunk
from chunkft_compile.runtime.moving import StateMover
from chunkft_compile.runtime.optimizers import OptimizerCost
from chunkft_compile.runtime.precision import Precision
from chunkft_compile.runtime.precision_costs import measure_update
from chunkft_compile.runtime.supported import warn_of_lost_decay
from chunkft_compile.runtime.updates import Updater


class Optimizing:
    """The optimizers over the chunks, as the planner sees them. The mover is told which of their tables stay on the device."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device, precision: Precision, updater: Updater, mover: StateMover) -> None:
        self._chunks = chunks
        self._device = device
        self._precision = precision
        self._updater = updater
        self._mover = mover
        self._known: frozenset[type[Optimizer]] = frozenset()

    def planned(self) -> OptimizerCost:
        """The costs to plan with: those of the optimizers there are, which are known from then on. Raises where one cannot train chunks."""
        found = self._updater.check_coverage()
        cost = self._measure(found, self._chunks)
        self._mover.keep(cost.tables)
        self._known = frozenset(type(optimizer) for optimizer in found)
        for optimizer in found:
            warn_of_lost_decay(optimizer)
        return cost

    def of_chunks(self, chunks: Sequence[Chunk]) -> OptimizerCost:
        """What stepping other chunks of the same model would cost."""
        return self._measure(self._updater.check_coverage(), chunks)

    def knows(self, optimizer: Optimizer) -> bool:
        """Whether the plan was made with an optimizer of this type, or was found to hold for it."""
        return type(optimizer) in self._known

    def adopt(self, optimizer: Optimizer, planned: OptimizerCost) -> None:
        """An optimizer built after the plan: hold its step to what was planned, before anything is changed. Raises `TrainingError`."""
        cost = self._measure([optimizer], self._chunks)
        self._mover.keep(cost.tables)
        more = max(cost.together_nbytes(layout) - planned.together_nbytes(layout) for layout in cost.of_layout)
        more = max(more, *(cost.alone_nbytes(layout) - planned.alone_nbytes(layout) for layout in cost.of_layout))
        more += cost.table_nbytes - planned.table_nbytes
        if more > 0:
            raise TrainingError(
                f"the plan assumed {planned.name}, and {cost.name} needs up to {format_nbytes(more)} more for a chunk; "
                f"build the optimizer before the first training call, or before model.plan()"
            )
        self._known |= {type(optimizer)}

    def _measure(self, optimizers: Sequence[Optimizer], chunks: Sequence[Chunk]) -> OptimizerCost:
        """What stepping `chunks` costs with the dearest of `optimizers`, or with AdamW where there is none yet."""
        if not optimizers:
            return measure_update(None, layouts_of(chunks), self._device, self._precision)
        params = [{self._chunks[number].param for number in self._updater.chunks_of(optimizer)} for optimizer in optimizers]
        mine = [layouts_of([chunk for chunk in chunks if chunk.param in names]) for names in params]
        costs = [measure_update(one, layouts, self._device, self._precision) for one, layouts in zip(optimizers, mine, strict=True)]
        return functools.reduce(OptimizerCost.at_least, costs)
