"""`torch.amp.GradScaler` with fp16 weights and fp32 masters, and under autocast: a step that overflowed changes nothing."""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from chunkft_compile.errors import TrainingError
from chunkft_compile.module import ChunkedModule
from chunkft_compile.planner import Update
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import Case, Mlp, compute_loss, vector_batch

pytestmark = pytest.mark.usefixtures("captures_once")

PLENTY = 10**8
FP32 = Case("mlp", Mlp, vector_batch)
FP16 = Case("mlp fp16", lambda: Mlp().half(), lambda seed: {name: value.half() for name, value in vector_batch(seed).items()})

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": partial(AdamW, lr=1e-2, eps=1e-3),
    "fused": partial(AdamW, lr=1e-2, eps=1e-3, fused=True),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
}


def _step(model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, case: Case, *, clip: float | None = None) -> None:
    torch.autograd.backward(scaler.scale(compute_loss(model, case.batch(0))))
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def _compiled(patch: pytest.MonkeyPatch, make: Make, **settings: str) -> tuple[ChunkedModule, Optimizer]:
    plan_by_hand(patch, [Update.HELD] * 2)
    model = compile_quickly(FP16.build(), PLENTY, **({"precision": "master"} | settings))
    return model, make(model.parameters())


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_overflowed_neither_rotates_nor_touches_state(monkeypatch: pytest.MonkeyPatch, name: str, clip: float | None) -> None:
    model, optimizer = _compiled(monkeypatch, OPTIMIZERS[name])
    _step(model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**6), FP16, clip=clip)
    assert (model.progress.step, model.progress.sweep) == (1, 0)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = {id(p): {k: v.clone() for k, v in values.items()} for p, values in optimizer.state.items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    _step(model, optimizer, scaler, FP16, clip=clip)
    assert scaler.get_scale() == 2.0**29
    assert (model.progress.step, model.progress.sweep) == (1, 0)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert {id(p): values.keys() for p, values in optimizer.state.items() if values} == {p: v.keys() for p, v in state.items()}
    assert all(torch.equal(value, state[id(p)][key]) for p, values in optimizer.state.items() for key, value in values.items())
    _step(model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**6), FP16, clip=clip)
    assert (model.progress.step, model.progress.sweep) == (0, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_scale_is_taken_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is left are small values that fp16 has lost without a scale."""
    scaled, plain = _compiled(monkeypatch, OPTIMIZERS[name]), _compiled(monkeypatch, OPTIMIZERS[name])
    for _ in range(4):
        _step(*scaled, torch.amp.GradScaler("cpu", init_scale=2.0**4), FP16, clip=10.0)
        _step(*plain, torch.amp.GradScaler("cpu", init_scale=1.0), FP16, clip=10.0)
    torch.testing.assert_close(scaled[0].state_dict(), plain[0].state_dict(), rtol=1e-3, atol=1e-4)
    assert scaled[0].progress.sweep == 2


def test_fp16_gradients_are_fp32_in_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = _compiled(monkeypatch, OPTIMIZERS["adamw"])
    torch.autograd.backward(compute_loss(model, FP16.batch(0)))
    gradients = [chunk.leaf.grad for chunk in model.chunks if chunk.leaf.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert model.problem is not None
    assert model.problem.chunks[-1].grad_nbytes == 2 * model.chunks[-1].nbytes


@pytest.mark.parametrize("name", ["adamw", "fused"])
def test_immediate_updates_and_a_scaler_are_refused(name: str) -> None:
    model = compile_quickly(FP16.build(), PLENTY, precision="master", update="immediate")
    optimizer = OPTIMIZERS[name](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    torch.autograd.backward(scaler.scale(compute_loss(model, FP16.batch(0))))
    with pytest.raises(TrainingError, match=r'Clipping, unscaling .* update="held"'):
        scaler.step(optimizer)


def test_a_scaler_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_by_hand(monkeypatch, [Update.HELD] * 2)
    model = compile_quickly(FP32.build(), PLENTY)
    optimizer, scaler = AdamW(model.parameters(), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(4):
        with torch.autocast("cpu", torch.float16):
            loss = compute_loss(model, FP32.batch(0))
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert model.progress.sweep == 2
