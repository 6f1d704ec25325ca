"""`chunkft train --tensorboard DIR`: scalars of a run as TensorBoard reads them."""

import importlib.util
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chunkft_compile.cli.events import Evaluated, Event, Planned, StepDone

_OF_STEPS = {
    "train/loss": "loss",
    "train/lr": "lr",
    "train/grad_norm": "grad_norm",
    "train/seconds": "seconds",
    "memory/predicted_nbytes": "predicted_nbytes",
    "memory/measured_nbytes": "measured_nbytes",
    "memory/process_nbytes": "process_nbytes",
}
_OF_EVALUATIONS = {"eval/loss": "loss", "eval/perplexity": "perplexity"}


def check_tensorboard(directory: Path) -> None:
    """Raise `ValueError` unless `TensorBoard(directory)` will be able to write."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard: pip install 'chunkft_compile[tensorboard]'")
    if (wrong := next((path for path in (directory, *directory.parents) if path.exists()), directory)) and not wrong.is_dir():
        raise ValueError(f"--tensorboard {directory} cannot be written: {wrong} is not a directory")


class TensorBoard:
    """A `Listener`. The files of a resumed run say that what was written after the checkpoint it goes on from does not count."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def hear(self, event: Event) -> None:
        """See `Listener`."""
        if isinstance(event, Planned):
            self._writer = _writer(self._directory, event.step)
        elif isinstance(event, StepDone):
            self._write(event, _OF_STEPS)
        elif isinstance(event, Evaluated):
            self._write(event, _OF_EVALUATIONS)

    def close(self) -> None:
        """See `Listener`."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, event: StepDone | Evaluated, tags: dict[str, str]) -> None:
        values = asdict(event)
        for tag, name in tags.items():
            if values[name] is not None:
                self._writer.add_scalar(tag, values[name], event.step)
        self._writer.flush()  # what was written before a crash stays readable


def _writer(directory: Path, done: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of tensorboard's own imports
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(directory), purge_step=done + 1 if done else None)
