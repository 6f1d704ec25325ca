"""Stop anywhere, resume: bit-identical weights, optimizer state and position. And what else a checkpoint must give back."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, NAdam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from chunkft_compile import ChunkedModule, latest_checkpoint, load_checkpoint, save_checkpoint
from chunkft_compile.planner import Update
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import Case, Mlp, compute_loss, vector_batch

pytestmark = pytest.mark.usefixtures("captures_once")

PLENTY = 10**8


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE
MLP = Case("mlp", Mlp, vector_batch)
DROPOUT = Case("dropout", _dropout, vector_batch)
Optimizing = Callable[[list[Any]], Optimizer]


@dataclass(frozen=True)
class Trial:
    """A training to interrupt: `plan` are the updates of its steps."""

    case: Case
    plan: tuple[Update, ...]
    optimizing: Optimizing
    micro: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    by_hand: dict[str, Any] = field(default_factory=dict)
    budget: int = PLENTY


TRIALS = {
    "dropout": Trial(DROPOUT, (HELD,) * 3, functools.partial(AdamW, lr=1e-2)),
    "accumulation": Trial(MLP, (HELD,) * 2, functools.partial(AdamW, lr=1e-2), 2, {"accumulation": True}),
    "unplanned accumulation": Trial(MLP, (HELD,) * 2, functools.partial(NAdam, lr=1e-2), 2),
    "immediate": Trial(DROPOUT, (IMMEDIATE,) * 3, functools.partial(AdamW, lr=1e-2), settings={"update": "immediate"}),
    "both": Trial(MLP, (HELD, IMMEDIATE), functools.partial(SGD, lr=0.1, momentum=0.9), settings={"update": "auto"}),
    "resident": Trial(MLP, (HELD,) * 2, functools.partial(Adafactor, lr=1e-2), by_hand={"resident": (1, 2), "scattered": True}),
}


class Loop:
    """A training loop that can be stopped after every backward and every step."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.model = compile_quickly(trial.case.build(), trial.budget, **trial.settings)
        self.optimizer = trial.optimizing(list(self.model.parameters()))
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (step + 1))
        self.losses: list[float] = []

    def event(self, number: int) -> None:
        """Backwards until there is one for each micro-batch, then a step."""
        step, place = divmod(number, self.trial.micro + 1)
        if place < self.trial.micro:
            noise = random.random() + float(numpy.random.random())
            loss = compute_loss(self.model, self.trial.case.batch(self.trial.micro * step + place)) * (1 + noise)
            torch.autograd.backward(loss)
            self.losses.append(loss.item())
            return
        if self.model.schedule is None:  # resumed right before the step
            args, kwargs = self.trial.case.arguments()
            self.model.plan(*args, **kwargs)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def save(self, directory: Path, number: int) -> None:
        save_checkpoint(directory, self.model, self.optimizer, scheduler=self.scheduler, extra={"next": number + 1}, keep=100)

    def load(self, checkpoint: Path) -> int:
        extra = load_checkpoint(checkpoint, self.model, self.optimizer, scheduler=self.scheduler)
        return int(extra["next"])

    def facts(self) -> dict[str, Any]:
        """All that must be the same, bit by bit."""
        state = {
            f"{chunk.name}/{key}": value.clone() if isinstance(value, torch.Tensor) else value
            for chunk in self.model.chunks
            for key, value in self.optimizer.state.get(chunk.leaf, {}).items()
        }
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        session = self.model._session
        return {
            "weights": {name: value.clone() for name, value in self.model.state_dict().items()},
            "state": state,
            "groups": groups,
            "progress": self.model.progress,
            "sweep": session.planned.state,
            "steps": session.steps,
            "rng": (torch.get_rng_state(), random.random(), float(numpy.random.random())),
            "last": self.scheduler.get_last_lr(),
        }


def _seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)


def _same(left: Any, right: Any, where: str = "") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            _same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif isinstance(left, (list, tuple)) and not hasattr(left, "_fields"):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            _same(*pair, f"{where}/{number}")
    else:
        assert left == right, where


@pytest.mark.parametrize("name", TRIALS)
def test_resuming_anywhere_in_two_sweeps_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trial = TRIALS[name]
    plan_by_hand(monkeypatch, trial.plan, **trial.by_hand)
    events = 2 * len(trial.plan) * (trial.micro + 1)
    _seed()
    whole, saved = Loop(trial), {}
    for number in range(events):
        whole.event(number)
        waiting = IMMEDIATE in trial.plan and number % 2 == 0 and whole.model.progress.active and _applied(whole.model)
        if not waiting:
            whole.save(tmp_path, number)
            latest = latest_checkpoint(tmp_path)
            assert latest is not None
            saved[number] = latest
    assert whole.model.progress.sweep == 2
    assert len(saved) == len(set(saved.values())) >= 2 * len(trial.plan)
    expected = whole.facts()
    again = Loop(trial)  # the first load finds it new, the others what the one before has left
    for number, checkpoint in saved.items():
        again.losses.clear()
        following = again.load(checkpoint)
        assert following == number + 1
        for event in range(following, events):
            again.event(event)
        assert again.losses == whole.losses[len(whole.losses) - len(again.losses) :]
        if following == events:
            again.model.plan(*trial.case.arguments()[0], **trial.case.arguments()[1])
        _same(again.facts(), expected, f"resumed after {number}")


def _applied(model: ChunkedModule) -> bool:
    return model._session._updater._applier is not None and bool(model._session._updater._applier.applied)
