"""Full-parameter fine-tuning inside a byte budget: a memory-planner compiler pass on torch.fx."""

from chunkft_compile.errors import BudgetError, CaptureError, MemoryPromiseError, PlanMismatch, TrainingError
from chunkft_compile.module import ChunkedModule, Progress, compile

__version__ = "0.1.0"

__all__ = ["BudgetError", "CaptureError", "ChunkedModule", "MemoryPromiseError", "PlanMismatch", "Progress", "TrainingError", "compile"]
