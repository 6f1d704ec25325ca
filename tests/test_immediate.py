"""`compile(..., update=...)`: what the loop may do with updates inside backward, and what each mistake is told."""

import copy
import gc
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import chunkft_compile
from chunkft_compile.errors import TrainingError
from chunkft_compile.planner import Update
from chunkft_compile.runtime.applied import AppliedGradient
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import Mlp, compute_loss, vector_batch

pytestmark = pytest.mark.usefixtures("captures_once")

PLENTY = 10**8
HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE


def _mlp(patch: pytest.MonkeyPatch, *updates: Update, update: str = "immediate", model: type[nn.Module] = Mlp) -> Any:
    plan_by_hand(patch, updates or (IMMEDIATE,))
    torch.manual_seed(0)
    return compile_quickly(model(), PLENTY, update=update)


def _backward(model: nn.Module, seed: int = 0) -> float:
    loss = compute_loss(model, vector_batch(seed))
    torch.autograd.backward(loss)
    return loss.item()


def _plain(steps: int, lr: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    model = Mlp()
    optimizer = SGD(model.parameters(), lr=lr, momentum=0.9)
    for seed in range(steps):
        _backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _same(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("update", "updates"), [("held", (HELD,)), ("auto", (HELD, IMMEDIATE)), ("immediate", (IMMEDIATE,))])
def test_the_planner_is_asked_for_these_updates(monkeypatch: pytest.MonkeyPatch, update: str, updates: Sequence[Update]) -> None:
    model = _mlp(monkeypatch, updates[-1], update=update)
    model.plan(vector_batch()["x"])
    assert model.problem.updates == updates
    assert {step.update for step in model.schedule.steps} == {updates[-1]}


def test_an_unknown_update() -> None:
    with pytest.raises(ValueError, match=r'update is "held", "auto" or "immediate", not \'now\''):
        chunkft_compile.compile(Mlp(), PLENTY, update="now")  # type: ignore[arg-type]


def test_accumulation_with_immediate_updates() -> None:
    with pytest.raises(ValueError, match=r'accumulation=True adds up .* choose accumulation=False or update="held"'):
        chunkft_compile.compile(Mlp(), PLENTY, accumulation=True, update="immediate")


def test_a_loop_with_a_scheduler_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    counts: list[str] = []
    optimizer.register_step_post_hook(lambda *_: counts.append("stepped"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(4):
            _backward(model, seed)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert len(counts) == model.progress.sweep == 4
    assert {state["step"].item() for state in optimizer.state.values()} == {4}
    assert optimizer.param_groups[0]["lr"] == 1e-2 / 5


def test_updates_happen_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for seed in range(2):
        _backward(model, seed)
        _same(model, _plain(seed + 1))
        assert all(isinstance(chunk.leaf.grad, AppliedGradient) for chunk in model.chunks)
        assert model.progress.sweep == seed
        optimizer.step()
        optimizer.zero_grad(set_to_none=bool(seed))
        assert model.progress.sweep == seed + 1
        _same(model, _plain(seed + 1))


def test_two_optimizers_share_the_chunks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch)
    leaves = list(model.parameters())
    optimizers = [SGD(part, lr=0.1, momentum=0.9) for part in (leaves[:2], leaves[2:])]
    for seed in range(2):
        _backward(model, seed)
        for number, optimizer in enumerate(optimizers):
            assert model.progress.sweep == seed, number
            optimizer.step()
    _same(model, _plain(2))
    assert model.progress.sweep == 2


def test_a_second_backward_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    _backward(model)
    for dropped in (False, True):
        if dropped:
            optimizer.zero_grad()
        with pytest.raises(TrainingError, match=r'optimizer\.step\(\) was not called since.* accumulation=True, update="held"\)'):
            _backward(model, 1)
    optimizer.step()
    _backward(model, 1)
    optimizer.step()
    _same(model, _plain(2))


def test_a_second_backward_in_a_held_step_of_auto_accumulates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch, HELD, IMMEDIATE, update="auto")
    optimizer = SGD(model.parameters(), lr=0.1)
    _backward(model)
    _backward(model)
    assert {step.update for step in model.schedule.steps} == {HELD}
    optimizer.step()
    _backward(model)
    _backward(model)
    optimizer.step()
    assert model.progress.sweep == 1


def test_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    _backward(model)
    with pytest.raises(TrainingError, match=r'update="immediate" has applied and freed .*compile\(\.\.\., update="held"\)'):
        clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert clip_grad_norm_(model.parameters(), 1.0) == 0  # nothing there


def test_no_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch)
    model.plan(vector_batch()["x"])  # a plan needs none
    with pytest.raises(TrainingError, match=r"no optimizer over the chunks yet; build it from model\.parameters\(\) before the first"):
        _backward(model)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    _backward(model)
    optimizer.step()
    _same(model, _plain(1))


def test_an_optimizer_that_needs_more_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch)
    model.plan(vector_batch()["x"])
    optimizer = Adam(model.parameters(), amsgrad=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=r"the plan assumed .*, and Adam needs up to"):
        _backward(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert optimizer.state == {}


def test_a_gradient_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch)
    optimizer = SGD(model.parameters(), lr=0.1)
    model.chunks[1].leaf.grad = torch.zeros_like(model.chunks[1].leaf)
    with pytest.raises(TrainingError, match=r"enter\.bias\[0:8\] has a gradient from before, .* call optimizer\.zero_grad\(\)"):
        _backward(model)
    optimizer.zero_grad()
    _backward(model)


def test_a_replaced_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch)
    optimizer: Optimizer = AdamW(model.parameters(), lr=1e-2)
    _backward(model)
    optimizer.step()
    optimizer = SGD(model.parameters(), lr=0.0)
    gc.collect()
    before = copy.deepcopy(model.state_dict())
    _backward(model)
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)  # the new one's learning rate


class _Failing(SGD):
    """Fails at one parameter once."""

    fails_at: nn.Parameter | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.fails_at is not None and self.fails_at.grad is not None:
            self.fails_at = None
            raise ArithmeticError("no")
        super().step()


@pytest.mark.parametrize("stepped", [False, True])
def test_an_error_in_an_update_leaves_a_sweep_to_go_on_with(monkeypatch: pytest.MonkeyPatch, stepped: bool) -> None:
    model = _mlp(monkeypatch)
    optimizer = _Failing(model.parameters(), lr=0.1)
    leaves = [chunk.leaf for chunk in model.chunks]
    before = [leaf.detach().clone() for leaf in leaves]
    optimizer.fails_at = leaves[2]
    with pytest.raises(ArithmeticError):
        _backward(model)
    assert all(leaf.grad is None for leaf in leaves)
    trained = [not torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True)]
    assert any(trained)
    assert not all(trained)
    if stepped:
        optimizer.step()  # a loop that goes on after the error
    middle = [leaf.detach().clone() for leaf in leaves]
    _backward(model)
    optimizer.step()
    for leaf, old, done in zip(leaves, middle, trained, strict=True):
        assert torch.equal(leaf, old) == done  # every chunk is trained once per sweep
    assert model.progress.sweep == 1
    _backward(model)
    optimizer.step()
    assert model.progress.sweep == 2


class _Late(Mlp):
    """The first layer reads the last one's weight, and gives it no gradient there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(self.enter(x)) @ self.leave.weight.detach().t()
        y: torch.Tensor = self.leave(torch.relu(self.middle(torch.tanh(torch.nn.functional.pad(mixed, (0, 5))))))
        return y


def test_a_weight_is_not_overwritten_before_its_last_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch, model=_Late)
    optimizer = SGD(model.parameters(), lr=0.5)
    torch.manual_seed(0)
    plain = _Late()
    reference = SGD(plain.parameters(), lr=0.5)
    for seed in range(3):
        for trained, steps in ((model, optimizer), (plain, reference)):
            _backward(trained, seed)
            steps.step()
            steps.zero_grad()
        _same(model, plain)
    problem, compiled = model.problem, model._session.latest
    late = [chunk for chunk in problem.chunks if chunk.name.startswith("leave.weight")]
    assert len(problem.segments) > 1
    assert compiled._late_nbytes(problem.chunks) == sum(c.grad_nbytes for c in late) + max(c.update_nbytes for c in late)


def test_nothing_is_left_of_a_deleted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp(monkeypatch)
    optimizer = AdamW(model.parameters())
    loss = compute_loss(model, vector_batch())
    torch.autograd.backward(loss)
    alive: list[weakref.ref[Any]] = [weakref.ref(optimizer)]
    optimizer.step()
    del optimizer
    gc.collect()
    assert alive[0]() is None, "the loss keeps the optimizer"
    alive = [weakref.ref(model), weakref.ref(model.chunks[0].leaf)]
    del model, loss
    gc.collect()
    assert all(reference() is None for reference in alive)
