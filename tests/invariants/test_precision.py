"""fp32 masters and stochastic rounding: the weights of a hand-written loop, in the bytes that were planned."""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from chunkft_compile.module import ChunkedModule
from chunkft_compile.planner import Update
from chunkft_compile.runtime.precision import MASTER
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly, slice_of
from tests.invariants.test_memory import Lab
from tests.models import CASES, Case, compute_loss, llama, token_batch
from tests.support.allocator import Allocator

pytestmark = pytest.mark.usefixtures("captures_once")

PLENTY = 10**8
SCALARS = 128  # bytes of one-element tensors that are counted and not always there
HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE
BY_NAME = {case.name: case for case in CASES}

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": partial(AdamW, lr=1e-2, weight_decay=0.1),
    "adamw fused": partial(AdamW, lr=1e-2, fused=True),
    "adamw foreach": partial(AdamW, lr=1e-2, foreach=True),
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
}


def half(case: Case) -> Case:
    """The case in bf16."""
    return Case(f"{case.name} bf16", lambda: case.make().bfloat16(), case.batch)


def with_fp32_norms(case: Case) -> Case:
    """The case in bf16, its normalisations in fp32, as many models are loaded."""

    def make() -> nn.Module:
        model = case.make().bfloat16()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()
        return model

    return Case(f"{case.name} bf16, fp32 norms", make, case.batch)


MIXED = {case.name: case for case in (half(BY_NAME["bert"]), half(BY_NAME["gpt2-tied"]), with_fp32_norms(BY_NAME["bert"]))}


class Reference:
    """Dense autograd on the half-precision model, and an optimizer over fp32 copies of the active slices."""

    def __init__(self, case: Case, chunked: ChunkedModule, make: Make) -> None:
        self.model = case.build()
        weights = dict(self.model.named_parameters())
        self.slices = {chunk.name: (weights[chunk.param], slice_of(chunk.name)) for chunk in chunked.chunks}
        self.masters = {name: nn.Parameter(self.rows(name).float()) for name in self.slices}
        self.optimizer = make(self.masters.values())

    def rows(self, name: str) -> torch.Tensor:
        """The weights behind a slice."""
        weight, (_, start, stop) = self.slices[name]
        return weight.detach()[start:stop]

    def step(self, batch: dict[str, torch.Tensor], active: Iterable[str], *, clip: float | None = None) -> float:
        """One step of the slices `active`."""
        loss = compute_loss(self.model, batch)
        torch.autograd.backward(loss)
        gradients = {}
        for name in active:
            weight, (_, start, stop) = self.slices[name]
            assert weight.grad is not None
            gradients[name] = weight.grad[start:stop].clone()
        if clip is not None:
            norm = nn.utils.get_total_norm(gradients.values())
            for gradient in gradients.values():
                gradient.mul_(torch.clamp(clip / (norm + 1e-6), max=1.0))
        for name, gradient in gradients.items():
            self.masters[name].grad = gradient.float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.zero_grad()
        for name in gradients:
            self.rows(name).copy_(self.masters[name].detach())
        return loss.item()


@pytest.mark.parametrize("updates", [(HELD, HELD), (IMMEDIATE, HELD, IMMEDIATE)], ids=["held", "mixed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if "norms" in name else pytest.mark.slow) for name in MIXED])
def test_masters_are_those_of_a_loop_by_hand(
    monkeypatch: pytest.MonkeyPatch, name: str, optimizer: str, updates: tuple[Update, ...]
) -> None:
    """Bit for bit, with a learning rate that changes; masters of half the chunks stay on the device, the others move."""
    plan_by_hand(monkeypatch, updates, resident=range(0, 28, 2))
    case, make = MIXED[name], OPTIMIZERS[optimizer]
    model = compile_quickly(case.build(), PLENTY, update="auto", precision="master")
    mine = make(model.parameters())
    reference = Reference(case, model, make)
    schedules = [LambdaLR(o, lambda step: 1 / (step + 1)) for o in (mine, reference.optimizer)]
    model.plan(**case.batch(0))
    for seed in range(3 * len(updates)):
        active = model.progress.active
        loss = compute_loss(model, case.batch(seed))
        torch.autograd.backward(loss)
        mine.step()
        assert loss.item() == reference.step(case.batch(seed), active)
        mine.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert model.progress.sweep == 3
    for (key, value), other in zip(model.state_dict().items(), reference.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    for chunk in model.chunks:
        master = mine.state[chunk.leaf][MASTER] if chunk.weight.dtype == torch.bfloat16 else chunk.leaf
        assert torch.equal(master, reference.masters[chunk.name]), chunk.name


def _lab_steps(hook: Allocator, precision: str, updates: tuple[Update, ...], make: Make) -> list[tuple[int, int]]:
    wide = Case("llama", lambda: llama(hidden_size=32, intermediate_size=96).bfloat16(), partial(token_batch, rows=2, tokens=8))
    with pytest.MonkeyPatch.context() as patch:
        plan_by_hand(patch, updates, resident=(2, 5))
        lab = Lab(hook, wide, 20.0, make=make, update="auto", precision=precision)
        return [(step.measured, step.predicted) for step in lab.sweeps(3)]


@pytest.mark.parametrize("updates", [pytest.param((HELD,), id="held", marks=pytest.mark.slow), pytest.param((HELD, IMMEDIATE), id="mixed")])
@pytest.mark.parametrize("precision", [pytest.param("master", marks=pytest.mark.slow), "stochastic"])
def test_the_peak_is_predicted(allocator: Allocator, workshop: Workshop, precision: str, updates: tuple[Update, ...]) -> None:
    found = _lab_steps(allocator, precision, updates, partial(AdamW, lr=1e-3, fused=True))
    assert all(measured <= predicted for measured, predicted in found)
    for measured, predicted in found[len(updates) :]:
        assert predicted - measured <= SCALARS
