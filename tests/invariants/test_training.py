"""Invariants 3 and 4: one step to a sweep is plain training, more steps are the reference's cyclic training."""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from tests.conftest import Workshop
from tests.invariants.harness import RESIDENT, compile_quickly, smallest_nbytes, train_sweeps
from tests.models import CASES, Case, compute_loss
from tests.support import reference

pytestmark = pytest.mark.usefixtures("captures_once")
few = settings(max_examples=3, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

STEPS = 7
CLIP = 0.3
BY_NAME = {case.name: case for case in CASES}

# Some gradients are zero but for rounding (the bias of attention keys). A small eps would turn their noise into full updates.
Make = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": partial(AdamW, lr=1e-2, eps=1e-3, weight_decay=0.1),
    "sgd": partial(SGD, lr=0.1, momentum=0.9),
    "adagrad": partial(Adagrad, lr=1e-2, eps=1e-3),
    "rmsprop": partial(RMSprop, lr=1e-3, eps=1e-3),
}
SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "warm-up": lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4)),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=1e-4),
}


def _train(case: Case, model: nn.Module, scheduler: Callable[[Optimizer], LRScheduler]) -> tuple[list[float], list[float], float]:
    """The ordinary loop: losses, gradient norms, and the learning rate at the end."""
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    schedule = scheduler(optimizer)
    losses, norms = [], []
    for seed in range(STEPS):
        loss = compute_loss(model, case.batch(seed))
        torch.autograd.backward(loss)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(("name", "scheduler"), [("llama-tied", "warm-up"), ("gpt2", "cosine"), ("bert", "warm-up"), ("normed", "cosine")])
def test_one_step_to_a_sweep_is_plain_training(name: str, scheduler: str) -> None:
    """Close and not equal: kernels are the same, but sums over slices (norms, tied weights) take another order."""
    case, plain = BY_NAME[name], BY_NAME[name].build()
    model = compile_quickly(case.build(), 10**8)
    losses, norms, rate = _train(case, model, SCHEDULERS[scheduler])
    assert (model.progress.steps, model.progress.sweep) == (1, STEPS)
    expected, expected_norms, expected_rate = _train(case, plain, SCHEDULERS[scheduler])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-4, atol=0)
    assert rate == expected_rate
    assert min(norms) > CLIP, "clipping must act, or it is not tested"
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", [pytest.param(name, marks=[] if name == "adamw" else pytest.mark.slow) for name in OPTIMIZERS])
@few
@given(
    name=st.sampled_from(["llama-tied", "gpt2", "bert", "shared"]),
    part=st.floats(0, 1),
    micro=st.integers(1, 3),
    announced=st.booleans(),
)
def test_sweeps_are_the_references(workshop: Workshop, optimizer: str, name: str, part: float, micro: int, announced: bool) -> None:
    case, make = BY_NAME[name], OPTIMIZERS[optimizer]
    smallest = smallest_nbytes(workshop, case)
    budget = round(smallest * (1.15 + 0.85 * part)) + (smallest // 2 if micro > 1 else 0)
    model = compile_quickly(case.build(), budget, accumulation=announced)
    trained = train_sweeps(case, model, make(model.parameters()), sweeps=3, micro=micro)
    batches = [[case.batch(seed) for seed in seeds] for seeds in trained.seeds]
    losses, state = reference.train(case.build(), trained.steps, make, batches, compute_loss=compute_loss)
    torch.testing.assert_close(trained.losses, losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trained.state, dict(state), rtol=1e-4, atol=1e-5)


def test_weights_move_away_from_a_reference_that_trains_other_rows(workshop: Workshop) -> None:
    """The comparison above can fail: one step's slices swapped with the next one's give other weights."""
    case, make = BY_NAME["llama-tied"], OPTIMIZERS["adamw"]
    model = compile_quickly(case.build(), smallest_nbytes(workshop, case, resident=True) * 5 // 4, **RESIDENT)
    trained = train_sweeps(case, model, make(model.parameters()), sweeps=1, micro=1)
    assert len(trained.steps) > 1
    swapped = [trained.steps[1], trained.steps[0], *trained.steps[2:]]
    batches = [[case.batch(seed) for seed in seeds] for seeds in trained.seeds]
    _, state = reference.train(case.build(), swapped, make, batches, compute_loss=compute_loss)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trained.state, dict(state), rtol=1e-4, atol=1e-5)
