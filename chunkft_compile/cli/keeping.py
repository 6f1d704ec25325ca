"""Checkpoints of a `chunkft train` run: where they are, and going on from the latest one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkft_compile.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Keeping:
    """A checkpoint into `directory` after every `every` steps (0: none). `run` are the choices that decide what every step does."""

    directory: Path
    every: int
    run: Mapping[str, Any]

    @staticmethod
    def beside(out: Path) -> Path:
        """The directory for checkpoints of the run whose model goes to `out`; that one appears complete, at the end."""
        return out.with_name(f"{out.name}.checkpoints")

    def go_on(self, model: Any, optimizer: Any, scheduler: Any) -> list[float]:
        """Take up the latest checkpoint; the losses of the steps that are done."""
        if latest_checkpoint(self.directory) is None:
            raise ValueError(
                f"--resume finds no checkpoint in {self.directory}: leave it out to begin anew (--checkpoint-every N writes them)"
            )
        extra = load_checkpoint(self.directory, model, optimizer, scheduler=scheduler)
        changed = [
            f"{name} was {extra['run'].get(name)}, is {value}" for name, value in self.run.items() if extra["run"].get(name) != value
        ]
        if changed:
            raise ValueError(f"--resume goes on with the run that was stopped, and this is another one: {'; '.join(changed)}")
        losses: list[float] = extra["losses"]
        return losses

    def after_step(self, losses: list[float], model: Any, optimizer: Any, scheduler: Any) -> None:
        """Write a checkpoint if it is time for one."""
        if self.every and len(losses) % self.every == 0:
            extra = {"losses": losses, "run": dict(self.run)}
            save_checkpoint(self.directory, model, optimizer, scheduler=scheduler, extra=extra)
