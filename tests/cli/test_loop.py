"""`loop`: the learning rate, the live line, the held-out score and a run that learns."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from chunkft_compile.cli.loop import LoopConfig, live_line, lr_factor, perplexity, train
from chunkft_compile.cli.memory import PeakWatch
from chunkft_compile.data import IGNORED, Sequences, shuffled_batches
from chunkft_compile.pretrained import load_weights
from tests.cli.engine import FakeModel, Progress

CPU = torch.device("cpu")


def fake(model_dir: Path) -> FakeModel:
    return FakeModel(load_weights(model_dir, torch.float32), 10**9)


def sequences(count: int, length: int = 16) -> Sequences:
    ids = torch.randint(0, 100, (count, length), generator=torch.Generator().manual_seed(0))
    return Sequences(ids, ids)


def loop(steps: int, *, accumulate: int = 1, lr: float = 1e-3) -> LoopConfig:
    return LoopConfig(steps, accumulate, lr, warmup=1, weight_decay=0.0, clip=1.0, budget_nbytes=10**9)


def test_learning_rate() -> None:
    factors = [lr_factor(step, warmup=2, steps=6) for step in range(6)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 200), st.data())
def test_learning_rate_is_positive_in_every_step_and_reaches_the_top(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    factors = [lr_factor(step, warmup=warmup, steps=steps) for step in range(steps)]
    assert min(factors) > 0
    assert max(factors) == 1.0


def test_live_line() -> None:
    progress = Progress(step=1, steps=7, sweep=2, active=("a", "b"), predicted_nbytes=1_180_000_000)
    line = live_line(2.5, progress, 1_200_000_000, 1_150_000_000)
    assert line.startswith("loss 2.500, step 2/7 of sweep 3, 2 active chunks, predicted 1.180 GB of 1.200 GB, measured 1.150 GB")


def test_perplexity_weighs_every_token_the_same(model_dir: Path) -> None:
    model = fake(model_dir)
    held = sequences(5)
    labels = held.labels.clone()
    labels[0, 3:] = IGNORED  # batches now differ in how many tokens they score
    score = perplexity(model, Sequences(held.input_ids, labels), CPU, batch=2, when="before")
    with torch.no_grad():
        logits = model.module(held.input_ids).logits[:, :-1]
    expected = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED).exp()
    assert score == pytest.approx(float(expected), rel=1e-5)
    assert model.training


def test_a_run_learns_and_accumulation_counts_optimizer_steps(model_dir: Path) -> None:
    model, data = fake(model_dir), sequences(4)
    before = perplexity(model, data, CPU, batch=2, when="before")
    with PeakWatch(CPU, measured_steps=0) as watch:
        losses = train(model, shuffled_batches(data, 2, seed=0), CPU, loop(8, accumulate=2, lr=1e-2), watch)
    assert len(losses) == 8
    assert model.calls == 16
    assert perplexity(model, data, CPU, batch=2, when="after") < 0.8 * before


def test_a_loss_that_is_not_finite_stops_the_run(model_dir: Path) -> None:
    model, data = fake(model_dir), sequences(4)
    with torch.no_grad():
        model.module.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan: lower --lr"):
        train(model, shuffled_batches(data, 2, seed=0), CPU, loop(2), PeakWatch(CPU, measured_steps=0))
