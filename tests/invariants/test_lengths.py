"""Batches of many sizes under one plan: the gradients of plain autograd, within the promised bytes, without tracing or planning again."""

import copy
import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from chunkft_compile.module import ChunkedModule
from chunkft_compile.planner import Update
from tests.conftest import Workshop
from tests.invariants.by_hand import plan_by_hand
from tests.invariants.harness import compile_quickly, slice_of
from tests.models import Case, Mlp, bert, class_batch, compute_loss, gpt2, llama, token_batch, vector_batch

pytestmark = pytest.mark.usefixtures("captures_once", "allocator")
few = settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

ROWS, TOKENS = 4, 19
SMALLER = {"rows": 3, "tokens": 11}
"""The first batch after the largest in most tests: they share its symbolic capture."""

Batches = Callable[..., dict[str, torch.Tensor]]
CASES: dict[str, tuple[Callable[[], nn.Module], Batches, int]] = {
    "llama": (llama, token_batch, 125_000),
    "gpt2": (gpt2, token_batch, 230_000),
    "bert": (bert, class_batch, 150_000),
}


class Branching(Mlp):
    """Another graph for long inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * y if x.shape[0] > 20 else torch.tanh(y)


class Scaled(Mlp):
    """A number of the call is in the graph."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x) * scale


class Images(nn.Module):
    """Convolutions and a batch norm, whose statistics forward changes; of images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.narrow = nn.Conv2d(8, 8, 3, stride=2)
        self.leave = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.leave(torch.relu(self.narrow(torch.relu(self.norm(self.enter(x))))).mean((2, 3)))
        return y


class Telling(Mlp):
    """A size of the batch is an output."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x.shape[0]


def _case(name: str) -> tuple[Case, Batches, int]:
    make, batches, budget = CASES[name]
    return Case(name, make, functools.partial(batches, rows=ROWS, tokens=TOKENS)), batches, budget


def _gradients(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of one batch, which are dropped."""
    loss = compute_loss(model, batch)
    torch.autograd.backward(loss)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return loss.item(), found


def _check(model: ChunkedModule, plain: nn.Module, batch: Mapping[str, torch.Tensor], *, tolerance: float = 2e-6) -> None:
    """The gradients of the active chunks against plain autograd, relative to the largest entry."""
    loss, found = _gradients(model, batch)
    expected_loss, dense = _gradients(plain, batch)
    assert found, "a step trains something"
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in found.items():
        param, start, stop = slice_of(name)
        whole = dense[param]
        bound = tolerance * max(whole.abs().max().item(), 1e-3)
        torch.testing.assert_close(gradient, whole[start:stop] if whole.dim() else whole, rtol=0, atol=bound, msg=f"{name} {batch}")


def _pair(case: Case, budget: int, **kwargs: Any) -> tuple[ChunkedModule, nn.Module]:
    """The compiled model and a plain copy of it."""
    model = case.build()
    return compile_quickly(copy.deepcopy(model), budget, **kwargs), model


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd_for_any_size_up_to_the_planned_one(name: str) -> None:
    case, batches, budget = _case(name)
    model, plain = _pair(case, budget)
    optimizer = SGD(model.parameters(), lr=0.0)
    model.plan(**case.batch(0))
    planned = model.counts

    @few
    @example(**SMALLER, seed=0)
    @given(st.integers(2, ROWS), st.integers(2, TOKENS), st.integers(0, 5))
    def check(rows: int, tokens: int, seed: int) -> None:
        _check(model, plain, batches(seed, rows=rows, tokens=tokens))
        optimizer.step()  # to the next step of the sweep

    check()
    counts = model.counts
    assert (planned.captures, planned.symbolic_captures, planned.plans) == (1, 0, 1)
    assert (counts.captures, counts.symbolic_captures, counts.derived, counts.plans) == (1, 1, 0, 1)


def test_only_rows_vary() -> None:
    model, plain = _pair(Case("mlp", Mlp, vector_batch), 10_000)
    model.plan(torch.zeros(40, 6))
    for rows in (39, 2, 17, 8, 6, 3):
        _check(model, plain, vector_batch(rows, rows=rows))
    assert (model.counts.captures, model.counts.symbolic_captures, model.counts.plans) == (1, 1, 1)


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_a_capture_of_that_size(name: str) -> None:
    case, batches, _ = _case(name)
    batch = batches(3, **SMALLER)
    found = []
    for first in (case.batch(0), batch):
        model = compile_quickly(case.build(), 10**6)
        SGD(model.parameters(), lr=0.0)
        model.plan(**first)
        found.append(_gradients(model, batch))
        assert len(model.schedule.steps) == 1 if model.schedule else False
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_codes_stop_growing_and_nothing_is_traced_after_a_sweep(workshop: Workshop) -> None:
    """Without tiles: their numbers depend on the length, and a code of fewer tiles is made when it is first needed."""
    case, batches, budget = _case("llama")
    model = compile_quickly(case.build(), budget, options=["save", "inputs", "offload"])
    optimizer = SGD(model.parameters(), lr=0.01)
    model.plan(**case.batch(0))
    drawn = random.Random(0)

    def step() -> None:
        sizes = {"rows": drawn.randint(2, ROWS), "tokens": drawn.randint(2, TOKENS)} if model.counts.symbolic_captures else SMALLER
        torch.autograd.backward(compute_loss(model, batches(0, **sizes)))
        optimizer.step()
        optimizer.zero_grad()

    while model.progress.sweep < 1:
        step()
    swept, traced, graphs = model.counts, workshop.captured, torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(30):
        step()
    assert model.counts == swept
    assert (workshop.captured, torch._dynamo.utils.counters["stats"]["unique_graphs"]) == (traced, graphs)


def test_a_larger_batch_is_captured_without_tracing_and_replans_at_most_once() -> None:
    case, batches, budget = _case("llama")
    model, plain = _pair(case, budget)
    optimizer = SGD(model.parameters(), lr=0.0)
    drawn = random.Random(1)
    largest = maxima = 0
    for i in range(12):
        tokens = drawn.randint(3, TOKENS)
        maxima, largest = maxima + (tokens > largest), max(tokens, largest)
        _check(model, plain, batches(i, rows=ROWS, tokens=tokens))
        optimizer.step()
    counts = model.counts
    assert maxima > 2
    assert (counts.captures, counts.symbolic_captures) == (1, 1)
    assert counts.derived < maxima
    assert counts.plans <= maxima


@pytest.mark.slow
def test_rows_that_vary_later_are_symbols_already_and_one_row_is_a_family_of_its_own() -> None:
    case, batches, budget = _case("llama")
    model, plain = _pair(case, budget)
    model.plan(**case.batch(0))
    _check(model, plain, batches(0, **SMALLER))
    _check(model, plain, batches(0, rows=2, tokens=12))
    assert (model.counts.captures, model.counts.symbolic_captures) == (1, 1)
    _check(model, plain, batches(0, rows=1, tokens=12))
    _check(model, plain, batches(0, rows=1, tokens=9))
    _check(model, plain, batches(0, rows=1, tokens=7))
    assert (model.counts.captures, model.counts.symbolic_captures) == (2, 2)


@pytest.mark.slow
def test_a_view_into_a_wider_batch_is_right() -> None:
    case, _, budget = _case("llama")
    model, plain = _pair(case, budget)
    wide = case.batch(0)
    model.plan(**wide)
    for tokens in (7, 12, 5):
        _check(model, plain, {name: tensor[:, :tokens] for name, tensor in wide.items()})
    assert model.counts.captures == 2, "views are a family of their own"


@pytest.mark.parametrize("update", ["held", "immediate"])
@pytest.mark.parametrize("option", ["inputs", "offload"])
def test_training_with_many_lengths_equals_plain_training(update: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights that live beside the device, and for IMMEDIATE updates state that does."""
    case, batches, _ = _case("llama")
    plan_by_hand(monkeypatch, (Update(update),), option=option, away=True)
    model, plain = _pair(case, 10**6, update=update)
    ours, theirs = SGD(model.parameters(), lr=0.1, momentum=0.9), SGD(plain.parameters(), lr=0.1, momentum=0.9)
    model.plan(**case.batch(0))
    for i, (rows, tokens) in enumerate([(4, 19), (3, 11), (2, 15), (4, 5)]):
        for one, optimizer in ((model, ours), (plain, theirs)):
            torch.autograd.backward(compute_loss(one, batches(i, rows=rows, tokens=tokens)))
            optimizer.step()
            optimizer.zero_grad()
    assert model.counts.captures == 1
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_micro_batches_of_other_lengths_add_up() -> None:
    case, batches, _ = _case("llama")
    model, plain = _pair(case, 300_000, accumulation=True)
    ours, theirs = SGD(model.parameters(), lr=0.1), SGD(plain.parameters(), lr=0.1)
    model.plan(**case.batch(0))
    assert model.schedule is not None
    assert len(model.schedule.steps) == 1
    for one, optimizer in ((model, ours), (plain, theirs)):
        for i, (rows, tokens) in enumerate([(3, 11), (2, 19), (4, 6)]):
            torch.autograd.backward(compute_loss(one, batches(i, rows=rows, tokens=tokens)))
        optimizer.step()
    assert (model.counts.captures, model.counts.plans) == (1, 1)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_a_tiled_head_makes_as_many_tiles_as_the_length_needs(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("wide llama", functools.partial(llama, vocab_size=256), functools.partial(token_batch, rows=ROWS, tokens=TOKENS))
    plan_by_hand(monkeypatch, (Update.HELD,), head=f"tiled {tiles}")
    model, plain = _pair(case, 10**6)
    model.plan(**case.batch(0))
    for i, (rows, tokens) in enumerate([(3, 11), (2, 2), (2, 9), (4, 17), (3, 19)]):
        _check(model, plain, token_batch(i, rows=rows, tokens=tokens))
    assert model.counts.captures == 1


def test_a_model_that_branches_on_its_length_is_right_on_either_side() -> None:
    """Sizes for which the symbolic graph does not hold are captured as the first ones were."""
    model, plain = _pair(Case("branching", Branching, vector_batch), 10_000)
    model.plan(torch.zeros(40, 6))
    for rows in (39, 30, 12, 33, 9, 12):
        _check(model, plain, vector_batch(rows, rows=rows))
    assert model.counts.plans <= 2


def test_constants_of_a_call_that_change_leave_nothing_behind() -> None:
    model, _ = _pair(Case("scaled", Scaled, vector_batch), 10_000)
    for scale in range(10):
        torch.autograd.backward((model(torch.ones(4, 6), scale=float(scale + 1)) ** 2).mean())
        model.zero_grad()
    assert model.counts.captures == 10
    assert len(model._session.signatures._families) == 8


def test_images_of_any_size_and_number() -> None:
    model, plain = _pair(Case("images", Images, vector_batch), 10**6)
    model.plan(torch.zeros(8, 3, 16, 16))
    for seed, shape in enumerate([(5, 3, 16, 16), (3, 3, 9, 12), (6, 3, 15, 16), (8, 3, 16, 16)]):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        _check(model, plain, {"x": x, "y": torch.zeros(shape[0], 3)})
    assert (model.counts.captures, model.counts.plans) == (1, 1)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.module.get_buffer(name), buffer)


def test_a_size_that_the_model_gives_is_that_of_the_batch() -> None:
    model, _ = _pair(Case("telling", Telling, vector_batch), 10_000)
    for rows in (9, 5, 7):
        result, told = model(torch.ones(rows, 6))
        assert (result.shape[0], told) == (rows, rows)
        torch.autograd.backward(result.sum())
        model.zero_grad()
    assert model.counts.captures == 3
