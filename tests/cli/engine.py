"""A stand-in for the compiled model, for tests of what surrounds it: trains plainly, and says it has a sweep of three steps."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from chunkft_compile.errors import BudgetError
from chunkft_compile.planner import Places, Schedule, Step

SMALLEST_NBYTES = 1_000_000
SWEEP = 3


class Progress(NamedTuple):
    """As `ChunkedModule.progress`."""

    step: int
    steps: int
    sweep: int
    active: tuple[str, ...]
    predicted_nbytes: int


class FakeModel(nn.Module):
    """As `ChunkedModule`, as far as the commands use it."""

    def __init__(self, module: nn.Module, budget_nbytes: int) -> None:
        super().__init__()
        self.module: Any = module
        self.calls = 0
        step = Step(chunks=(0,), options=(), peak_nbytes=budget_nbytes - 1, us=1)
        self.schedule = Schedule(budget_nbytes, (step,) * SWEEP, Places((), ()), "OPTIMAL", 0.0, 0.1)

    @property
    def progress(self) -> Progress:
        sweep, step = divmod(self.calls - 1, SWEEP)
        return Progress(step, SWEEP, sweep, ("a[0:1]", "b[0:2]"), self.schedule.peak_nbytes)

    def forward(self, **batch: torch.Tensor) -> Any:
        self.calls += self.training
        return self.module(**batch)

    def plan(self, **_: torch.Tensor) -> Schedule:
        return self.schedule

    def plain_peak_nbytes(self, **_: torch.Tensor) -> int:
        return 2 * self.schedule.budget_nbytes

    def save_pretrained(self, directory: Path) -> None:
        self.module.save_pretrained(directory)


def compile_fake(module: nn.Module, *, budget: int, **_: Any) -> FakeModel:
    """As `chunkft_compile.compile`."""
    if budget < SMALLEST_NBYTES:
        raise BudgetError(f"no plan within {budget} bytes", smallest_nbytes=SMALLEST_NBYTES, binding="backward of block 0")
    return FakeModel(module, budget)
