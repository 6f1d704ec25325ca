"""Errors a user can meet. Each says what is wrong, where, and what to do about it."""

from chunkft_compile.planner.problem import BudgetError

__all__ = ["BudgetError", "CaptureError", "TrainingError"]


class CaptureError(RuntimeError):
    """The model cannot be captured as one graph; the message names the file, line and operation. The model is untouched."""


class TrainingError(RuntimeError):
    """The training loop asks for something a chunked step cannot give (a second backward, an optimizer that misses chunks)."""
