"""Schedules made without the solver hold the budget, train every chunk, and run as they are."""

from dataclasses import replace

import pytest
import torch
from torch.optim import AdamW

import chunkft_compile
from benchmarks import schedules
from benchmarks.common import train_step
from chunkft_compile.planner import Problem, Schedule
from tests.models import llama, token_batch

BUDGET = 70_000


@pytest.fixture(scope="module")
def planned() -> chunkft_compile.ChunkedModule:
    torch.manual_seed(0)
    model = chunkft_compile.compile(llama(num_hidden_layers=3).train(), budget=BUDGET)
    model.plan(**token_batch())
    return model


@pytest.fixture
def problem(planned: chunkft_compile.ChunkedModule) -> Problem:
    found = planned.problem
    assert found is not None
    return found


def _trained(schedule: Schedule | None) -> list[list[int]]:
    assert schedule is not None
    return [list(step.chunks) for step in schedule.steps]


def test_an_equal_byte_cut_trains_every_chunk(problem: Problem) -> None:
    parts = _trained(schedules.by_method(problem, "equal-bytes"))
    assert len(parts) > 1
    assert sorted(index for part in parts for index in part) == list(range(len(problem.chunks)))


def test_whole_segments_are_neighbouring_segments(problem: Problem) -> None:
    groups = _trained(schedules.by_method(problem, "whole-segments"))
    segments = [{problem.chunks[index].segment for index in group} for group in groups]
    assert len(groups) > 1
    assert sorted(segment for group in segments for segment in group) == list(range(len(problem.segments)))


def test_what_fits_in_no_division_is_none(problem: Problem) -> None:
    tight = replace(problem, budget_nbytes=problem.static_nbytes + 1)
    assert schedules.greedy(tight) is None
    assert schedules.by_method(tight, "equal-bytes") is None
    assert schedules.by_method(tight, "whole-segments") is None


def test_a_model_runs_the_schedule_it_adopts(planned: chunkft_compile.ChunkedModule, problem: Problem) -> None:
    cut = schedules.by_method(problem, "equal-bytes")
    assert cut is not None
    exact = schedules.adopt(planned, cut)
    assert planned.schedule == exact
    assert schedules.same(exact, cut)
    assert exact.peak_nbytes <= BUDGET
    before = {name: parameter.detach().clone() for name, parameter in planned.named_parameters()}
    optimizer = AdamW(planned.parameters(), lr=1e-2)
    trained: set[int] = set()
    for step in cut.steps:
        trained |= set(step.chunks)
        train_step(planned, optimizer, token_batch())
        assert {n for n, (name, p) in enumerate(planned.named_parameters()) if not torch.equal(p, before[name])} == trained
    assert planned.progress.sweep == 1


def test_a_schedule_over_the_budget_is_refused(planned: chunkft_compile.ChunkedModule, problem: Problem) -> None:
    everything = replace(problem, budget_nbytes=10**9)
    schedule = schedules.greedy(everything)
    assert schedule is not None
    with pytest.raises(ValueError, match="the budget is 70000"):
        schedules.adopt(planned, schedule)
