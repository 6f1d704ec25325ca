"""The training loop and the held-out score. The loop is the one a user would write; nothing in it knows about chunks but the live line."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from chunkft_compile.budget import format_nbytes
from chunkft_compile.cli.keeping import Keeping
from chunkft_compile.cli.memory import PeakWatch, rss_nbytes
from chunkft_compile.cli.options import bar_style
from chunkft_compile.data import IGNORED, Sequences

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """The numbers of the loop. `warmup` counts optimizer steps; `clip` 0 means no limit."""

    steps: int
    accumulate: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    budget_nbytes: int


def lr_factor(step: int, *, warmup: int, steps: int) -> float:
    """Part of the highest learning rate at `step` (from 0): up in a line, then down in a half cosine; never 0 in a step that runs."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def build_optimizer(model: Any, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the chunks; fused, because its other implementations allocate a copy of what they step."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=parameters[0].device.type in ("cpu", "cuda"))


def train(
    model: Any,
    batches: Iterator[Batch],
    device: torch.device,
    config: LoopConfig,
    watch: PeakWatch,
    keeping: Keeping | None = None,
    *,
    resume: bool = False,
) -> list[float]:
    """Run all optimizer steps, or with `resume` those that are left; the mean loss of each, also of earlier ones."""
    optimizer = build_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, warmup=config.warmup, steps=config.steps))
    model.train()
    losses = keeping.go_on(model, optimizer, scheduler) if keeping is not None and resume else []
    for _ in range(len(losses) * config.accumulate):
        next(batches)
    with watch, tqdm(total=config.steps, initial=len(losses), desc="train", unit="step", **bar_style()) as bar:
        for number in range(len(losses) + 1, config.steps + 1):
            loss = sum(_backward(model, next(batches), device, config.accumulate) for _ in range(config.accumulate))
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {number} is {loss}: lower --lr or raise --warmup; nothing was saved")
            if config.clip:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            progress = model.progress  # optimizer.step() moves it on
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            watch.count_step()
            losses.append(loss)
            if keeping is not None:
                keeping.after_step(losses, model, optimizer, scheduler)
            bar.set_postfix_str(live_line(loss, progress, config.budget_nbytes, watch.peak_nbytes), refresh=False)
            bar.update()
    return losses


def _backward(model: Any, batch: Batch, device: torch.device, accumulate: int) -> float:
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss / accumulate
    loss.backward()
    return float(loss.detach())


def live_line(loss: float, progress: Any, budget_nbytes: int, measured_nbytes: int | None) -> str:
    """Where the run is and what it takes, in one line. The prediction is this step's; what is measured is the most so far."""
    parts = [
        f"loss {loss:.3f}",
        f"step {progress.step + 1}/{progress.steps} of sweep {progress.sweep + 1}",
        f"{len(progress.active)} active chunks",
        f"predicted {format_nbytes(progress.predicted_nbytes)} of {format_nbytes(budget_nbytes)}",
    ]
    if measured_nbytes is not None:
        parts.append(f"measured {format_nbytes(measured_nbytes)}")
    rss = rss_nbytes()
    if rss is not None:
        parts.append(f"process {format_nbytes(rss)}")
    return ", ".join(parts)


@torch.no_grad()
def perplexity(model: Any, sequences: Sequences, device: torch.device, *, batch: int, when: str) -> float:
    """exp of the mean loss over all labelled tokens of `sequences`."""
    was_training = model.training
    model.eval()
    loss_sum, tokens = 0.0, 0
    # disable=None: no bar in a log, where it could not be taken away again
    for start in tqdm(range(0, len(sequences), batch), desc=f"held-out {when}", unit="batch", leave=False, disable=None):
        inputs = {name: tensor.to(device) for name, tensor in sequences.take(slice(start, start + batch)).items()}
        count = int((inputs["labels"][:, 1:] != IGNORED).sum())  # the first token is never predicted
        loss_sum += float(model(**inputs).loss) * count
        tokens += count
    model.train(was_training)
    return math.exp(min(loss_sum / tokens, 700.0))  # above, exp() leaves the range of a float
