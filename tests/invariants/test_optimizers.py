"""Every optimizer of torch.optim: cyclic training equals the reference, state streams, and the peak is the predicted one."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from chunkft_compile.planner import Update
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly, slice_of
from tests.invariants.test_memory import CASES, Lab
from tests.models import compute_loss, token_batch
from tests.support import reference
from tests.support.allocator import Allocator

pytestmark = pytest.mark.usefixtures("captures_once")

SWEEPS = 3
UPDATES = (Update.HELD, Update.IMMEDIATE)
LLAMA = CASES[0]
MATRICES = replace(LLAMA, name="llama with enough tokens for gradients of full rank", batch=partial(token_batch, rows=8, tokens=24))
LARGE_EPS = 1e-3  # a small one would turn the rounding of gradients near zero into full updates

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
ADAM: dict[str, Any] = {"lr": 1e-2, "eps": LARGE_EPS, "weight_decay": 0.1}
SETTINGS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "adam": (optim.Adam, ADAM),
    "adamw amsgrad": (optim.AdamW, ADAM | {"amsgrad": True}),
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adagrad": (optim.Adagrad, {"lr": 1e-2, "eps": LARGE_EPS, "initial_accumulator_value": 0.1}),
    "rmsprop": (optim.RMSprop, {"lr": 1e-3, "eps": LARGE_EPS, "momentum": 0.9, "centered": True}),
    "adadelta": (optim.Adadelta, {"lr": 0.1, "eps": LARGE_EPS}),
    "rprop": (optim.Rprop, {"lr": 1e-3}),
    "asgd": (optim.ASGD, {"lr": 0.1, "t0": 1}),
    "nadam": (optim.NAdam, ADAM | {"decoupled_weight_decay": True}),
    "radam": (optim.RAdam, ADAM),
    "adamax": (optim.Adamax, ADAM),
    "adafactor": (optim.Adafactor, {"lr": 1e-2}),
}
FUSED = ("adam", "adamw amsgrad", "sgd", "sgd momentum", "adagrad")
VARIANTS: dict[str, Make] = {
    f"{name} {how}={value}": partial(make, **settings, **{how: value})
    for name, (make, settings) in SETTINGS.items()
    for how, value in (("foreach", False), ("foreach", True), *([("fused", True)] if name in FUSED else []))
}


QUICK = ("adam ", "sgd momentum foreach=True", "adagrad", "rprop foreach=True", "adafactor foreach=False", "adamw amsgrad fused=True")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name.startswith(QUICK) else pytest.mark.slow) for name in VARIANTS])
def test_sweeps_are_the_references_and_the_peak_is_the_predicted_one(
    allocator: Allocator, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    workshop.capture(LLAMA.build(), (), LLAMA.batch(0) | {"use_cache": False})
    plan_by_hand(monkeypatch, UPDATES, resident=(0, 1))
    lab = Lab(allocator, LLAMA, 9.0, make=VARIANTS[name], update="auto")
    steps = lab.slices_of_checked_sweeps(SWEEPS)
    assert len(steps) == SWEEPS * len(UPDATES)
    for state in lab.optimizer.state.values():
        assert "step" not in state or int(state["step"]) == SWEEPS
    trained = {key: value.clone() for key, value in lab.model.state_dict().items()}
    _, expected = reference.train(LLAMA.build(), steps, VARIANTS[name], [[lab.batch]] * len(steps), compute_loss=compute_loss)
    torch.testing.assert_close(trained, dict(expected), rtol=1e-4, atol=1e-5)


class _Muon(Optimizer):
    """Muon for matrices and SGD for vectors, stepped together: what a user does with two optimizers."""

    def __init__(self, leaves: Iterable[nn.Parameter]) -> None:
        leaves = list(leaves)
        super().__init__(leaves, {})
        self.parts = _muon(leaves)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def _muon(leaves: Iterable[nn.Parameter]) -> list[Optimizer]:
    matrices, vectors = ([leaf for leaf in leaves if (leaf.dim() == 2) == flat] for flat in (True, False))
    return [optim.Muon(matrices, lr=1e-2), optim.SGD(vectors, lr=0.1, momentum=0.9)]


@pytest.mark.slow
def test_muon_beside_another_optimizer_is_the_reference(allocator: Allocator, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.capture(MATRICES.build(), (), MATRICES.batch(0) | {"use_cache": False})
    plan_by_hand(monkeypatch, UPDATES, resident=(0, 1))
    gc.collect()
    others, batch, steps = allocator.live(), MATRICES.batch(0), []
    model = compile_quickly(MATRICES.build(), 10**8, update="auto")
    optimizers = _muon(list(model.parameters()))
    model.plan(**batch)
    while model.progress.sweep < SWEEPS:
        progress = model.progress
        allocator.reset()
        torch.autograd.backward(compute_loss(model, batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        steps.append([slice_of(chunk) for chunk in progress.active])
        measured = allocator.peak() - others
        assert measured <= progress.predicted_nbytes
        assert progress.sweep == 0 or progress.predicted_nbytes <= 1.02 * measured
    _, expected = reference.train(MATRICES.build(), steps, _Muon, [[batch]] * len(steps), compute_loss=compute_loss)
    before = MATRICES.build().state_dict()
    for key, value in model.state_dict().items():
        moved, apart = (value - before[key]).abs().mean(), (value - expected[key]).abs().mean()
        assert apart <= 0.2 * moved, key  # Muon works in bf16, and blows small singular values up


def test_loaded_state_leaves_before_the_backward(allocator: Allocator, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.capture(LLAMA.build(), (), LLAMA.batch(0) | {"use_cache": False})
    plan_by_hand(monkeypatch, UPDATES, resident=(0,))
    lab = Lab(allocator, LLAMA, 9.0, make=VARIANTS["adam fused=True"], update="auto")
    lab.sweeps(1)
    before = allocator.live()
    lab.optimizer.load_state_dict(pytree.tree_map_only(torch.Tensor, torch.clone, lab.optimizer.state_dict()))
    assert allocator.live() > before + 100_000  # it is all here now
    lab.model.plan(**lab.batch)
    steps = lab.sweeps(1)
    assert all(step.measured <= step.predicted <= 1.02 * step.measured for step in steps)
