"""Errors a user can meet. Each says what is wrong, where, and what to do about it."""

from chunkft_compile.planner.artefacts import PlanMismatch
from chunkft_compile.planner.problem import BudgetError
from chunkft_compile.runtime.applied import TrainingError
from chunkft_compile.runtime.archive import CheckpointError
from chunkft_compile.runtime.guard import MemoryPromiseError

__all__ = ["BudgetError", "CaptureError", "CheckpointError", "MemoryPromiseError", "PlanMismatch", "TrainingError"]


class CaptureError(RuntimeError):
    """The model cannot be captured as one graph; the message names the file, line and operation. The model is untouched."""
