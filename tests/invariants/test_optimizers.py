"""Every optimizer of torch.optim: cyclic training equals the reference, state streams, and the peak is the predicted one."""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer

from chunkft_compile.planner import Update
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import slice_of
from tests.invariants.test_memory import CASES, Lab
from tests.models import compute_loss
from tests.support import reference
from tests.support.allocator import Allocator

pytestmark = pytest.mark.usefixtures("captures_once")

SWEEPS = 3
UPDATES = (Update.HELD, Update.IMMEDIATE)
LLAMA = CASES[0]
LARGE_EPS = 1e-3  # a small one would turn the rounding of gradients near zero into full updates

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
ADAM = {"lr": 1e-2, "eps": LARGE_EPS, "weight_decay": 0.1}
ALONE: dict[str, Make] = {
    "adam": partial(optim.Adam, **ADAM),
    "adamw amsgrad": partial(optim.AdamW, **ADAM, amsgrad=True),
    "sgd": partial(optim.SGD, lr=0.1),
    "sgd momentum": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adagrad": partial(optim.Adagrad, lr=1e-2, eps=LARGE_EPS, initial_accumulator_value=0.1),
    "rmsprop": partial(optim.RMSprop, lr=1e-3, eps=LARGE_EPS, momentum=0.9, centered=True),
    "adadelta": partial(optim.Adadelta, lr=0.1, eps=LARGE_EPS),
    "rprop": partial(optim.Rprop, lr=1e-3),
    "asgd": partial(optim.ASGD, lr=0.1, t0=1),
    "nadam": partial(optim.NAdam, lr=1e-2, eps=LARGE_EPS, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": partial(optim.RAdam, lr=1e-2, eps=LARGE_EPS),
    "adamax": partial(optim.Adamax, lr=1e-2, eps=LARGE_EPS),
    "adafactor": partial(optim.Adafactor, lr=1e-2),
}
TOGETHER: dict[str, Make] = {f"{name} foreach": partial(make, foreach=True) for name, make in ALONE.items()}
FUSED: dict[str, Make] = {
    f"{name} fused": partial(ALONE[name], fused=True) for name in ("adam", "adamw amsgrad", "sgd", "sgd momentum", "adagrad")
}
VARIANTS = ALONE | TOGETHER | FUSED


@pytest.mark.parametrize("name", VARIANTS)
def test_sweeps_are_the_references_and_the_peak_is_the_predicted_one(
    allocator: Allocator, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    workshop.capture(LLAMA.build(), (), LLAMA.batch(0) | {"use_cache": False})
    plan_by_hand(monkeypatch, UPDATES, resident=(0, 1))
    lab = Lab(allocator, LLAMA, 9.0, make=VARIANTS[name], update="auto")
    lab.model.plan(**lab.batch)
    steps = []
    while lab.model.progress.sweep < SWEEPS:
        steps.append([slice_of(chunk) for chunk in lab.model.progress.active])
        memory = lab.step()
        print(name, memory.measured, memory.predicted, memory.predicted / memory.measured)
        assert memory.measured <= memory.predicted
        assert memory.sweep == 0 or memory.predicted <= 1.02 * memory.measured
    assert len(steps) == SWEEPS * len(UPDATES)
    for state in lab.optimizer.state.values():
        assert "step" not in state or int(state["step"]) == SWEEPS
    trained = {key: value.clone() for key, value in lab.model.state_dict().items()}
    _, expected = reference.train(LLAMA.build(), steps, VARIANTS[name], [[lab.batch]] * len(steps), compute_loss=compute_loss)
    torch.testing.assert_close(trained, dict(expected), rtol=1e-4, atol=1e-5)
