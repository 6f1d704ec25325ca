"""The training loop: the one a user would write, with evaluations, checkpoints and signals between its steps.

Nothing in it knows about chunks but what it tells its listeners. Between two steps everything that is due is done in one order
(evaluate, keep, stop), judged by what was done and not by where the loop came from: so a resumed run does what was left to do.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chunkft_compile.cli.evaluating import Evaluation, History
from chunkft_compile.cli.events import Checkpointed, Evaluated, StepDone
from chunkft_compile.cli.keeping import Keeping
from chunkft_compile.cli.listeners import Tell
from chunkft_compile.cli.memory import PeakWatch, rss_nbytes
from chunkft_compile.cli.optimizers import build_optimizer
from chunkft_compile.cli.rates import lr_factor
from chunkft_compile.cli.stopping import Stop

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """The numbers of the loop. `warmup` counts optimizer steps, `epoch_steps` those of a pass over the data; `clip` 0 means no limit."""

    steps: int
    accumulate: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    lr_schedule: str = "cosine"
    optimizer: str | None = None
    epoch_steps: float = 1.0


class StopRun(Exception):
    """The wish to stop was fulfilled: `checkpoint` has the state after the last step."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


class Training:
    """A model, its optimizer and learning rate, and what the run has seen (`history`); what a checkpoint is of."""

    def __init__(self, model: Any, device: torch.device, config: LoopConfig, keeping: Keeping) -> None:
        self.model, self.device, self.config, self.keeping = model, device, config, keeping
        self.optimizer = build_optimizer(model, lr=config.lr, weight_decay=config.weight_decay, name=config.optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, warmup=config.warmup, steps=config.steps, shape=config.lr_schedule)
        )
        self.note_loss: Callable[[float], None] = lambda loss: None  # of every step, before it is applied
        self.history = History()
        self.kept: tuple[int, Path] | None = None  # the step of the last checkpoint, and where it is
        model.train()

    def go_on(self) -> None:
        """Take up the latest checkpoint."""
        self.history, path = self.keeping.go_on(self.model, self.optimizer, self.scheduler)
        self.kept = self.history.step, path

    def run(self, batches: Iterator[Batch], watch: PeakWatch, evaluation: Evaluation, tell: Tell, stop: Stop) -> None:
        """All steps, or those that are left.

        Raises `StopRun` when the run was asked to stop and is kept, `FloatingPointError` for a loss that is not finite.
        """
        for _ in range(self.history.step * self.config.accumulate):
            next(batches)
        with watch:
            while True:
                self._between(watch, evaluation, tell, stop)
                if self.history.step == self.config.steps or evaluation.is_over(self.history):
                    return
                done = self._step(batches, watch)
                self.history.losses.append(done.loss)
                tell(done)

    def keep(self, tell: Tell) -> Path:
        """Write a checkpoint, unless there is one of the last step."""
        if self.kept is None or self.kept[0] != self.history.step:
            path = self.keeping.save(self.history, self.model, self.optimizer, self.scheduler)
            self.kept = self.history.step, path
            tell(Checkpointed(step=self.history.step, path=str(path)))
        return self.kept[1]

    def _between(self, watch: PeakWatch, evaluation: Evaluation, tell: Tell, stop: Stop) -> None:
        """What is due after the last step."""
        if not stop.asked and evaluation.is_due(self.history):
            with watch.aside():
                self._evaluate(evaluation, tell)
        if stop.asked:
            raise StopRun(self.keep(tell))
        if self.keeping.is_due(self.history):
            self.keep(tell)

    def _evaluate(self, evaluation: Evaluation, tell: Tell) -> None:
        score = evaluation.score(self.history.step)
        if score is None:
            return  # asked to stop meanwhile: a resumed run evaluates first
        self.history.scores.append(score)
        best, without = self.history.best, self.history.without_best
        assert best is not None, "there is at least this score"
        if without == 0 and self.keeping.save_best is not None:
            self.keeping.save_best(self.keeping.best)
        tell(Evaluated(step=score.step, loss=score.loss, perplexity=score.perplexity, best_step=best.step, without_best=without))

    def _step(self, batches: Iterator[Batch], watch: PeakWatch) -> StepDone:
        """One optimizer step, done and told nobody yet."""
        config, number, start = self.config, self.history.step + 1, time.perf_counter()
        loss, tokens, norm = 0.0, 0, None
        for _ in range(config.accumulate):
            part, read = _backward(self.model, next(batches), self.device, config.accumulate)
            loss, tokens = loss + part, tokens + read
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {number} is {loss}: lower --lr or raise --warmup; nothing was saved")
        if config.clip:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        self.note_loss(loss)
        progress = self.model.progress  # optimizer.step() moves it on
        (lr, *_) = self.scheduler.get_last_lr()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        watch.count_step()
        return StepDone(
            step=number,
            steps=config.steps,
            epoch=number / config.epoch_steps,
            loss=loss,
            lr=float(lr),
            grad_norm=norm,
            tokens=tokens,
            seconds=time.perf_counter() - start,
            sweep=progress.sweep,
            sweep_step=progress.step,
            sweep_steps=progress.steps,
            active_chunks=len(progress.active),
            predicted_nbytes=progress.predicted_nbytes,
            measured_nbytes=watch.peak_nbytes,
            process_nbytes=rss_nbytes(),
        )


def _backward(model: Any, batch: Batch, device: torch.device, accumulate: int) -> tuple[float, int]:
    """The loss and the number of tokens. No batch is held from here to the next one: the plan does not count two."""
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss / accumulate
    loss.backward()
    return float(loss.detach()), batch["input_ids"].numel()
