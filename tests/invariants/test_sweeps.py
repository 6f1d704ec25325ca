"""Invariant 2: a sweep touches every trainable element exactly once, frozen parameters never, and no gradient is dense."""

from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.optim import SGD

from chunkft_compile.errors import TrainingError
from tests.conftest import Workshop
from tests.invariants.harness import RESIDENT, compile_quickly, slice_of, smallest_nbytes
from tests.models import PLAIN, TRANSFORMERS, Case, Mlp, compute_loss, vector_batch

pytestmark = pytest.mark.usefixtures("captures_once")

LARGE = 1.0  # a nonzero gradient moves its element, unless it is below the rounding of the weight


def _snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _freeze_some(model: nn.Module) -> set[str]:
    """The first matrix behind the first block or layer."""
    name, parameter = next((n, p) for n, p in list(model.named_parameters())[1:] if p.dim() == 2)
    parameter.requires_grad_(False)
    return {name}


QUICK = ("llama-tied", "mlp", "shared")


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow) for case in (*TRANSFORMERS, *PLAIN)]
)
def test_a_sweep_changes_every_element_once(workshop: Workshop, case: Case) -> None:
    plain = case.build()
    tight = case in TRANSFORMERS
    model = compile_quickly(plain, smallest_nbytes(workshop, case, resident=True) * 11 // 10 if tight else 10**6, **RESIDENT)
    optimizer = SGD(model.parameters(), lr=LARGE)
    changes = {name: torch.zeros_like(value, dtype=torch.int) for name, value in _snapshot(plain).items()}
    expected = {name: torch.zeros_like(count) for name, count in changes.items()}
    trained: list[str] = []
    while not trained or model.progress.sweep == 0:
        before = _snapshot(plain)
        torch.autograd.backward(compute_loss(model, case.batch(len(trained))))
        trained.extend(active := model.progress.active)
        for chunk in model.chunks:
            assert (chunk.leaf.grad is not None) == (chunk.name in active)
            if chunk.leaf.grad is not None:
                rows = slice(chunk.start, chunk.stop) if expected[chunk.param].dim() else ...
                expected[chunk.param][rows] += (chunk.leaf - LARGE * chunk.leaf.grad != chunk.leaf).int()
        optimizer.step()
        optimizer.zero_grad()
        for name, value in _snapshot(plain).items():
            changes[name] += (value != before[name]).int()
    assert (model.progress.steps > 1) == tight
    assert sorted(trained) == sorted(chunk.name for chunk in model.chunks)
    assert model.dense_parameters == ()
    for name, count in changes.items():
        assert count.max() <= 1, name
        assert torch.equal(count, expected[name]), name
        assert expected[name].any(), f"{name} has no gradient: this test would see nothing"


@pytest.mark.parametrize("case", [TRANSFORMERS[1], *PLAIN], ids=lambda case: case.name)
def test_chunks_cover_every_row_once(case: Case) -> None:
    plain = case.build()
    frozen = _freeze_some(plain)
    model = compile_quickly(plain, 4 * sum(p.numel() for p in plain.parameters()) * 3 // 2)
    rows: dict[str, list[int]] = defaultdict(list)
    for chunk in model.chunks:
        rows[chunk.param].extend(range(chunk.start, chunk.stop))
    sizes = {name: len(p) if p.dim() else 1 for name, p in plain.named_parameters() if name not in frozen}
    assert {name: sorted(found) for name, found in rows.items()} == {name: list(range(size)) for name, size in sizes.items()}


def test_frozen_parameters_stay_as_they_are() -> None:
    case = PLAIN[3]
    plain = case.build()
    frozen = _freeze_some(plain)
    model = compile_quickly(plain, 10**6)
    optimizer = SGD(model.parameters(), lr=LARGE, weight_decay=0.1)
    before = _snapshot(plain)
    while model.schedule is None or model.progress.sweep == 0:
        torch.autograd.backward(compute_loss(model, case.batch(0)))
        optimizer.step()
        optimizer.zero_grad()
    same = {name for name, value in _snapshot(plain).items() if torch.equal(value, before[name])}
    assert same == frozen
    assert {slice_of(name)[0] if "[" in name else name for name, _ in model.named_parameters()} == set(before)


class _Forgetful(Mlp):
    """Has a layer that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


def test_a_parameter_that_no_step_would_train_is_an_error() -> None:
    model = compile_quickly(_Forgetful(), 10**6)
    with pytest.raises(TrainingError, match=r"no step would ever train unused\.bias, unused\.weight: .*requires_grad_\(False\)"):
        model(vector_batch()["x"])
