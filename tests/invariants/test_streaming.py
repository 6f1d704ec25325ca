"""Weights, state and saved values beside the device: not a bit of difference, and every byte predicted."""

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from chunkft_compile.module import ChunkedModule
from chunkft_compile.planner import Placement, Update
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly, train_sweeps
from tests.invariants.test_immediate import SCALARS
from tests.invariants.test_memory import CASES as WIDE
from tests.invariants.test_memory import Lab, StepMemory
from tests.models import CASES, Case, compute_loss, llama, token_batch
from tests.support.allocator import Allocator

pytestmark = pytest.mark.usefixtures("captures_once")

HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE
BY_NAME = {case.name: case for case in CASES}
PLENTY = 10**8


@pytest.mark.parametrize("option", ["cheap", "offload"])
@pytest.mark.parametrize("updates", [[HELD, HELD, HELD], [IMMEDIATE, HELD]], ids=["held", "both"])
@pytest.mark.parametrize(
    "name", ["llama", "shared", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-tied", "gpt2", "bert"))]
)
def test_streamed_weights_change_no_bit(monkeypatch: pytest.MonkeyPatch, name: str, updates: list[Update], option: str) -> None:
    case = BY_NAME[name]
    found = []
    for settings in ({"option": "inputs" if option == "offload" else option}, {"option": option, "away": True, "scattered": False}):
        plan_by_hand(monkeypatch, updates, **settings)
        torch.manual_seed(0)
        model = compile_quickly(case.build(), PLENTY, update="auto")
        found.append(train_sweeps(case, model, AdamW(model.parameters(), lr=1e-2), sweeps=2, micro=1))
    assert found[0].losses == found[1].losses
    torch.testing.assert_close(found[0].state, found[1].state, rtol=0, atol=0)


def _peaks(hook: Allocator, case: Case, updates: list[Update], *, away: bool, factor: float = 6.0) -> list[StepMemory]:
    """Measured and predicted peaks of the second sweep."""
    with pytest.MonkeyPatch.context() as patch:
        plan_by_hand(patch, updates, away=away)
        lab = Lab(hook, case, factor, make=partial(AdamW, lr=1e-3, fused=True), update="auto")
        steps = lab.sweeps(2)
    assert all(step.measured <= step.predicted for step in steps)
    return steps[len(updates) :]


@pytest.mark.parametrize("updates", [[HELD, HELD], [IMMEDIATE]], ids=["held", "immediate"])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=() if case is WIDE[0] else pytest.mark.slow) for case in WIDE])
def test_the_peak_is_predicted_and_lower(allocator: Allocator, workshop: Workshop, case: Case, updates: list[Update]) -> None:
    workshop.capture(case.build(), (), case.batch(0) | ({} if case.name == "bert" else {"use_cache": False}))
    streamed, kept = _peaks(allocator, case, updates, away=True), _peaks(allocator, case, updates, away=False)
    for step in (*streamed, *kept):
        assert 0 <= step.predicted - step.measured <= 2 * SCALARS  # of two chunks stepped together
    assert max(step.measured for step in streamed) <= max(step.measured for step in kept)  # fetching early may take what streaming saves


def _streamed(monkeypatch: pytest.MonkeyPatch, updates: list[Update]) -> tuple[ChunkedModule, Optimizer]:
    plan_by_hand(monkeypatch, updates, away=True)
    torch.manual_seed(0)
    model = compile_quickly(llama(), PLENTY, update="auto")
    return model, SGD(model.parameters(), lr=0.1, momentum=0.9)


def _step(model: ChunkedModule, optimizer: Optimizer, seed: int) -> float:
    loss = compute_loss(model, token_batch(seed))
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_a_budget_below_the_weights_trains() -> None:
    plain = llama(hidden_size=32, intermediate_size=96, num_hidden_layers=3)
    weights = sum(p.nbytes for p in plain.parameters())
    model = compile_quickly(plain, int(0.9 * weights), update="auto")
    optimizer = SGD(model.parameters(), lr=0.1)
    steps = len(model.plan(**token_batch()).steps)
    losses = [_step(model, optimizer, 0) for _ in range(2 * steps)]
    assert losses[-1] < losses[0]
    assert model.schedule is not None
    assert Placement.DISK in model.schedule.places.weights
    assert model.store_nbytes >= 0.5 * weights


@pytest.mark.parametrize("updates", [[HELD, HELD], [IMMEDIATE]], ids=["held", "immediate"])
def test_what_a_dropped_loss_left_behind_is_taken_away(
    monkeypatch: pytest.MonkeyPatch, allocator: Allocator, updates: list[Update]
) -> None:
    model, optimizer = _streamed(monkeypatch, updates)
    for seed in range(4):
        _step(model, optimizer, seed)
    gc.collect()
    before = allocator.live()
    loss = compute_loss(model, token_batch(9))
    del loss
    gc.collect()
    _step(model, optimizer, 10)
    gc.collect()
    assert allocator.live() <= before + SCALARS


def test_a_step_left_out_sends_its_state_back(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for leave_out in (False, True):
        model, optimizer = _streamed(monkeypatch, [HELD, HELD])
        _step(model, optimizer, 0)
        _step(model, optimizer, 1)
        if leave_out:
            torch.autograd.backward(compute_loss(model, token_batch(7)))  # no optimizer.step(): a skipped step
            optimizer.zero_grad()
        _step(model, optimizer, 2)
        _step(model, optimizer, 3)
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_an_error_in_a_backward_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _streamed(monkeypatch, [IMMEDIATE])
    _step(model, optimizer, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step, calls = type(optimizer).step, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 2:
            raise ArithmeticError("no")
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(optimizer), "step", failing)
        with pytest.raises(ArithmeticError):
            torch.autograd.backward(compute_loss(model, token_batch(1)))
    after = model.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert 0 < len(changed) < len(before), "the updates before the error are in the weights, the others are not"
    optimizer.zero_grad()
    assert _step(model, optimizer, 2) > 0


def test_state_dict_evaluation_and_saving_see_streamed_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, optimizer = _streamed(monkeypatch, [HELD, HELD])
    for seed in range(4):
        _step(model, optimizer, seed)
    with torch.no_grad():
        loss = compute_loss(model, token_batch(3))
    model.save_pretrained(tmp_path)
    reloaded = type(model.module).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    torch.testing.assert_close(reloaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(compute_loss(reloaded, token_batch(3)), loss)
    prompt = token_batch(4)["input_ids"][:1, :4]
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, **settings), reloaded.generate(prompt, **settings))


def test_another_shape_is_captured_while_weights_are_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _streamed(monkeypatch, [HELD, HELD])
    _step(model, optimizer, 0)
    long = token_batch(1, tokens=12)
    loss = compute_loss(model, long)
    torch.autograd.backward(loss)
    optimizer.step()
    plain = compute_loss(model.module, long)
    assert torch.isfinite(plain)
    assert torch.isfinite(loss)


def test_a_wrong_place_is_named() -> None:
    with pytest.raises(ValueError, match="not at 'moon'"):
        compile_quickly(llama(), PLENTY, weights=["moon"])
