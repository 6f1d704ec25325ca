"""Load, compile and plan: what `chunkft plan` shows and `chunkft train` starts with."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import chunkft_compile
from chunkft_compile.budget import format_nbytes
from chunkft_compile.cli.optimizers import build_optimizer
from chunkft_compile.packing import check_packing
from chunkft_compile.planner import Placement, Plan
from chunkft_compile.pretrained import load_weights


@dataclass(frozen=True)
class PlanConfig:
    """A model, the shape of its batches, and the budget it has to stay within; or a `schedule` that was kept, which is run as it is.

    `update`, `prefer`, `max_steps`, `options`, `state` and `precision` are those of `chunkft_compile.compile`.
    """

    model: Path
    budget_nbytes: int
    device: torch.device
    dtype: torch.dtype
    batch: int
    seq: int
    accumulate: int
    solve_seconds: float
    seed: int
    optimizer: str | None = None  # None: the one that `chunkft train` trains with
    update: str = "held"
    prefer: str = "time"
    max_steps: int | None = None
    options: tuple[str, ...] | None = None
    state: tuple[Placement, ...] | None = None
    schedule: Plan | None = None
    precision: str | None = None
    weight_decay: float = 0.0  # without it, some optimizers need less memory
    packing: bool = False


def planned_model(config: PlanConfig) -> tuple[Any, int]:
    """The compiled model with its schedule solved, and the peak of plain AdamW on the same batch (computed)."""
    say(f"loading {config.model}")
    network = load_weights(config.model, config.dtype, config.device)
    positions = getattr(network.config, "max_position_embeddings", config.seq)
    if config.seq > positions:
        raise ValueError(f"--seq {config.seq} is longer than the {positions} positions of {config.model}")
    if config.packing:
        check_packing(network, str(config.model))
    how = "following the schedule for" if config.schedule else "planning for"
    say(f"{how} {format_nbytes(config.budget_nbytes)}, batches of {config.batch} x {config.seq} tokens")
    given: dict[str, Any] = {
        "budget": config.budget_nbytes,
        "accumulation": config.accumulate > 1,
        "solve_seconds": config.solve_seconds,
        "seed": config.seed,
        "precision": config.precision,
    }
    if config.schedule is not None:
        given["schedule"] = config.schedule
    else:
        given |= {name: getattr(config, name) for name in ("update", "prefer", "max_steps", "options", "state")}
    model = chunkft_compile.compile(network, **given)
    model.train()
    # memory and time depend on the shape of a batch, not on which tokens it holds
    ids = torch.zeros(config.batch, config.seq, dtype=torch.int64, device=config.device)
    batch = {"input_ids": ids, "labels": ids}
    if config.packing:
        batch["position_ids"] = ids
    # the plan counts what the optimizers it finds need
    optimizer = build_optimizer(model, lr=0.0, weight_decay=config.weight_decay, name=config.optimizer)
    model.plan(**batch)
    del optimizer
    return model, model.plain_peak_nbytes(**batch)


def say(line: str) -> None:
    """Progress is for people and goes where the progress bar goes, in a line of its own."""
    tqdm.write(line, file=sys.stderr)
