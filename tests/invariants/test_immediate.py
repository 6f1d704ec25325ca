"""IMMEDIATE updates: the same weights as plain training, in fewer bytes, with the ordinary loop around them."""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from chunkft_compile.planner import Update
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly, train_sweeps
from tests.invariants.test_memory import CASES as WIDE
from tests.invariants.test_memory import Lab, StepMemory
from tests.models import CASES, Case, compute_loss
from tests.support import reference
from tests.support.allocator import Allocator

pytestmark = pytest.mark.usefixtures("captures_once")

PLENTY = 10**8
STEPS = 4
SCALARS = 128  # bytes of one-element tensors that are counted and not always there
BY_NAME = {case.name: case for case in CASES}
HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE

# Some gradients are zero but for rounding (the bias of attention keys). A small eps would turn their noise into full updates.
Make = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": partial(AdamW, lr=1e-2, eps=1e-3, weight_decay=0.1),
    "sgd": partial(SGD, lr=0.1, momentum=0.9),
    "adafactor": partial(Adafactor, lr=1e-2),
}


def _train(case: Case, model: nn.Module, optimizer: Optimizer) -> list[float]:
    """The ordinary loop with a warm-up; the learning rate changes at every step."""
    schedule = LambdaLR(optimizer, lambda step: (step + 1) / STEPS)
    losses = []
    for seed in range(STEPS):
        loss = compute_loss(model, case.batch(seed))
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2-tied", "bert", "shared"])
def test_one_step_to_a_sweep_is_plain_training(monkeypatch: pytest.MonkeyPatch, name: str, optimizer: str) -> None:
    """Whole parameters are chunks here, so that a factored optimizer sees the same matrices."""
    plan_by_hand(monkeypatch, [IMMEDIATE], resident=(0, 3))
    case, make = BY_NAME[name], OPTIMIZERS[optimizer]
    plain = case.build()
    model = compile_quickly(case.build(), PLENTY, update="immediate")
    losses = _train(case, model, make(model.parameters()))
    assert (model.progress.steps, model.progress.sweep) == (1, STEPS)
    expected = _train(case, plain, make(plain.parameters()))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "shared"])
def test_sweeps_of_both_updates_are_the_references(monkeypatch: pytest.MonkeyPatch, name: str, scattered: bool) -> None:
    plan_by_hand(monkeypatch, [IMMEDIATE, HELD, IMMEDIATE], option="cheap", resident=(1,), scattered=scattered)
    case, make = BY_NAME[name], OPTIMIZERS["adamw"]
    model = compile_quickly(case.build(), sum(p.nbytes for p in case.build().parameters()) * 40, update="auto")
    trained = train_sweeps(case, model, make(model.parameters()), sweeps=3, micro=1)
    assert len(trained.steps) == 9
    batches = [[case.batch(seed) for seed in seeds] for seeds in trained.seeds]
    losses, state = reference.train(case.build(), trained.steps, make, batches, compute_loss=compute_loss)
    torch.testing.assert_close(trained.losses, losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trained.state, dict(state), rtol=1e-4, atol=1e-5)


def _second_sweep(hook: Allocator, case: Case, *updates: Update) -> list[StepMemory]:
    """Measured and predicted peaks, with an optimizer that needs no workspace, so that the prediction is exact."""
    with pytest.MonkeyPatch.context() as patch:
        plan_by_hand(patch, updates)
        lab = Lab(hook, case, 6.0, make=partial(AdamW, lr=1e-3, fused=True), update="auto")
        steps = lab.sweeps(2)
    assert all(step.measured <= step.predicted for step in steps)
    return steps[len(updates) :]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=() if case is WIDE[0] else pytest.mark.slow) for case in WIDE])
def test_the_peak_is_predicted_and_below_that_of_held_gradients(allocator: Allocator, workshop: Workshop, case: Case) -> None:
    workshop.capture(case.build(), (), case.batch(0) | ({} if case.name == "bert" else {"use_cache": False}))
    (immediate,), (held,) = _second_sweep(allocator, case, IMMEDIATE), _second_sweep(allocator, case, HELD)
    assert 0 <= immediate.predicted - immediate.measured <= SCALARS
    assert immediate.measured < held.measured
    for step in _second_sweep(allocator, case, HELD, IMMEDIATE):
        assert 0 <= step.predicted - step.measured <= SCALARS
