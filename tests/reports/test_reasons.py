"""`chunkft explain`: what it says is what the planner finds."""

from dataclasses import replace

import pytest

from chunkft_compile.planner import Placement, Plan, Update, plan, sketch, smallest_budget, traces_of
from chunkft_compile.planner.units import format_nbytes
from chunkft_compile.reports.document import as_text
from chunkft_compile.reports.levers import forbidden, levers, why_steps, why_time
from chunkft_compile.reports.others import bound_of, in_fewer_steps
from chunkft_compile.reports.reasons import reasons, reasons_at
from tests.reports.plans import decoder, one_chunk_a_step, plan_of

PLAN = decoder(1.2)


def test_the_peak_is_named_with_what_fills_it() -> None:
    traces = traces_of(PLAN)
    number = max(range(len(traces)), key=lambda n: traces[n].peak_nbytes)
    trace = traces[number]
    section = reasons(PLAN)[1]
    first = section.sentences[0]
    assert first.startswith(
        f"Step {number + 1} of {len(traces)}, {trace.instants[trace.binding].name} (instruction {trace.binding + 1} of "
    )
    assert format_nbytes(trace.peak_nbytes) in first
    others = sorted((instant.peak_nbytes for n, instant in enumerate(trace.instants) if n != trace.binding), reverse=True)
    assert f"needs {format_nbytes(trace.peak_nbytes - others[0])} less" in section.sentences[-1]


def test_smallest_budgets_are_those_of_the_planner() -> None:
    first, *more = reasons(PLAN)[2].sentences
    nbytes, binding = smallest_budget(PLAN.problem)
    assert f"from {format_nbytes(nbytes, up=True)} on" in first
    assert f"; {binding} needs that much" in first
    for what, other in forbidden(PLAN).items():
        smallest = smallest_budget(other)[0]
        said = [line for line in more if line.startswith(what)]
        assert bool(said) == (smallest < nbytes)
        assert all(format_nbytes(smallest, up=True) in line for line in said)


def test_what_is_forbidden_and_what_is_not() -> None:
    assert list(forbidden(PLAN)) == ["IMMEDIATE updates", "copies beside compute"]
    free = replace(PLAN.problem, updates=tuple(Update), links=tuple(replace(link, overlaps=True) for link in PLAN.problem.links))
    assert forbidden(plan_of(free)) == {}
    bound = replace(PLAN.problem, accumulating=True, state=(Placement.DEVICE,), budget_nbytes=10 * PLAN.problem.budget_nbytes)
    assert {"no accumulation", "optimizer state beside the device"} <= forbidden(plan_of(bound)).keys()


def test_no_sweep_is_shorter_than_the_least_that_is_said() -> None:
    assert len(PLAN.schedule.steps) > 1
    first, full, *_ = why_steps(PLAN).sentences
    least = int(first.rpartition("fewer than ")[2].split()[0])
    assert 1 <= least <= len(plan(PLAN.problem, prefer="fresh", time_limit_s=0.5).steps)
    assert full.endswith("fill the budget to 99% or more.")


def test_a_sweep_of_fewer_steps_in_the_same_budget_is_told() -> None:
    long = one_chunk_a_step(PLAN)
    fresh = sketch(PLAN.problem, prefer="fresh")
    assert fresh is not None
    told = why_steps(replace(long, schedule=replace(long.schedule, status="FEASIBLE"))).sentences[-1]
    assert told.startswith(f"A sweep of {len(fresh.steps)} step")
    assert why_steps(decoder(20.0)).title == "Why T = 1"


def test_fewer_steps_are_found_in_more_bytes_and_they_fit() -> None:
    count = len(PLAN.schedule.steps)
    found = in_fewer_steps(PLAN, count - 1, seconds=1.0)
    assert found is not None
    assert len(found.steps) < count
    assert PLAN.schedule.budget_nbytes < found.budget_nbytes
    assert found.peak_nbytes <= found.budget_nbytes
    assert in_fewer_steps(PLAN, 0, seconds=1.0) is None


def test_levers_show_the_plan_first_and_only_what_helps() -> None:
    (table,) = levers(PLAN, traces_of(PLAN)).tables
    (name, _, count, *_), *others = table.rows
    assert (name, count) == ("this plan", str(len(PLAN.schedule.steps)))
    assert any(row[0].endswith(" more") and row[2] == "1" for row in others)
    immediate = sketch(forbidden(PLAN)["IMMEDIATE updates"])
    assert immediate is not None
    helps = immediate.sweep_us < 0.98 * PLAN.schedule.sweep_us or len(immediate.steps) < len(PLAN.schedule.steps)
    assert helps == any(row[0] == "IMMEDIATE updates (--update auto)" for row in others)


def test_the_bound_of_a_plan_that_is_one() -> None:
    assert bound_of(PLAN) == PLAN.schedule
    strange = replace(PLAN.schedule.steps[0], options=("unheard-of",) * len(PLAN.problem.segments))
    assert bound_of(replace(PLAN, schedule=replace(PLAN.schedule, steps=(strange,)))) is None


def test_time_is_explained_by_its_parts() -> None:
    section = why_time(PLAN, traces_of(PLAN))
    assert section.sentences[0].endswith("wait for copies.")
    assert "Nothing hides it" in " ".join(section.sentences)
    assert section.tables[0].rows[-1][0] == "all"


def test_a_lowered_plan_is_held_beside_its_own_bound(lowered: Plan) -> None:
    text = as_text(reasons(lowered))
    assert "this plan, by the planner's bound" in text
    assert "--weights host" not in text  # that is for devices that are not here
    assert "odelled" not in text


@pytest.mark.parametrize("step", [None, 1, 2])
def test_one_step(step: int | None) -> None:
    traces = traces_of(PLAN)
    number = max(range(len(traces)), key=lambda n: traces[n].peak_nbytes) if step is None else step - 1
    memory, split = reasons_at(PLAN, step, "1")
    assert memory.title == f"Memory in step {number + 1}, {traces[number].instants[0].name}"
    assert split.title == f"Time of step {number + 1}"
    assert "odelled" in split.sentences[0]
    named = reasons_at(PLAN, step, "backward head")[0]
    assert named.title.endswith("backward head")
    assert "The peak of the step is that of" in memory.sentences[-1]


@pytest.mark.parametrize(
    ("step", "at", "message"),
    [
        (9, None, r"there is no step 9: the plan has \d+ steps, counted from 1"),
        (1, "0", r"there is no instruction 0 in step 1: it has \d+, counted from 1"),
        (1, "999", "there is no instruction 999 in step 1"),
        (
            None,
            "backward tail",
            "there is no instruction 'backward tail' in step .*: name one by number, 1 to .*, or as one of forward prelude",
        ),
    ],
)
def test_steps_and_instructions_that_are_not_there(step: int | None, at: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reasons_at(PLAN, step, at)
