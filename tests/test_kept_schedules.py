"""A schedule that was written down runs exactly, or is refused with what differs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import chunkft_compile
from chunkft_compile import ChunkedModule, PlanMismatch
from chunkft_compile.planner import Category, Placement, Plan, Update, from_json, to_json
from tests.conftest import Workshop
from tests.models import llama, token_batch

pytestmark = pytest.mark.usefixtures("captures_once")
BUDGET = 52_000


def _model(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return llama(**changes).train()


def _compiled(model: nn.Module | None = None, **options: Any) -> tuple[ChunkedModule, torch.optim.Optimizer]:
    compiled = chunkft_compile.compile(model or _model(), **{"solve_seconds": 1.0, **options})
    return compiled, torch.optim.AdamW(compiled.parameters(), lr=1e-2)


def _train(model: ChunkedModule, optimizer: torch.optim.Optimizer, steps: int) -> list[tuple[str, ...]]:
    active = []
    for seed in range(steps):
        loss = model(**token_batch(seed)).loss
        active.append(model.progress.active)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return active


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, captures_once: Workshop) -> Path:
    """A plan of more than one step."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    model, optimizer = _compiled(budget=BUDGET, weights=["device"])
    model.plan(**token_batch())
    assert model.schedule is not None
    assert len(model.schedule.steps) > 1
    model.save_schedule(path)
    del optimizer
    return path


def test_a_kept_schedule_runs_exactly(written: Path) -> None:
    planned = from_json(written.read_text(), Plan)
    model, optimizer = _compiled(schedule=written)
    active = _train(model, optimizer, len(planned.schedule.steps))
    names = [tuple(planned.fingerprint.chunks[number] for number in step.chunks) for step in planned.schedule.steps]
    assert active == names
    assert model.schedule is not None
    assert [(step.options, step.update) for step in model.schedule.steps] == [(s.options, s.update) for s in planned.schedule.steps]
    assert model.schedule.places == planned.schedule.places
    assert model.budget_nbytes == BUDGET


def test_batches_that_are_views_of_any_rows_run_on_it(written: Path) -> None:
    data = {name: torch.cat([torch.zeros_like(value[:1]), value]) for name, value in token_batch().items()}
    rows = {name: value[1:] for name, value in data.items()}
    assert all(value.storage_offset() > 0 for value in rows.values())
    losses = []
    for batch in (rows, token_batch()):
        model, optimizer = _compiled(schedule=written)
        losses.append(model(**batch).loss.detach())
        assert (model.counts.plans, model.counts.captures) == (1, 1)
        del optimizer
    assert torch.equal(*losses)


def test_the_solver_is_not_asked(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("chunkft_compile.solving.plans")
    model, optimizer = _compiled(schedule=from_json(written.read_text(), Plan))
    assert len(_train(model, optimizer, 1)) == 1


@pytest.mark.parametrize(
    ("model", "optimizer", "batch", "message"),
    [
        ({"intermediate_size": 32}, torch.optim.AdamW, {}, "graph: the plan knows"),
        ({}, torch.optim.SGD, {}, "optimizer: the plan has AdamW, here it is SGD"),
        (
            {},
            torch.optim.AdamW,
            {"rows": 4},
            r"inputs: the plan has \['input_ids'\] int64 \[2, 10\], ",
        ),
    ],
)
def test_other_models_batches_and_optimizers_are_refused(
    written: Path, model: dict[str, Any], optimizer: Any, batch: dict[str, int], message: str
) -> None:
    compiled = chunkft_compile.compile(_model(**model), schedule=written)
    training = optimizer(compiled.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in compiled.state_dict().items()}
    with pytest.raises(PlanMismatch, match=message):
        compiled(**token_batch(**batch))
    del training
    assert all(torch.equal(before[name], value) for name, value in compiled.state_dict().items())


def test_a_changed_trainable_set_is_named(written: Path) -> None:
    model = _model()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    compiled, optimizer = _compiled(model, schedule=written)
    with pytest.raises(PlanMismatch, match=r"trained by the plan, not trainable here: model.norm.weight\[0:16\]"):
        _train(compiled, optimizer, 1)


def test_places_that_this_device_does_not_have_are_refused(written: Path) -> None:
    planned = from_json(written.read_text(), Plan)
    weights = (Placement.HOST, *planned.schedule.places.weights[1:])
    away = replace(planned, schedule=replace(planned.schedule, places=replace(planned.schedule.places, weights=weights)))
    compiled, optimizer = _compiled(schedule=away)
    with pytest.raises(PlanMismatch, match="keeps something on the host, which this device does not use"):
        _train(compiled, optimizer, 1)


def test_budgets_must_agree(written: Path) -> None:
    assert _compiled(schedule=written, budget=BUDGET)[0].budget_nbytes == BUDGET
    with pytest.raises(ValueError, match=f"the budget '1MB' is not that of the schedule, {BUDGET} bytes"):
        _compiled(schedule=written, budget="1MB")
    with pytest.raises(ValueError, match="compile needs a budget, or a schedule"):
        _compiled()


def test_accumulation_that_was_not_planned_is_refused(written: Path) -> None:
    compiled, optimizer = _compiled(schedule=written, accumulation=True)
    with pytest.raises(PlanMismatch, match="accumulating: the plan has False, here it is True"):
        _train(compiled, optimizer, 1)


def test_files_that_are_no_plans_are_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing.json cannot be read"):
        _compiled(schedule=tmp_path / "missing.json")
    (tmp_path / "half.json").write_text(written.read_text()[:100])
    with pytest.raises(ValueError, match=r"half.json is not a plan: this is not JSON"):
        _compiled(schedule=tmp_path / "half.json")
    planned = from_json(written.read_text(), Plan)
    (tmp_path / "other.json").write_text(to_json(planned.schedule))
    with pytest.raises(ValueError, match="holds a 'Schedule', expected a 'Plan'"):
        _compiled(schedule=tmp_path / "other.json")
    short = replace(planned, schedule=replace(planned.schedule, steps=planned.schedule.steps[1:]), traces=planned.traces[1:])
    (tmp_path / "short.json").write_text(to_json(short))
    with pytest.raises(ValueError, match="is not a plan: the schedule never trains"):
        _compiled(schedule=tmp_path / "short.json")


def test_updates_come_from_the_plan() -> None:
    model, optimizer = _compiled(budget=BUDGET, update="immediate")
    _train(model, optimizer, 1)
    planned = from_json(to_json(_kept(model)), Plan)
    again, other = _compiled(schedule=planned)
    _train(again, other, 1)
    assert again.schedule is not None
    assert {step.update for step in again.schedule.steps} == {Update.IMMEDIATE}


def _kept(model: ChunkedModule) -> Plan:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory:
        model.save_schedule(Path(directory) / "plan.json")
        return from_json((Path(directory) / "plan.json").read_text(), Plan)


def test_preferences_reach_the_planner() -> None:
    fresh, _ = _compiled(budget=BUDGET, prefer="fresh")
    quick, _ = _compiled(budget=BUDGET)
    assert len(fresh.plan(**token_batch()).steps) <= len(quick.plan(**token_batch()).steps)
    limited, _ = _compiled(budget=BUDGET, max_steps=1)
    with pytest.raises(chunkft_compile.BudgetError, match="no schedule of at most 1 steps fits"):
        limited.plan(**token_batch())
    with pytest.raises(ValueError, match='prefer is "time" or "fresh"'):
        _compiled(budget=BUDGET, prefer="best")
    with pytest.raises(ValueError, match="max_steps is at least 1"):
        _compiled(budget=BUDGET, max_steps=0)


def test_a_refused_budget_names_the_largest_tensors() -> None:
    model, _ = _compiled(budget="20kB")
    with pytest.raises(chunkft_compile.BudgetError, match="the largest tensors then") as caught:
        model.plan(**token_batch())
    lines = str(caught.value).splitlines()
    assert len(lines[lines.index("the largest tensors then:") + 1 :]) == 3
    assert "backward block 0 needs it" in str(caught.value)
    assert all("float32" in line for line in lines[-3:])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {Category.GRADIENTS, Category.SAVED}),
        ({"accumulation": True}, {Category.GRADIENTS}),
        ({"update": "immediate"}, {Category.GRADIENTS}),
        ({"options": ["inputs", "offload"]}, {Category.SAVED}),
        ({"state": ["disk"]}, {Category.STATE}),
        ({"weights": ["disk"], "budget": 2 * BUDGET}, {Category.STAGING}),
    ],
    ids=lambda value: ",".join(sorted(value)) or "plain",
)
def test_every_byte_of_a_program_is_in_its_trace(options: dict[str, Any], expected: set[Category], tmp_path: Path) -> None:
    model, optimizer = _compiled(**{"budget": BUDGET, **options})
    model.plan(**token_batch())
    model.save_schedule(tmp_path / "plan.json")  # raises where lifetimes do not add up to the bytes of `simulate`
    planned = from_json((tmp_path / "plan.json").read_text(), Plan)
    for step, trace in zip(planned.schedule.steps, planned.traces, strict=True):
        assert sum(lifetime.nbytes for lifetime in trace.live_at(trace.binding)) == step.peak_nbytes
        assert sum(instant.us for instant in trace.instants) == step.us
        assert expected < {lifetime.category for lifetime in trace.lifetimes}
    del optimizer


def test_a_schedule_that_goes_on_under_accumulation_is_kept_with_the_peaks_it_has_then(tmp_path: Path) -> None:
    model, optimizer = _compiled(budget=200_000)
    _train(model, optimizer, 1)
    assert model.schedule is not None
    planned = model.schedule.peak_nbytes
    for seed in range(2):
        torch.autograd.backward(model(**token_batch(seed)).loss)
    optimizer.step()
    optimizer.zero_grad()
    assert model.counts.plans == 1
    model.save_schedule(tmp_path / "plan.json")
    kept = from_json((tmp_path / "plan.json").read_text(), Plan)
    assert kept.fingerprint.accumulating
    assert kept.schedule.peak_nbytes > planned
    chunkft_compile.save_checkpoint(tmp_path, model, optimizer)
