"""`loop` and what it is made of: the learning rate, the live line, the held-out score, what is due when, and a run that learns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from chunkft_compile.cli.evaluating import Evaluation, History, Score, mean_loss
from chunkft_compile.cli.events import Event, StepDone
from chunkft_compile.cli.keeping import Keeping
from chunkft_compile.cli.listeners import live_line
from chunkft_compile.cli.loop import LoopConfig, Training
from chunkft_compile.cli.memory import PeakWatch
from chunkft_compile.cli.optimizers import build_optimizer
from chunkft_compile.cli.rates import SHAPES, lr_factor
from chunkft_compile.cli.stopping import Stop
from chunkft_compile.pretrained import load_weights
from chunkft_compile.sequences import IGNORED, Sequences, shuffled_batches
from tests.cli.engine import FakeModel

CPU = torch.device("cpu")


def fake(model_dir: Path) -> FakeModel:
    return FakeModel(load_weights(model_dir, torch.float32), 10**9)


def sequences(count: int, length: int = 16) -> Sequences:
    ids = torch.randint(0, 100, (count, length), generator=torch.Generator().manual_seed(0))
    return Sequences(ids, ids)


def loop(steps: int, *, accumulate: int = 1, lr: float = 1e-3) -> LoopConfig:
    return LoopConfig(steps, accumulate, lr, warmup=1, weight_decay=0.0, clip=1.0)


def run(model: FakeModel, config: LoopConfig, data: Sequences, *, evaluation: Evaluation | None = None) -> tuple[Training, list[Event]]:
    told: list[Event] = []
    training = Training(model, CPU, config, Keeping(Path("nowhere"), 0, 1, {}))
    evaluation = evaluation or Evaluation(lambda step: None, 0, 0, config.steps)
    training.run(shuffled_batches(data, 2, seed=0), PeakWatch(CPU, measured_steps=0), evaluation, told.append, Stop())
    return training, told


def test_learning_rate() -> None:
    factors = [lr_factor(step, warmup=2, steps=6) for step in range(6)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    assert [lr_factor(step, warmup=2, steps=6, shape="linear") for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [lr_factor(step, warmup=2, steps=6, shape="constant") for step in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 200), st.sampled_from(SHAPES), st.data())
def test_learning_rate_is_positive_in_every_step_and_reaches_the_top(steps: int, shape: str, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    factors = [lr_factor(step, warmup=warmup, steps=steps, shape=shape) for step in range(steps)]
    assert min(factors) > 0
    assert max(factors) == 1.0
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_live_line() -> None:
    numbers: dict[str, Any] = {"epoch": 0.1, "lr": 1e-3, "grad_norm": None, "tokens": 9, "seconds": 1.0, "process_nbytes": None}
    sweep = {"sweep": 2, "sweep_step": 1, "sweep_steps": 7, "active_chunks": 2}
    memory = {"predicted_nbytes": 1_180_000_000, "measured_nbytes": 1_150_000_000}
    line = live_line(StepDone(step=1, steps=9, loss=2.5, **numbers, **sweep, **memory), 1_200_000_000)
    assert line == "loss 2.500, step 2/7 of sweep 3, 2 active chunks, predicted 1.180 GB of 1.200 GB, measured 1.150 GB"


def test_the_score_weighs_every_token_the_same(model_dir: Path) -> None:
    model = fake(model_dir)
    held = sequences(5)
    labels = held.labels.clone()
    labels[0, 3:] = IGNORED  # batches now differ in how many tokens they score
    score = mean_loss(model, Sequences(held.input_ids, labels), CPU, batch=2, what="before")
    with torch.no_grad():
        logits = model.module(held.input_ids).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    assert score == pytest.approx(float(expected), rel=1e-5)
    assert model.training
    assert mean_loss(model, held, CPU, batch=2, what="before", stopped=lambda: True) is None
    assert model.training


def test_a_run_learns_and_accumulation_counts_optimizer_steps(model_dir: Path) -> None:
    model, data = fake(model_dir), sequences(4)
    before = mean_loss(model, data, CPU, batch=2, what="before")
    training, told = run(model, loop(8, accumulate=2, lr=1e-2), data)
    steps = [event for event in told if isinstance(event, StepDone)]
    assert [event.step for event in steps] == list(range(1, 9))
    assert [event.loss for event in steps] == training.history.losses
    assert [event.tokens for event in steps] == [2 * 2 * 16] * 8
    assert model.calls == 16
    after = mean_loss(model, data, CPU, batch=2, what="after")
    assert before is not None
    assert after is not None
    assert after < before - 0.2


def test_a_loss_that_is_not_finite_stops_the_run(model_dir: Path) -> None:
    model = fake(model_dir)
    with torch.no_grad():
        model.module.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan: lower --lr"):
        run(model, loop(2), sequences(4))
    with pytest.raises(FloatingPointError, match="the loss of what is held out is nan"):
        mean_loss(model, sequences(4), CPU, batch=2, what="before")


def test_evaluations_are_due_every_few_steps_and_at_the_end_once() -> None:
    evaluation, due = Evaluation(lambda step: None, 3, 0, 8), []
    history = History()
    for step in range(9):
        history.losses = [0.0] * step
        if evaluation.is_due(history):
            due.append(step)
            history.scores.append(Score(step, 1.0))
            assert not evaluation.is_due(history)
    assert due == [3, 6, 8]
    assert not Evaluation(lambda step: None, 0, 0, 8).is_due(history)


def test_patience_counts_evaluations_after_the_best() -> None:
    patient = Evaluation(lambda step: None, 1, 2, 9)
    for losses, best, without in [([], None, 0), ([3.0], 1, 0), ([3.0, 3.0], 1, 1), ([3.0, 2.0, 2.5], 2, 1), ([2.0, 2.5, 3.0], 1, 2)]:
        history = History([0.0] * len(losses), [Score(step, loss) for step, loss in enumerate(losses, 1)])
        assert (history.best and history.best.step, history.without_best) == (best, without)
        assert patient.is_over(history) == (without == 2)
        assert not Evaluation(lambda step: None, 1, 0, 9).is_over(history)
        assert History.from_plain(history.to_plain()) == history


def test_a_run_ends_when_patience_does(model_dir: Path) -> None:
    scores = iter([3.0, 2.0, 2.0, 2.1, 0.0])
    evaluation = Evaluation(lambda step: Score(step, next(scores)), 2, 2, 20)
    training, _ = run(fake(model_dir), loop(20), sequences(4), evaluation=evaluation)
    assert training.history.step == 8
    assert training.history.best == Score(4, 2.0)


@pytest.mark.parametrize("name", [None, "adamw", "adamw-fused", "sgd", "sgd-momentum", "adafactor"])
def test_optimizers_have_the_chosen_rate_and_decay(model_dir: Path, name: str | None) -> None:
    model = fake(model_dir)
    optimizer = build_optimizer(model, lr=0.5, weight_decay=0.25, name=name)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.25)]
    kinds = {"sgd": "SGD", "sgd-momentum": "SGD", "adafactor": "Adafactor"}
    assert type(optimizer).__name__ == kinds.get(name or "", "AdamW")
    if name == "sgd":
        before = model.module.lm_head.weight.detach().clone()
        torch.autograd.backward(model(**sequences(2).take(slice(2))).loss)
        gradient = model.module.lm_head.weight.grad
        optimizer.step()
        torch.testing.assert_close(model.module.lm_head.weight.detach(), before - 0.5 * (gradient + 0.25 * before))
