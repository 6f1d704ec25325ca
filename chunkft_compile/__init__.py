"""Full-parameter fine-tuning inside a byte budget: a memory-planner compiler pass on torch.fx."""

from chunkft_compile.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from chunkft_compile.errors import BudgetError, CaptureError, CheckpointError, MemoryPromiseError, PlanMismatch, TrainingError
from chunkft_compile.examining import examine
from chunkft_compile.loading import load
from chunkft_compile.module import ChunkedModule, Progress, compile, last_programs
from chunkft_compile.recording import record

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CaptureError",
    "CheckpointError",
    "ChunkedModule",
    "MemoryPromiseError",
    "PlanMismatch",
    "Progress",
    "TrainingError",
    "compile",
    "examine",
    "last_programs",
    "latest_checkpoint",
    "load",
    "load_checkpoint",
    "record",
    "save_checkpoint",
]
