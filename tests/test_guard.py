"""A step that takes more than was planned for it stops, with nothing lost, and training can go on."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from chunkft_compile.errors import MemoryPromiseError
from chunkft_compile.planner import Update
from chunkft_compile.planner.program import Instruction, Op
from chunkft_compile.runtime.engine import Run
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.models import Mlp, compute_loss, vector_batch

pytestmark = pytest.mark.usefixtures("captures_once", "allocator")

HELD, IMMEDIATE = Update.HELD, Update.IMMEDIATE


class Greedy(SGD):
    """Takes more than it did when it was measured, once it has been told to."""

    extra: torch.Tensor | None = None
    greedy_at: int | None = None

    def step(self, closure: Any = None) -> Any:
        if self.greedy_at is not None:
            self.greedy_at -= 1
            if self.greedy_at < 0:
                self.extra, self.greedy_at = torch.empty(100_000), None
        return super().step(closure)


def _model(patch: pytest.MonkeyPatch, *updates: Update) -> Any:
    plan_by_hand(patch, updates)
    torch.manual_seed(0)
    return compile_quickly(Mlp(), 10**8, update="immediate" if IMMEDIATE in updates else "held")


def _step(model: nn.Module, optimizer: SGD, seed: int) -> None:
    torch.autograd.backward(compute_loss(model, vector_batch(seed)))
    optimizer.step()
    optimizer.zero_grad()


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _optimizer(model: nn.Module) -> Greedy:
    return Greedy(model.parameters(), lr=0.1, momentum=0.9)


@contextmanager
def _leaking(op: Op, segment: int) -> Iterator[None]:
    """Inside, this call keeps a megabyte."""
    kept: list[torch.Tensor] = []
    execute = Run._execute

    def leak(run: Run, instruction: Instruction) -> None:
        execute(run, instruction)
        if (instruction.op, instruction.segment) == (op, segment):
            kept.append(torch.empty(250_000))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_execute", leak)
        yield


def _instructions(model: Any) -> list[Instruction]:
    """Of all steps of the schedule."""
    session = model._session
    return [i for step in model.schedule.steps for i in session.program(session.latest, step).program.instructions]


def _changed(model: nn.Module, before: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def _parameters(text: str) -> set[str]:
    """Names of the parameters whose chunks a text names."""
    return set(re.findall(r"([\w.]+)\[\d+:\d+\]", text))


@pytest.mark.parametrize("op", [Op.FORWARD, Op.BACKWARD])
def test_held_weights_are_unchanged_and_the_next_step_trains(monkeypatch: pytest.MonkeyPatch, op: Op) -> None:
    model = _model(monkeypatch, HELD)
    optimizer = _optimizer(model)
    _step(model, optimizer, 0)
    before, progress = _weights(model), model.progress
    with _leaking(op, 0), pytest.raises(MemoryPromiseError, match=rf"{op.upper()} of segment 0\): .*No weight was changed") as caught:
        _step(model, optimizer, 1)
    assert caught.value.measured_nbytes > caught.value.promised_nbytes
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.progress == progress
    optimizer.zero_grad()
    _step(model, optimizer, 1)
    assert model.progress.sweep == 2


def test_immediate_updates_are_named_and_the_sweep_goes_on_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(monkeypatch, IMMEDIATE)
    optimizer = _optimizer(model)
    _step(model, optimizer, 0)
    before = _weights(model)
    with _leaking(Op.BACKWARD, 0), pytest.raises(MemoryPromiseError, match=r"Updated before: .*; the sweep goes on without them") as caught:
        _step(model, optimizer, 1)
    changed = _changed(model, before)
    assert set() < _parameters(str(caught.value)) <= changed < set(before)
    optimizer.zero_grad()
    torch.autograd.backward(compute_loss(model, vector_batch(1)))
    assert {name.partition("[")[0] for name in model.progress.active} == set(before) - changed


@pytest.mark.parametrize("updates", [(HELD,), (IMMEDIATE,)], ids=str)
def test_an_optimizer_that_takes_more_than_when_it_was_measured(monkeypatch: pytest.MonkeyPatch, updates: tuple[Update, ...]) -> None:
    model = _model(monkeypatch, *updates)
    optimizer = _optimizer(model)
    _step(model, optimizer, 0)
    before = _weights(model)
    optimizer.greedy_at = 0
    with pytest.raises(MemoryPromiseError, match=r"\(UPDATE.*bytes at its peak") as caught:
        _step(model, optimizer, 1)
    assert set() < _parameters(str(caught.value)) <= _changed(model, before)
    optimizer.zero_grad()
    _step(model, optimizer, 2)


def test_held_at_the_last_group_the_step_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(monkeypatch, HELD)
    optimizer = _optimizer(model)
    _step(model, optimizer, 0)
    optimizer.greedy_at = sum(instruction.op is Op.UPDATE for instruction in _instructions(model)) - 1
    with pytest.raises(MemoryPromiseError, match="All chunks of the step were updated"):
        _step(model, optimizer, 1)
    assert model.progress.sweep == 2


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKFT_GUARD", "0")
    model = _model(monkeypatch, HELD)
    optimizer = _optimizer(model)
    with _leaking(Op.BACKWARD, 0):
        _step(model, optimizer, 0)
    assert model.progress.sweep == 1


def test_what_the_loop_holds_is_not_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(monkeypatch, HELD, HELD)
    optimizer, kept = _optimizer(model), []
    for seed in range(4):
        kept.append(torch.empty(10**6))
        loss = compute_loss(model, vector_batch(seed))
        kept.append(torch.empty(10**6))
        torch.autograd.backward(loss)
        kept.append(torch.empty(10**6))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        kept.pop(0)


@pytest.mark.parametrize("updates", [(HELD, HELD), (IMMEDIATE,)], ids=str)
def test_debug_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], updates: tuple[Update, ...]) -> None:
    monkeypatch.setenv("CHUNKFT_DEBUG", "2")
    model = _model(monkeypatch, *updates)
    optimizer = _optimizer(model)
    for seed in range(2 * len(updates)):
        _step(model, optimizer, seed)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("chunkft:")]
    steps = [line for line in lines if line.startswith("chunkft: step")]
    pattern = (
        r"chunkft: step (\d) of (\d), sweep (\d): \d+ active chunks, predicted (.*) kB -> measured (.*) kB, .* s, .* fetched, .* evicted"
    )
    found = [match.groups() for line in steps if (match := re.fullmatch(pattern, line))]
    wanted = [(step + 1, len(updates), sweep + 1) for sweep in range(2) for step in range(len(updates))]
    assert [tuple(map(int, numbers)) for *numbers, _, _ in found] == wanted
    assert all(0 < float(measured) <= float(predicted) for *_, predicted, measured in found)
    assert len(lines) - len(steps) == 2 * len(_instructions(model))
