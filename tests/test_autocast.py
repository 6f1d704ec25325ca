"""Autocast around training calls: the graph has the casts, the gradients are those of plain training, and bytes are planned."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from chunkft_compile.module import ChunkedModule
from chunkft_compile.planner import Update
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly
from tests.invariants.test_memory import Lab
from tests.models import CASES, Case, compute_loss, llama, token_batch
from tests.support.allocator import Allocator

pytestmark = pytest.mark.usefixtures("captures_once")

PLENTY = 10**8
SCALARS = 128
BY_NAME = {case.name: case for case in CASES}
bf16 = partial(torch.autocast, "cpu", torch.bfloat16)


def _wide() -> Case:
    return Case("llama", partial(llama, hidden_size=32, intermediate_size=96), partial(token_batch, rows=2, tokens=8))


def _relative_error(model: ChunkedModule, plain: nn.Module) -> float:
    found = 0.0
    for chunk in model.chunks:
        dense = plain.get_parameter(chunk.param).grad
        assert dense is not None
        wanted = dense[chunk.start : chunk.stop] if dense.dim() else dense
        assert chunk.leaf.grad is not None
        assert chunk.leaf.grad.dtype == torch.float32
        found = max(found, float((chunk.leaf.grad - wanted).norm() / (wanted.norm() + 1e-12)))
    return found


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("name", ["normed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "bert-tied"))])
def test_gradients_are_those_of_plain_autocast_training(name: str, backward_inside: bool) -> None:
    """Bit for bit, where backward is outside of autocast or not."""
    case = BY_NAME[name]
    model, plain = compile_quickly(case.build(), PLENTY), case.build()
    optimizer = SGD(model.parameters(), lr=0.1)
    with bf16():
        loss, expected = compute_loss(model, case.batch(0)), compute_loss(plain, case.batch(0))
        if backward_inside:
            torch.autograd.backward(loss)
    assert loss.item() == expected.item()
    assert loss.dtype == expected.dtype
    torch.autograd.backward(expected)
    if not backward_inside:
        torch.autograd.backward(loss)
    assert _relative_error(model, plain) == 0
    optimizer.step()


class _PartlyWide(nn.Module):
    """Its second product is fp32 on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 64), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        with torch.autocast("cpu", enabled=False):
            result: torch.Tensor = self.second(hidden.float())
        return result


@pytest.mark.parametrize("backward_inside", [False, True])
def test_what_the_model_keeps_in_fp32_is_run_in_fp32(backward_inside: bool) -> None:
    case = Case("partly wide", _PartlyWide, BY_NAME["normed"].batch)
    model, plain = compile_quickly(case.build(), PLENTY), case.build()
    with bf16():
        loss, expected = compute_loss(model, case.batch(0)), compute_loss(plain, case.batch(0))
        if backward_inside:
            torch.autograd.backward(loss)
    assert loss.item() == expected.item()
    torch.autograd.backward(expected)
    if not backward_inside:
        torch.autograd.backward(loss)
    assert _relative_error(model, plain) == 0


@pytest.mark.slow
def test_sums_of_several_uses_are_rounded_in_another_order() -> None:
    """Three products read the normed value of a Llama block; their bf16 gradients are not added in eager's order."""
    case = BY_NAME["llama"]
    model, plain = compile_quickly(case.build(), PLENTY), case.build()
    with bf16():
        loss, expected = compute_loss(model, case.batch(0)), compute_loss(plain, case.batch(0))
    torch.autograd.backward([loss, expected])
    assert loss.item() == expected.item()
    assert _relative_error(model, plain) < 2**-6


def test_each_autocast_has_its_own_graph(workshop: Workshop) -> None:
    case = BY_NAME["normed"]
    model = compile_quickly(case.build(), PLENTY)
    optimizer = SGD(model.parameters(), lr=0.0)
    losses = []
    for context in (bf16(), torch.autocast("cpu", enabled=False), bf16()):
        with context:
            loss = compute_loss(model, case.batch(0))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("update", [Update.HELD, Update.IMMEDIATE])
def test_the_peak_is_predicted(allocator: Allocator, workshop: Workshop, update: Update) -> None:
    with pytest.MonkeyPatch.context() as patch, bf16():
        plan_by_hand(patch, [update, Update.HELD])
        lab = Lab(allocator, _wide(), 8.0, make=partial(AdamW, lr=1e-3, fused=True), update="auto")
        steps = lab.sweeps(2)
    assert all(step.measured <= step.predicted for step in steps)
    for step in steps[2:]:
        assert step.predicted - step.measured <= SCALARS


def test_casts_of_weights_are_saved_or_made_again() -> None:
    """Backward reads the bf16 weights that forward made: "save" keeps them, "cheap" does not."""
    case = _wide()
    model = compile_quickly(case.build(), PLENTY)
    with bf16():
        model.plan(**case.batch(0))
    assert model.problem is not None
    block = model.problem.segments[1]
    saved = {cost.option: cost.saved_nbytes for cost in model.problem.kinds[block.kind].active}
    norms = 2 * 4 * 32
    assert saved["save"] - saved["cheap"] > (block.weight_nbytes - norms) // 2
    assert saved["cheap"] < (block.weight_nbytes - norms) // 2


def test_evaluation_is_the_models_own() -> None:
    case = BY_NAME["normed"]
    model, plain = compile_quickly(case.build(), PLENTY), case.build()
    with bf16(), torch.no_grad():
        assert torch.equal(model(case.batch(0)["x"]), plain(case.batch(0)["x"]))
