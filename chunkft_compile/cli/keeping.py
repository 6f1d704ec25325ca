"""What a `chunkft train` run keeps beside `--out`: checkpoints, going on from the latest one, and the best model so far."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkft_compile.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from chunkft_compile.cli.evaluating import History


def checkpoints_of(out: Path) -> Path:
    """The directory for checkpoints of the run whose model goes to `out`; that one appears complete, at the end."""
    return out.with_name(f"{out.name}.checkpoints")


def latest_of(out: Path) -> Path:
    """The checkpoint to go on from. Raises `ValueError` where there is none."""
    directory = checkpoints_of(out)
    found = latest_checkpoint(directory)
    if found is None:
        raise ValueError(f"--resume finds no checkpoint in {directory}: leave it out to begin anew (--checkpoint-every N writes them)")
    return found


@dataclass(frozen=True)
class Keeping:
    """Beside `out`, a checkpoint after every `every` steps (0: none but those of interrupted runs), of which the last `keep` stay.

    `run` are the choices that decide what every step does. `save_best` writes the model to a directory, in one move; None: the best
    model is not kept.
    """

    out: Path
    every: int
    keep: int
    run: Mapping[str, Any]
    save_best: Callable[[Path], None] | None = None

    @property
    def best(self) -> Path:
        """Where the best model is. A run that goes on from an earlier checkpoint comes by the same score, and writes the same one again."""
        return checkpoints_of(self.out) / "best"

    def go_on(self, model: Any, optimizer: Any, scheduler: Any) -> tuple[History, Path]:
        """Take up the latest checkpoint; what the run has seen, and where the checkpoint is."""
        path = latest_of(self.out)
        extra = load_checkpoint(path, model, optimizer, scheduler=scheduler)
        changed = [
            f"{name} was {extra['run'].get(name)}, is {value}" for name, value in self.run.items() if extra["run"].get(name) != value
        ]
        if changed:
            raise ValueError(f"--resume goes on with the run that was stopped, and this is another one: {'; '.join(changed)}")
        return History.from_plain(extra["history"]), path

    def is_due(self, history: History) -> bool:
        """Whether the last step is one to keep."""
        return bool(self.every and history.step) and history.step % self.every == 0

    def save(self, history: History, model: Any, optimizer: Any, scheduler: Any) -> Path:
        """Write a checkpoint."""
        extra = {"history": history.to_plain(), "run": dict(self.run)}
        return save_checkpoint(checkpoints_of(self.out), model, optimizer, scheduler=scheduler, extra=extra, keep=self.keep)
